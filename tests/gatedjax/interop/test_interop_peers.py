"""Every family against the package that writes it: logits, greedy tokens, tensors to the bit.

Tiny random models, all parameters perturbed. In `make test-oracles`: torch and transformers.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from test_interop import OLMO_ROTATES
from tiny_models import (
    CONFIGS,
    VOCAB,
    loaded,
    saved,
    tiny_config,
    tiny_model,
    torch,
    transformers,
)

from gatedjax.config import DataConfig
from gatedjax.evaluation.sampling import generate
from gatedjax.interop import checkpoint, incoming, on_mesh, outgoing, safetensors
from gatedjax.layers.tree import unflatten_dict
from gatedjax.model import LanguageModel, head_weights
from gatedjax.model import logits as logits_of
from gatedjax.training import given_weights
from gatedjax.training.run import Run

TOKENS = 37
# Where the second document of a packed row begins.
CUT = 14
# One of each kind of cache: keys and values with a window, states, latents beside states, Mamba-2.
WITH_CACHE = ("gpt_oss", "qwen3_5", "kimi_linear", "nemotron_h", "deepseek_v3")


class Imported(NamedTuple):
    folder: Path
    peer: Any
    described: checkpoint.Described
    run: Run
    parameters: dict


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """family -> the model of transformers and ours, made once."""

    @functools.cache
    def make(family: str) -> Imported:
        folder = tmp_path_factory.mktemp(family)
        peer = saved(family, folder)
        return Imported(folder, peer, *read(folder))

    return make


def read(folder: Path) -> tuple[checkpoint.Described, Run, dict]:
    described = checkpoint.described(folder)
    data = DataConfig(seq_len=64)
    run = incoming.run_of(described, data, "float32", None, jax.devices()[:1])
    wanted = given_weights.parameters(run)
    tensors = safetensors.tensors_of_folder(folder)
    found = checkpoint.found(described.family, described.model, tensors, wanted)
    return described, run, on_mesh.read_parameters(found.parts, wanted)


def rows_of_tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCAB, (2, TOKENS))


def logits_of_peer(peer, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return peer(torch.tensor(tokens)).logits.numpy()


def relative_error(ours: np.ndarray, right: np.ndarray) -> float:
    return float(np.sqrt(np.sum((ours - right) ** 2) / np.sum(right**2)))


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_equals_peer(imported, family):
    _, peer, _, run, parameters = imported(family)
    tokens = rows_of_tokens()

    @jax.jit
    def logits(params, tokens, segment_ids):
        hidden, _, _ = LanguageModel(run.config.model).apply(
            {"params": params},
            tokens,
            segment_ids=segment_ids,
        )
        return logits_of(hidden, head_weights(params))

    params = unflatten_dict(parameters)
    whole = np.asarray(logits(params, tokens, None))
    assert relative_error(whole, logits_of_peer(peer, tokens)) < 1e-4
    # Two documents in a row are as if each were alone.
    segment_ids = np.where(np.arange(TOKENS) < CUT, 1, 2)[None].repeat(2, axis=0)
    packed = np.asarray(logits(params, tokens, segment_ids))
    alone = [logits_of_peer(peer, part) for part in (tokens[:, :CUT], tokens[:, CUT:])]
    assert relative_error(packed, np.concatenate(alone, axis=1)) < 1e-4


@pytest.mark.parametrize("family", WITH_CACHE)
def test_greedy_tokens_equals_peer(imported, family):
    _, peer, _, run, parameters = imported(family)
    prompt = rows_of_tokens()[:, :11]
    count = 12
    steps = generate(
        run.config.model,
        unflatten_dict(parameters),
        prompt,
        count,
        vocab_size=VOCAB,
        temperature=0.0,
    )
    ours = np.stack([np.asarray(step) for step in steps], axis=1)
    with torch.no_grad():
        right = peer.generate(
            torch.tensor(prompt),
            attention_mask=torch.ones(prompt.shape, dtype=torch.long),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
        )
    np.testing.assert_array_equal(ours, right[:, prompt.shape[1] :].numpy())


def perplexity(log_probs: np.ndarray, tokens: np.ndarray) -> float:
    """Of every token but the first of its row, from log_probs [rows, tokens, vocabulary]."""
    of_targets = np.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], axis=-1)
    return float(np.exp(-np.mean(of_targets, dtype=np.float64)))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_next"])
def test_perplexity_equals_peer(tmp_path, family):
    """Of a model that transformers has trained, on text that it has not seen."""
    peer = tiny_model(family)
    text = np.frombuffer(Path(__file__).read_bytes(), np.uint8).astype(np.int64) % VOCAB
    rows = text[: len(text) // TOKENS * TOKENS].reshape(-1, TOKENS)
    held_out, rows = rows[:16], rows[16:]
    optimizer = torch.optim.AdamW(peer.parameters(), lr=3e-3)
    untrained = perplexity(log_probs_of_peer(peer, held_out), held_out)
    for step in range(40):
        batch = torch.tensor(rows[np.arange(8 * step, 8 * step + 8) % len(rows)])
        loss = peer(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    peer.save_pretrained(tmp_path)
    _, run, parameters = read(tmp_path)
    model = LanguageModel(run.config.model)
    params = unflatten_dict(parameters)
    hidden, _, _ = jax.jit(model.apply)({"params": params}, held_out.astype(np.int32))
    ours = jax.nn.log_softmax(logits_of(hidden, head_weights(params)).astype(np.float32))
    right = perplexity(log_probs_of_peer(peer, held_out), held_out)
    assert right < untrained / 2
    assert perplexity(np.asarray(ours), held_out) == pytest.approx(right, rel=1e-4)


def log_probs_of_peer(peer, tokens: np.ndarray) -> np.ndarray:
    peer.eval()
    with torch.no_grad():
        return torch.log_softmax(peer(torch.tensor(tokens)).logits.float(), -1).numpy()


@pytest.mark.parametrize("family", CONFIGS)
def test_export_equals_peer(imported, family, tmp_path):
    """transformers loads it: the same parameters to the bit, and the same logits."""
    folder, peer, described, run, parameters = imported(family)
    export(tmp_path, described, run, parameters)
    again = loaded(tmp_path)
    before = peer.state_dict()
    after = again.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    tokens = rows_of_tokens()
    # Of the folder that it came from: a model as it was made lies otherwise in memory, and with the
    # same parameters its logits round otherwise (3e-6 of Qwen3-Next's).
    right = logits_of_peer(loaded(folder), tokens)
    np.testing.assert_allclose(logits_of_peer(again, tokens), right, rtol=0, atol=2e-6)


def export(folder: Path, described: checkpoint.Described, run: Run, parameters: dict) -> None:
    dtype = safetensors.DTYPES["F32"]
    family = described.family
    outgoing.write_tensors(folder, family, run.config, parameters, dtype, {}, 100_000)
    values = outgoing.config_json(family, run.config, dict(described.values), dtype)
    (folder / "config.json").write_text(json.dumps(values))


def test_bfloat16_file_equals_peer(tmp_path):
    """What was saved in bfloat16 is read to the bit."""
    peer = saved("qwen3", tmp_path, "bfloat16")
    _, _, parameters = read(tmp_path)
    right = peer.state_dict()["model.layers.2.mlp.up_proj.weight"].float().numpy()
    ours = np.asarray(parameters["periods", "layer_0", "ffn", "up", "kernel"])[2]
    np.testing.assert_array_equal(ours, right.T)


@pytest.mark.parametrize("values, base", OLMO_ROTATES)
def test_positions_of_olmo_hybrid_equals_peer(tmp_path, values, base):
    """What is null, and what is not there, is not the same."""
    config = tiny_config("olmo_hybrid").to_dict()
    without = {name: config[name] for name in config if not name.startswith("rope_")}
    (tmp_path / "config.json").write_text(json.dumps(without | values))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.rope_parameters["rope_theta"] == base
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config).model
    assert (model.rotary_emb is None) == (base is None)


def test_olmo_hybrid_without_positions_equals_peer(tmp_path):
    rope = {"rope_type": "default", "rope_theta": None}
    peer = tiny_model("olmo_hybrid", rope_parameters=rope)
    assert peer.model.rotary_emb is None
    peer.save_pretrained(tmp_path)
    _, run, parameters = read(tmp_path)
    tokens = rows_of_tokens()
    hidden, _, _ = jax.jit(LanguageModel(run.config.model).apply)(
        {"params": unflatten_dict(parameters)},
        tokens,
    )
    ours = logits_of(hidden, head_weights(unflatten_dict(parameters)))
    assert relative_error(np.asarray(ours), logits_of_peer(peer, tokens)) < 1e-4
