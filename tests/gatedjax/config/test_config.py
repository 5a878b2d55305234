"""Each config builds, resolves to its golden and passes eval_shape; wrong ones name the key."""

import dataclasses
import importlib.util
import inspect
import json
import math
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import slow

from gatedjax.config import (
    FEED_FORWARDS,
    MIXERS,
    Config,
    DataConfig,
    FrozenDict,
    GatedAttentionConfig,
    GatedMLPConfig,
    ImageConfig,
    LoRAConfig,
    MaskingConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    PatchConfig,
    RouterConfig,
    SharedRouterConfig,
    SoftAdaptersConfig,
    SourceConfig,
    StreamConfig,
    TeacherConfig,
    TrainConfig,
    config_dict,
    differing_keys,
    from_config_dict,
    layer,
    nearest_key,
    to_dict,
)
from gatedjax.config.checks import Checked, field_ranges, field_types, is_optional, not_none
from gatedjax.config.files import own_names
from gatedjax.data import load_tokenizer
from gatedjax.errors import InputError
from gatedjax.training.run import with_vocab
from gatedjax.training.state import init_params, param_axes

ROOT = Path(__file__).parents[3]
GOLDENS = Path(__file__).parents[1] / "goldens"
# Another run's model, which it is given: there is none to compare with.
OF_A_RUN = {"from_run", "convert_lizard", "convert_rad_rwkv6", "convert_rad_rwkv7", "phatgoose"}
CONFIGS = [name for name in own_names() if name not in OF_A_RUN]
# What the names promise, in billions of parameters, embeddings included.
BILLIONS = {
    "gated_attention_1p7b": 1.7,
    "gla_340m": 0.34,
    "gla_1p3b": 1.3,
    "mamba2_370m": 0.37,
    "moe_15b_a2p5b": 15.0,
    "rwkv7_191m": 0.191,
    "vit_b16": 0.0865,
}


