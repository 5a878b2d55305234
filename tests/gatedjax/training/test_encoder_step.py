"""The train step of encoders: images and masked tokens, on a mesh, in micro-batches."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms
from tiny_run import plain, run_steps

from gatedjax.aot.step import abstract_batch
from gatedjax.config import (
    Config,
    DataConfig,
    FrozenDict,
    GatedAttentionConfig,
    ModelConfig,
    OptimConfig,
    PatchConfig,
    RouterConfig,
    SoftMoEConfig,
    SourceConfig,
    SparseMoEConfig,
    TrainConfig,
)
from gatedjax.data.batch import Batch, empty_row, stack_rows
from gatedjax.evaluation.encoder import EncoderValidation
from gatedjax.training.flops import forward_flops_per_token
from gatedjax.training.run import fresh_state, prepare
from gatedjax.training.state import init_state
from gatedjax.training.step import train_step

ROWS = 16
CLASSES = 4
EXPERT_CHOICE = SparseMoEConfig(
    num_experts=4,
    hidden=16,
    router=RouterConfig(selection="expert_choice", renormalize=False),
)


def encoder(ffn, **changes) -> Config:
    model = ModelConfig(
        task="classify",
        patches=PatchConfig(positions="sincos", pooling="mean"),
        vocab_size=CLASSES,
        width=16,
        num_layers=1,
        mixers=FrozenDict(attention=GatedAttentionConfig(num_heads=4, head_dim=4, causal=False)),
        ffns=FrozenDict(mlp=ffn),
        init_std=0.2,
        dtype="float32",
        scan_layers=False,
    )
    config = Config(
        model=model,
        data=DataConfig(sources=FrozenDict(main=SourceConfig(kind="mnist1d")), seq_len=16),
        optim=OptimConfig(warmup_steps=0, lr=1e-2),
        train=TrainConfig(batch_size=ROWS, steps=50),
    )
    return dataclasses.replace(config, **changes)


def images(seed: int) -> Batch:
    """Noise around a picture for each class."""
    rng = np.random.default_rng(seed)
    pictures = np.random.default_rng(99).normal(size=(CLASSES, 16, 4))
    rows = []
    for _ in range(ROWS):
        label = rng.integers(CLASSES)
        row = empty_row(16)
        row.segment_ids[:] = 1
        row.targets[0] = label
        row.loss_mask[0] = 1.0
        patches = pictures[label] + rng.normal(size=(16, 4))
        rows.append(dataclasses.replace(row, patches=patches.astype(np.float32)))
    return stack_rows(rows)


@pytest.mark.parametrize("ffn", [SoftMoEConfig(num_experts=4, hidden=16), EXPERT_CHOICE])
def test_a_step_of_images_has_an_accuracy(ffn):
    """Shapes alone: nothing is compiled."""
    config = encoder(ffn)
    run = prepare(config, jax.devices()[:1])
    state = jax.eval_shape(lambda key: init_state(config, run.tx, key), jax.random.key(0))
    batch = abstract_batch(run)
    assert batch.patches.shape == (ROWS, 16, 4)
    _, metrics = jax.eval_shape(lambda s, b: train_step(config, run.tx, s, b), state, batch)
    assert metrics["accuracy"].shape == () and metrics["loss"].dtype == jnp.float32
    assert "embedding" not in state.params
    # One vector of an image is classified, not one of each token.
    more = dataclasses.replace(config.model, vocab_size=2 * CLASSES)
    added = forward_flops_per_token(more, 16) - forward_flops_per_token(config.model, 16)
    assert added == 2 * 16 * CLASSES / 16


@pytest.mark.slow
@pytest.mark.parametrize("ffn", [SoftMoEConfig(num_experts=4, hidden=16), EXPERT_CHOICE])
def test_a_mesh_and_micro_batches_change_nothing(ffn):
    config = encoder(ffn)
    _, alone, expected = run_steps(config, 3, images, jax.devices()[:1])
    mesh = dataclasses.replace(config.mesh, data=2, fsdp=2, tensor=2)
    halves = dataclasses.replace(config.train, accumulation_steps=2)
    _, cut, found = run_steps(encoder(ffn, mesh=mesh, train=halves), 3, images)
    assert abs(expected[0]["loss"] - math.log(CLASSES)) < 0.5
    for a, b in zip(found, expected):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["accuracy"] == pytest.approx(b["accuracy"], abs=1e-6)
    for a, b in zip(jax.tree.leaves(cut.params), jax.tree.leaves(alone.params)):
        assert rel_rms(a, b) < 1e-2


@pytest.mark.slow
def test_an_encoder_learns_pictures():
    _, _, log = run_steps(encoder(EXPERT_CHOICE), 40, images, jax.devices()[:1])
    assert log[-1]["accuracy"] > 0.9 > log[0]["accuracy"]


@pytest.mark.slow
def test_masked_text_is_measured(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(20):
        (text / f"{i}.txt").write_text(f"{i} one two three four five six seven eight\n" * 8)
    config = plain()
    mixers = {"attention": dataclasses.replace(config.model.mixers["attention"], causal=False)}
    model = dataclasses.replace(
        config.model, task="masked_lm", mixers=FrozenDict(mixers), vocab_size=258
    )
    source = SourceConfig(kind="text", path=str(text))
    data = dataclasses.replace(
        config.data,
        sources=FrozenDict(main=source),
        validation_fraction=0.5,
        cache_dir=str(tmp_path / "cache"),
    )
    config = dataclasses.replace(config, model=model, data=data)
    run = prepare(config)
    with jax.set_mesh(run.mesh):
        state = fresh_state(run)
        evaluate = EncoderValidation(run, 2)
        first = evaluate(state.params)
        again = evaluate(state.params)
    assert first == again and first.confusion is None
    assert abs(first.loss - math.log(258)) < 0.5 and 0 <= first.accuracy < 0.2
    # Two batches of 8 rows of 32 tokens, of which about 15 % are masked.
    assert 20 < first.targets < 150
