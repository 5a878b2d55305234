"""The step: golden numbers, accumulation, the guard, averages; decay and Muon in a whole model."""

import functools
import json
import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms, slow
from tiny_run import plain, random_batch, run_steps, tiny

from gatedjax.model import LanguageModel
from gatedjax.training import state as training_state
from gatedjax.training.flops import forward_flops_per_token
from gatedjax.training.optim import is_matrix, muon_dimensions
from gatedjax.training.run import prepare
from gatedjax.training.state import init_params, param_axes, params_for_evaluation

GOLDEN = Path(__file__).parents[1] / "goldens" / "train_step.json"


@pytest.fixture(scope="module")
def six_steps():
    """Compiled as users compile: without the level that conftest.py asks for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS")
        return run_steps(tiny(), 6)


def test_golden_steps(six_steps, request):
    """The first six losses and gradient norms. `make goldens` refreshes them after a change that is
    meant.
    """
    actual = [
        {k: round(m[k], 6) for k in ("loss", "grad_norm", "balance_loss")} for m in six_steps[2]
    ]
    if request.config.getoption("--refresh-goldens"):
        GOLDEN.write_text(json.dumps(actual, indent=1) + "\n")
    for a, e in zip(actual, json.loads(GOLDEN.read_text()), strict=True):
        assert a == pytest.approx(e, rel=2e-4)


def test_loss_starts_at_chance_and_falls(six_steps):
    losses = [m["loss"] for m in six_steps[2]]
    assert abs(losses[0] - math.log(64)) < 0.3 and losses[-1] < losses[0] - 0.1


def test_accumulation_equals_one_batch(six_steps):
    """Also with unequal numbers of real tokens per micro-batch."""
    batches = lambda i: random_batch(i, rows=16)
    mesh = dict(mesh__data=2, mesh__fsdp=4, train__batch_size=16)
    _, whole, a = run_steps(plain(**mesh), 2, batches)
    _, parts, b = run_steps(plain(**mesh, train__accumulation_steps=2), 2, batches)
    for x, y in zip(a, b):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-4)
    for x, y in zip(jax.tree.leaves(parts.params), jax.tree.leaves(whole.params)):
        assert (
            rel_rms(x, y) < 1e-3
        )  # Adam's first steps turn rounding of tiny gradients into whole steps


def poisoned(i):
    batch = random_batch(i)
    return batch.replace(loss_mask=batch.loss_mask * np.float32(np.nan)) if i in (2, 3) else batch


def test_bad_steps_change_nothing_but_the_counters():
    _, state, log = run_steps(plain(), 5, poisoned)
    _, clean, _ = run_steps(plain(), 3, lambda i: random_batch([0, 1, 4][i]))
    assert [m["skipped_steps"] for m in log] == [0, 0, 1, 2, 2]
    assert [m["skipped_in_a_row"] for m in log] == [0, 0, 1, 2, 0]
    assert int(state.step) == 5
    for a, e in zip(
        jax.tree.leaves((state.params, state.opt_state)),
        jax.tree.leaves((clean.params, clean.opt_state)),
    ):
        np.testing.assert_array_equal(a, e)


@pytest.mark.slow
def test_exploding_gradient_is_skipped_once_the_mean_is_known():
    def batches(i):
        batch = random_batch(i)
        # every target weighs 1000, against a count that still says 1 for most: gradient norm far
        # above the mean
        return batch.replace(targets=np.full_like(batch.targets, 63)) if i == 24 else batch

    _, _, log = run_steps(plain(optim__skip_factor=1.5), 26, batches)
    assert [m["skipped_steps"] for m in log[20:]] == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    "name",
    ["muon", *map(slow, ("lion", "adabelief", "schedule_free", "lanton", "am_adamw"))],
)
def test_every_optimizer_learns(name):
    rates = {"muon": 0.01, "lion": 1e-3, "adabelief": 3e-3, "schedule_free": 1e-2}
    rates |= {"lanton": 0.01, "am_adamw": 3e-3}
    schedule = "constant" if name == "schedule_free" else "cosine"
    config = plain(
        optim__name=name, optim__lr=rates[name], optim__schedule=schedule, optim__ema_decay=0.5
    )
    run, state, log = run_steps(config, 8)
    assert log[-1]["loss"] < log[0]["loss"] - 0.15
    for x, a in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(run.abstract.opt_state)):
        assert x.sharding.is_equivalent_to(a.sharding, x.ndim)


@pytest.mark.slow
def test_evaluation_parameters_are_the_average():
    _, state, _ = run_steps(plain(optim__ema_decay=0.9), 2)
    assert params_for_evaluation(state) is state.ema
    _, state, _ = run_steps(plain(optim__name="schedule_free", optim__schedule="constant"), 2)
    average = params_for_evaluation(state)
    differences = [
        float(jnp.abs(a - p).max())
        for a, p in zip(jax.tree.leaves(average), jax.tree.leaves(state.params))
    ]
    assert max(differences) > 1e-5


def test_parameters_are_traced_once_for_their_shapes_and_the_state(monkeypatch):
    traces = []

    def counted(*arguments):
        traces.append(arguments)
        return init_params(*arguments)

    monkeypatch.setattr(training_state, "init_params", counted)
    # A width that no other test has traced.
    run = prepare(tiny(model__width=48))
    with jax.set_mesh(run.mesh):
        make_state = functools.partial(training_state.init_state, run.config, run.tx)
        jax.jit(make_state, out_shardings=run.shardings).trace(jax.random.key(3))
    assert len(traces) == 1


def test_decay_and_muon_by_logical_axes():
    boxed = jax.eval_shape(lambda key: init_params(tiny().model, key), jax.random.key(0))
    axes = param_axes(boxed)
    flat = {jax.tree_util.keystr(p, simple=True, separator="."): a for p, a in _leaves(axes)}
    decayed = {name for name, a in flat.items() if is_matrix(a)}
    assert {n.rsplit(".", 1)[-1] for n in decayed} == {"kernel", "embedding", "gate", "up", "down"}
    assert not any("norm" in n or "bias" in n or "conv" in n for n in decayed)
    periods = "periods.layer_1."
    assert muon_dimensions(flat[f"{periods}ffn.gate"]) == (
        (2,),
        (3,),
    )  # [layers, expert, embed, mlp]
    assert muon_dimensions(flat[f"{periods}mixer.query.kernel"]) == (
        (1,),
        (2, 3),
    )  # [layers, embed, heads, head_dim]
    assert muon_dimensions(flat[f"{periods}mixer.out.kernel"]) == ((1, 2), (3,))
    assert muon_dimensions(flat["embedding"]) is None


def _leaves(axes):
    return jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))


def test_analytic_flops_match_the_compiler():
    """One period, so that the compiler's count, which sees a scan's body once, is the whole;
    recurrence terms aside.
    """
    config = tiny(
        model__mixers__attention__window=None, model__ffns__moe__experts_per_token=1
    ).model
    params = nn.meta.unbox(jax.eval_shape(lambda k: init_params(config, k), jax.random.key(0)))
    matmul = sum(
        p.size
        for path, p in jax.tree_util.tree_leaves_with_path(params)
        if jax.tree_util.keystr(path).endswith("['kernel']")
        or "embedding" in jax.tree_util.keystr(path)
    )
    experts = sum(params["periods"]["layer_1"]["ffn"][n].size for n in ("gate", "up", "down")) // 4
    decay = (
        sum(
            params["periods"]["layer_0"]["mixer"][n]["kernel"].size
            for n in ("decay_down", "decay_up")
        )
        + params["periods"]["layer_1"]["ffn"]["shared_gate"]["kernel"].size
    )
    mixing = 4 * 4 * 8 * 32 / 2 + 4 * 4 * 8 * 8  # causal scores and values; k^T v and q S
    assert forward_flops_per_token(config, 32) == 2 * (matmul + experts - decay) + mixing


@pytest.mark.slow
def test_model_runs_in_bfloat16_on_float32_parameters():
    config = tiny(model__dtype="bfloat16").model
    batch = random_batch(0, rows=2)
    params = nn.meta.unbox(init_params(config, jax.random.key(0)))
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    half, _, _ = LanguageModel(config).apply(
        {"params": params}, batch.tokens, batch.positions, batch.segment_ids
    )
    full, _, _ = LanguageModel(tiny().model).apply(
        {"params": params}, batch.tokens, batch.positions, batch.segment_ids
    )
    assert half.dtype == jnp.bfloat16 and rel_rms(half, full) < 0.05