def load(name: str, *argument: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config_dict(module.get_config(*argument))


@pytest.mark.parametrize("name", CONFIGS)
def test_resolves_to_its_golden(name, request):
    """Refresh with `make goldens` after a change that is meant."""
    golden, resolved = GOLDENS / f"{name}.json", to_dict(load(name))
    if request.config.getoption("--refresh-goldens"):
        golden.write_text(json.dumps(resolved, indent=1) + "\n")
    assert differing_keys(json.loads(golden.read_text()), resolved) == []


# The others have more blocks to trace; every configuration is compared with its golden.
SMALL = ("gla_340m", "tiny", "tiny_moe", "xlora")


@pytest.mark.parametrize("name", [name if name in SMALL else slow(name) for name in CONFIGS])
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
            "config.optim.lr: got 'fast', expected float",
        ),
        (
            lambda c: c["train"].update({"steps": True}),
            "config.train.steps: got True, expected int",
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


@pytest.mark.parametrize(
    "cls, values, message",
    [
        (GatedAttentionConfig, dict(num_heads="4"), "num_heads: got '4', expected int"),
        (GatedAttentionConfig, dict(num_heads=0), "num_heads: got 0, expected at least 1"),
        (
            GatedAttentionConfig,
            dict(rope_fraction=1.5),
            "rope_fraction: got 1.5, expected a fraction",
        ),
        (OptimConfig, dict(lr=-1), "lr: got -1.0, expected above 0"),
        (OptimConfig, dict(clip_norm=-1.0), "clip_norm: got -1.0, expected at least 0"),
        (OptimConfig, dict(beta1=2.0), "beta1: got 2.0, expected a fraction from 0 to below 1"),
        (TrainConfig, dict(steps=0.5), "steps: got 0.5, expected int"),
        (TrainConfig, dict(accumulation_steps=0), "accumulation_steps: got 0, expected at least 1"),
        (TrainConfig, dict(seed=2**70), "seed: got 1180591620717411303424, expected between 0"),
        (GatedMLPConfig, dict(activation="relu6"), "activation: got 'relu6', expected one of silu"),
        (ModelConfig, dict(dtype="f8"), "dtype: got 'f8', expected one of bfloat16, float32"),
        (
            ModelConfig,
            dict(pattern="attention"),
            "pattern: got 'attention', expected a tuple of str",
        ),
        (ModelConfig, dict(width=-8), "width: got -8, expected at least 1"),
        (ModelConfig, dict(mixers={"attention": 3}), "mixers.attention: got 3, expected GatedAtt"),
        (SourceConfig, dict(kind="csv"), "kind: got 'csv', expected one of python_stdlib"),
    ],
)
def test_a_dataclass_built_directly_names_the_field(cls, values, message):
    with pytest.raises(InputError) as e:
        cls(**values)
    assert str(e.value).startswith(message) and "\n" not in str(e.value)


ALL_CLASSES = [
    Config,
    ModelConfig,
    DataConfig,
    SourceConfig,
    StreamConfig,
    OptimConfig,
    OutputConfig,
    MeshConfig,
    TrainConfig,
    TeacherConfig,
    LoRAConfig,
    PatchConfig,
    ImageConfig,
    MaskingConfig,
    RouterConfig,
    SharedRouterConfig,
    SoftAdaptersConfig,
    *MIXERS.values(),
    *FEED_FORWARDS.values(),
]


@pytest.mark.parametrize("cls", ALL_CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_is_checked(cls):
    """No field takes an object of no meaning, a float that is no number, or a negative number."""
    for name, hint in field_types(cls).items():
        wrong = [object()]
        scalar = not_none(hint) if is_optional(hint) else hint
        if scalar is float:
            wrong += [math.nan, math.inf, -1.0]
        if scalar is int:
            wrong += [True, -1, 1.5]
        for value in wrong:
            with pytest.raises(InputError, match=rf"^{name}(: got|\.)"):
                cls(**{name: value})


def numbers():
    """Every number of the configuration: its class, name, range, and whether it is an int. What a
    class has from another one is that one's.
    """
    for cls in ALL_CLASSES:
        for name, hint in field_types(cls).items():
            if name not in inspect.get_annotations(cls):
                continue
            scalar = not_none(hint) if is_optional(hint) else hint
            if typing.get_origin(scalar) is tuple:
                scalar = typing.get_args(scalar)[0]
            if scalar in (int, float):
                yield pytest.param(cls, name, scalar, id=f"{cls.__name__}.{name}")


def subclasses(cls: type) -> set[type]:
    found = set()
    for sub in cls.__subclasses__():
        found |= {sub, *subclasses(sub)}
    return found


def test_all_classes_of_the_configuration_are_here():
    of_package = {c for c in subclasses(Checked) if c.__module__.startswith("gatedjax.")}
    assert of_package == set(ALL_CLASSES)


def out_of_range(allowed, scalar):
    """Random numbers below the range and above it, and those that no number may be."""
    rng = np.random.default_rng(0)
    distances = 10.0 ** rng.uniform(-3, 25, 8)
    far = [allowed.low - d for d in distances] + [-1e300, -math.inf, math.inf, math.nan]
    # What float32 does not hold, and what it rounds to an end that is not included.
    far += [1e39, -1e39]
    if not allowed.includes_low:
        far += [allowed.low, allowed.low + 1e-50]
    if allowed.high < math.inf:
        far += [allowed.high * 1.001 + d for d in distances]
    if not allowed.includes_high:
        far += [allowed.high, allowed.high - 1e-9]
    if scalar is float:
        return far
    whole = [math.floor(x) for x in far if math.isfinite(x) and x < allowed.low]
    whole += [math.ceil(x) for x in far if math.isfinite(x) and x > allowed.high]
    return [*whole, 2**70, -(2**70), 10**400, math.nan, math.inf, 0.5]


@pytest.mark.parametrize("cls, name, scalar", list(numbers()))
def test_every_number_is_held_to_its_range(cls, name, scalar):
    """Built directly, and from the dict of a file or of flags: one line that names the key. A key
    without a range fails here.
    """
    ranges = field_ranges(cls)
    assert name in ranges, f"{cls.__name__}.{name}: declare its range, such as {name}: Size"
    is_tuple = isinstance(getattr(cls, name, None), tuple)
    for value in [*out_of_range(ranges[name], scalar), True, np.True_, "7", [1], {"a": 1}]:
        given = (value, value, value) if is_tuple else value
        with pytest.raises(InputError) as e:
            cls(**{name: given})
        place = f"{name}[0]" if is_tuple else name
        assert str(e.value).startswith(f"{place}: got "), e.value
        assert "expected" in str(e.value) and len(str(e.value).splitlines()) == 1
        assert len(str(e.value)) < 300
    config, path = config_with(cls)
    group = config
    for key in path.split(".")[1:]:
        group = group[key]
    group[name] = [-1.0] * 3 if is_tuple else ranges[name].low - 1
    with pytest.raises(InputError) as e:
        from_config_dict(config)
    assert str(e.value).startswith(f"{path}.{name}"), e.value


def config_with(cls):
    """A whole configuration as dicts that holds this class, and where."""
    raw = to_dict(Config())
    of_run = {"ModelConfig": "model", "DataConfig": "data", "OptimConfig": "optim"}
    of_run |= {"MeshConfig": "mesh", "TrainConfig": "train"}
    if cls.__name__ in of_run:
        return raw, f"config.{of_run[cls.__name__]}"
    if cls is TeacherConfig:
        return raw, "config.train.teacher"
    if cls is LoRAConfig:
        return raw, "config.model.lora"
    of_group = {
        OutputConfig: "config.model.output",
        SharedRouterConfig: "config.model.shared_router",
        PatchConfig: "config.model.patches",
        ImageConfig: "config.data.images",
        MaskingConfig: "config.data.masking",
    }
    if cls in of_group:
        return raw, of_group[cls]
    if cls is SourceConfig:
        return raw, "config.data.sources.main"
    if cls is StreamConfig:
        return raw, "config.data.sources.main.stream"
    if cls is RouterConfig:
        raw["model"]["ffns"]["mine"] = to_dict(FEED_FORWARDS["sparse_moe"]())
        return raw, "config.model.ffns.mine.router"
    if cls is SoftAdaptersConfig:
        raw["model"]["ffns"]["mine"] = to_dict(FEED_FORWARDS["mlp"]())
        return raw, "config.model.ffns.mine.adapters"
    group = "mixers" if cls in MIXERS.values() else "ffns"
    raw["model"][group]["mine"] = to_dict(cls())
    return raw, f"config.model.{group}.mine"


def test_the_ends_of_a_range_are_in_it():
    for cls in ALL_CLASSES:
        for name, allowed in field_ranges(cls).items():
            assert (allowed.low in allowed) == allowed.includes_low, name
            if allowed.high < math.inf:
                assert (allowed.high in allowed) == allowed.includes_high, name


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: Config(train=TrainConfig(steps=20)),
            "optim.warmup_steps: got 20, expected fewer than train.steps = 20",
        ),
        (
            lambda: Config(optim=OptimConfig(schedule="wsd", decay_fraction=0.9)),
            "optim.warmup_steps: got 20, expected at most 10: the 100 steps without the 90 that",
        ),
        (
            lambda: Config(train=TrainConfig(batch_size=2**20), data=DataConfig(seq_len=2**12)),
            "train.batch_size: got 1048576, expected at most 524287 rows of data.seq_len tokens",
        ),
        (lambda: OptimConfig(skip_factor=0.9), "skip_factor: got 0.9, expected 0, or above 1"),
        (lambda: ModelConfig(pattern=(3,)), "pattern[0]: got 3, expected str"),
        (lambda: ModelConfig(pattern=()), "pattern: got (), expected at least one layer"),
        (lambda: ModelConfig(dtype=["bfloat16"]), "dtype: got ['bfloat16'], expected one of"),
        (lambda: ModelConfig(remat=np.arange(3)), "remat: got array([0, 1, 2]), expected one of"),
    ],
)
def test_what_goes_together(build, message):
    with pytest.raises(InputError) as e:
        build()
    assert str(e.value).startswith(message)


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    "value", [nested(900), ["a", "b"], {"b": 1}, None, 3, True, "x" * 10**6, "\x1b]0;pwned\x07"]
)
@pytest.mark.parametrize(
    "path",
    ["model", "model.mixers", "model.mixers.gla.kind", "optim", "optim.lr", "train.steps"],
)
def test_whatever_stands_in_a_file_is_refused_in_one_line(path, value):
    raw = to_dict(load("tiny"))
    *groups, last = path.split(".")
    group = raw
    for name in groups:
        group = group[name]
    group[last] = value
    if path == "optim.lr" and value == 3:
        return
    if path == "train.steps" and value == 3:
        group["steps"] = 3.5
    with pytest.raises(InputError) as e:
        from_config_dict(raw)
    text = str(e.value)
    assert (
        text.isprintable() and len(text) < 1000 and text.startswith(f"config.{path.split('.')[0]}")
    )


