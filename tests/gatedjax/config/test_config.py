"""Every config builds, resolves to its committed golden, and passes under eval_shape; wrong ones
name the key.
"""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gatedjax.config import (
    config_dict,
    differing_keys,
    from_config_dict,
    layer,
    nearest_key,
    to_dict,
)
from gatedjax.data import load_tokenizer
from gatedjax.errors import InputError
from gatedjax.training.run import with_vocab
from gatedjax.training.step import init_params, param_axes

ROOT = Path(__file__).parents[3]
GOLDENS = Path(__file__).parents[1] / "goldens"
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py"))
# What the names promise, in billions of parameters, embeddings included.
BILLIONS = {"gated_attention_1p7b": 1.7, "gla_340m": 0.34, "gla_1p3b": 1.3, "moe_15b_a2p5b": 15.0}


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config_dict(module.get_config())


@pytest.mark.parametrize("name", CONFIGS)
def test_resolves_to_its_golden(name, request):
    """Refresh with `make goldens` after a change that is meant."""
    golden, resolved = GOLDENS / f"{name}.json", to_dict(load(name))
    if request.config.getoption("--refresh-goldens"):
        golden.write_text(json.dumps(resolved, indent=1) + "\n")
    assert differing_keys(json.loads(golden.read_text()), resolved) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_passes_eval_shape(name):
    config = load(name)
    if config.data.tokenizer == "bytes":
        config = with_vocab(config, load_tokenizer("bytes"))
    boxed = jax.eval_shape(lambda key: init_params(config.model, key), jax.random.key(0))
    assert all(
        len(axes) > 0
        for axes in jax.tree.leaves(param_axes(boxed), is_leaf=lambda x: isinstance(x, tuple))
    )
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(boxed))
    billions = sum(p.size for p in jax.tree.leaves(boxed)) / 1e9
    assert name not in BILLIONS or abs(billions / BILLIONS[name] - 1) < 0.12, (
        f"{billions:.3f}B parameters"
    )


def test_json_round_trip():
    config = load("tiny")
    assert from_config_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda c: c.update({"optimizer": 1}),
            "config.optimizer: unknown key; did you mean 'optim'?",
        ),
        (
            lambda c: c["optim"].update({"lrr": 1.0}),
            "config.optim.lrr: unknown key; did you mean 'lr'?",
        ),
        (
            lambda c: c["optim"].update({"lr": "fast"}),
            "config.optim.lr: 'fast' is str, expected float",
        ),
        (
            lambda c: c["train"].update({"steps": True}),
            "config.train.steps: True is bool, expected int",
        ),
        (
            lambda c: c["train"].update({"steps": 0}),
            "config.train.steps: got 0, expected at least 1",
        ),
        (
            lambda c: c["optim"].update({"name": "adamm"}),
            "config.optim.name: got 'adamm', expected one of adamw, muon",
        ),
        (
            lambda c: c["model"].update({"pattern": ["mamba"]}),
            "model.pattern: got 'mamba', expected one of mixers",
        ),
        (
            lambda c: c["model"]["mixers"]["gla"].update({"num_kv_heads": 3}),
            "mixers.gla.num_kv_heads: got 3",
        ),
        (
            lambda c: c["model"]["mixers"]["gla"].update({"kind": "rnn"}),
            "mixers.gla.kind: got 'rnn', expected one of",
        ),
        (
            lambda c: c["model"].update({"num_layers": 3}),
            "config.model.num_layers: got 3, expected a multiple",
        ),
        (
            lambda c: c["data"].update({"sources": 3}),
            "config.data.sources: got 3, expected named entries",
        ),
    ],
)
def test_wrong_input_names_the_key(change, message):
    raw = to_dict(load("tiny"))
    change(raw)
    with pytest.raises(InputError) as e:
        from_config_dict(raw)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_layer_rejects_unknown_names():
    with pytest.raises(
        InputError, match=r"gated_attention.windw: unknown key; did you mean 'window'"
    ):
        layer("gated_attention", windw=3)
    with pytest.raises(
        InputError, match="'gatd_attention' is unknown; did you mean 'gated_attention'"
    ):
        layer("gatd_attention")


def test_optional_values_keep_their_type_for_flags():
    c = config_dict()
    c.model.mixers.attention.window = 128
    with pytest.raises(TypeError):
        c.model.mixers.attention.window = "wide"


def test_nearest_key_of_a_dotted_flag():
    assert nearest_key("model.widht") == "; did you mean 'model.width'?"
    assert nearest_key("model.mixers.mine.windw") == "; did you mean 'window'?"