def test_an_unknown_key_cannot_reach_the_terminal():
    raw = to_dict(load("tiny")) | {"\x1b]0;pwned\x07\x1b[2J": 1}
    with pytest.raises(InputError, match=r"unknown key") as e:
        from_config_dict(raw)
    assert str(e.value).isprintable()


def test_equal_values_of_another_type_make_an_equal_configuration():
    attention = GatedAttentionConfig(num_heads=2)
    lists = ModelConfig(mixers={"attention": attention}, pattern=["attention"], z_loss=0)
    frozen = ModelConfig(mixers=FrozenDict(attention=attention), pattern=("attention",), z_loss=0.0)
    assert lists == frozen and hash(lists) == hash(frozen)
    numbers = OptimConfig(lr=np.float64(0.5), warmup_steps=np.int64(3))
    assert numbers == OptimConfig(lr=0.5, warmup_steps=3)
    assert {type(x) for x in dataclasses.astuple(numbers)} <= {str, int, float, bool, tuple}


@pytest.mark.parametrize("kind", MIXERS)
def test_tiny_takes_every_causal_mixer(kind):
    if getattr(MIXERS[kind](), "not_causal", None) is None:
        assert load("tiny", kind).model.mixers["attention"].kind == kind
        return
    with pytest.raises(InputError, match=f"configs/tiny.py: got '{kind}', expected one of"):
        load("tiny", kind)


def test_tiny_names_an_unknown_mixer():
    with pytest.raises(InputError, match=r"configs/tiny.py: got 'rnn', expected one of gated_att"):
        load("tiny", "rnn")


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
