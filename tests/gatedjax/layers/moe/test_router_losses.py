"""Balance losses beside every codebase's own formula; z-loss, buffer over micro-batches, state
updates, whole steps.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import rel_rms
from tiny_run import plain, random_batch, run_steps

from gatedjax.config import FrozenDict, ModelConfig, RouterConfig, SparseMoEConfig
from gatedjax.layers.moe import state as router_state
from gatedjax.layers.moe.losses import balance_loss, load_metrics, router_losses, weight_here
from gatedjax.layers.moe.routing import Routing, count_places
from gatedjax.layers.moe.statistics import Extent, as_part, router_statistics
from gatedjax.training.gradients import accumulated_gradients
from gatedjax.training.state import init_state

E, K, L, T = 6, 2, 3, 40
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(L, T, E))
P = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
CHOSEN = np.argsort(-P, axis=-1)[..., :K]  # [L, T, K]
ONE_HOT = np.eye(E)[CHOSEN]  # [L, T, K, E]
ETA = np.array([1.0, 1.0, 1.0, 1.0, 0.3, 0.3])


def theirs(codebase: str) -> float:
    """The loss over L layers as each codebase writes it, layers all alike where it pools them."""
    counts, mean = ONE_HOT.sum((1, 2)), P.mean(1)  # [L, E]
    alike = ONE_HOT[:1].repeat(L, 0), P[:1].repeat(L, 0)
    return {
        "switch": lambda: sum(E * (counts[i] / (K * T) * mean[i]).sum() for i in range(L)),
        "megablocks": lambda: np.mean(
            [E / (T * K) * (counts[i] * mean[i]).sum() for i in range(L)]
        ),
        # Expert mask [layers x tokens, k, E] -> mean over rows [k, E]; times the mean share;
        # summed; times E.
        "huggingface": lambda: (
            E * (alike[0].reshape(-1, K, E).mean(0) * alike[1].reshape(-1, E).mean(0)).sum()
        ),
        "maxtext": lambda: sum(
            E**2 * np.mean(ONE_HOT[i].sum(1).mean(0) * mean[i]) for i in range(L)
        ),
        "deepseek": lambda: sum((E / (K * T) * counts[i] * mean[i]).sum() for i in range(L)),
        "moe++": lambda: sum((ETA * counts[i] / T * mean[i]).sum() for i in range(L)),
    }[codebase]()


@pytest.mark.parametrize(
    "codebase", ["switch", "megablocks", "huggingface", "maxtext", "deepseek", "moe++"]
)
def test_weights_convert_from_every_codebase(codebase):
    layers = [0] * L if codebase == "huggingface" else range(L)
    eta = jnp.asarray(ETA) if codebase == "moe++" else 1.0
    counts = jnp.asarray(ONE_HOT.sum((1, 2)))
    probs = jnp.asarray(P.mean(1))
    ours = sum(float(balance_loss(counts[i], probs[i], eta)) for i in layers)
    assert 0.01 * theirs(codebase) == pytest.approx(
        weight_here(codebase, 0.01, E, K, L) * ours, rel=1e-5
    )


def test_unknown_codebase_is_named():
    with pytest.raises(
        ValueError, match="codebase: got 'tutel', expected one of switch, megablocks"
    ):
        weight_here("tutel", 0.01, E, K)


def test_balance_loss_is_one_at_balance_and_e_at_collapse():
    assert balance_loss(jnp.full(4, 10.0), jnp.full(4, 0.25)) == pytest.approx(1.0)
    assert balance_loss(jnp.array([0.0, 9, 0, 0]), jnp.array([0.0, 1, 0, 0])) == pytest.approx(4.0)


def test_statistics_formulas():
    """Rows are sequences; entropy, z-loss and the sequence loss beside NumPy."""
    z, p = jnp.asarray(LOGITS[:2], jnp.float32), P[:2]
    routing = Routing(jnp.asarray(CHOSEN[:2]), None, jnp.asarray(p, jnp.float32))
    s = router_statistics(z, routing, count_places(routing.experts, E), jnp.float32(0))
    np.testing.assert_array_equal(s["counts"], ONE_HOT[:2].sum((0, 1, 2)))
    np.testing.assert_allclose(
        s["z_loss"], np.mean(np.log(np.exp(LOGITS[:2]).sum(-1)) ** 2), rtol=1e-5
    )
    np.testing.assert_allclose(s["entropy"], -(p * np.log(p)).sum(-1).mean(), rtol=1e-5)
    rows = [(E / (K * T) * ONE_HOT[b].sum((0, 1)) * P[b].mean(0)).sum() for b in range(2)]
    np.testing.assert_allclose(s["sequence_loss"], np.mean(rows), rtol=1e-5)


def sparse_model(**values) -> ModelConfig:
    ffn = SparseMoEConfig(
        num_experts=4, zero_experts=2, balance_loss=0.1, z_loss=0.01, sequence_loss=0.5, **values
    )
    return ModelConfig(
        num_layers=4,
        ffns=FrozenDict(moe=ffn, mlp=ModelConfig().ffns["mlp"]),
        ffn_pattern=("mlp", "moe"),
    )


def layer_statistics(seed):
    r = np.random.default_rng(seed)
    share = r.random((2, E))
    return {
        "counts": jnp.asarray(r.integers(0, 30, (2, E)).astype(np.float32)),
        "probability": jnp.asarray(share / share.sum(-1, keepdims=True), jnp.float32),
        **{
            name: jnp.asarray(r.random(2), jnp.float32)
            for name in ("sequence_loss", "z_loss", "entropy")
        },
        "dropped": jnp.array([3.0, 0.0]),
    }


def test_micro_batches_add_up_to_the_step():
    """f over both, P and the means by tokens, the sequence loss by rows; MoE++'s eta within."""
    model = sparse_model(zero_computation_weight=0.3)
    extents = [
        Extent(jnp.float32(30.0), jnp.float32(1.0)),
        Extent(jnp.float32(10.0), jnp.float32(3)),
    ]
    whole = Extent(jnp.float32(40.0), jnp.float32(4.0))
    given = [layer_statistics(1), layer_statistics(2)]
    parts = [as_part({"layer_0": {}, "layer_1": g}, e, whole) for g, e in zip(given, extents)]
    step = jax.tree.map(jnp.add, *parts)
    total, log = router_losses(model, step)
    both = np.asarray(given[0]["counts"] + given[1]["counts"])
    mean = lambda name, a, b: a * np.asarray(given[0][name]) + b * np.asarray(given[1][name])
    p = mean("probability", 0.75, 0.25)
    balance = E * (ETA * both / both.sum(-1, keepdims=True) * p).sum(-1)
    sequence = mean("sequence_loss", 0.25, 0.75)
    z_loss = mean("z_loss", 0.75, 0.25)
    np.testing.assert_allclose(
        total, (0.1 * balance + 0.5 * sequence + 0.01 * z_loss).sum(), rtol=1e-5
    )
    np.testing.assert_allclose(log["balance_loss"], balance.mean(), rtol=1e-5)
    np.testing.assert_allclose(log["router_z_loss"], z_loss.mean(), rtol=1e-5)
    np.testing.assert_allclose(log["dropped_fraction"], 6.0 / both[0].sum() / 2, rtol=1e-5)
    # With the counts of the step, each part's loss is its part of the loss.
    of_parts = [router_losses(model, part, {"layer_1": jnp.asarray(both)})[0] for part in parts]
    np.testing.assert_allclose(sum(of_parts), total, rtol=1e-5)


def test_what_is_turned_off_may_be_infinite():
    """A loss with weight 0 is not in the sum: 0 times Inf is NaN."""
    model = sparse_model()
    ffn = dataclasses.replace(model.ffns["moe"], z_loss=0.0, sequence_loss=0.0)
    model = dataclasses.replace(model, ffns=FrozenDict(moe=ffn, mlp=model.ffns["mlp"]))
    statistics = layer_statistics(1) | dict.fromkeys(
        ["z_loss", "sequence_loss"], jnp.full(2, jnp.inf)
    )
    total, _ = router_losses(model, {"layer_0": {}, "layer_1": statistics})
    assert np.isfinite(total)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_loads_are_fractions_of_whatever_they_sum_to(scale):
    """Not divided by 1 where they sum to less; and of nothing comes nothing, no rule moves."""
    counts, p = jnp.array([3.0, 1.0, 0.0, 0.0]) * scale, jnp.array([0.4, 0.3, 0.2, 0.1])
    assert balance_loss(counts, p) == pytest.approx(4 * (0.75 * 0.4 + 0.25 * 0.3))
    target = jnp.full(4, 0.25)
    error = router_state.load_error(counts, target)
    np.testing.assert_allclose(error, [-2.0, 0.0, 1.0, 1.0], rtol=1e-5)
    assert not np.any(router_state.load_error(0.0 * counts, target))
    assert balance_loss(0.0 * counts, p) == 0


def test_load_metrics_come_in_the_order_of_layers():
    counts = {
        "layer_1": jnp.array([[4.0, 0], [1, 3]]),
        "layer_0": jnp.array([[1.0, 1, 2], [0, 0, 6]]),
    }
    model = dataclasses.replace(
        sparse_model(), ffn_pattern=("moe", "moe"), pattern=("attention", "attention")
    )
    m = load_metrics(model, counts)
    rows = [[0.75, 0.75, 1.5], [2, 0, np.nan], [0, 0, 3], [0.5, 1.5, np.nan]]
    np.testing.assert_allclose(m["expert_load"], rows)
    assert m["load_max_over_mean"] == 3 and m["dead_experts"] == 3


def test_bias_rules_follow_their_formulas():
    error = jnp.array([0.5, 0.0, -2.0])
    np.testing.assert_allclose(
        router_state.sign_update(jnp.zeros(3), error, 0.01), [0.01, 0, -0.01]
    )
    bias, integral, last = jnp.zeros(3), jnp.zeros(3), jnp.zeros(3)
    total = np.zeros(3)
    for e in (error, 2 * error, -error):
        bias, integral, new = router_state.pid_update(integral, last, e, (0.1, 0.02, 0.5))
        total = total + np.asarray(e)
        np.testing.assert_allclose(
            bias, 0.1 * e + 0.02 * total + 0.5 * (e - last), rtol=1e-6, atol=1e-7
        )
        last = new


@pytest.mark.parametrize("rule", ["sign", "pid"])
def test_bias_rules_bring_loads_to_their_target(rule):
    """A fixed router that favors some experts: after 400 updates every load is near its target."""
    r = RouterConfig(scoring="sigmoid", bias_rule=rule, bias_rate=0.005, ffn_fraction=0.5)
    config = SparseMoEConfig(num_experts=4, copy_experts=4, experts_per_token=2, router=r)
    scores = jax.nn.sigmoid(
        jax.random.normal(jax.random.key(0), (2000, 8)) + jnp.linspace(-1, 1, 8)
    )
    target = router_state.target_load(config)
    np.testing.assert_allclose(target, [0.125] * 8)

    def step(carry, _):
        bias, integral, last = carry
        counts = count_places(jax.lax.top_k(scores + bias, 2)[1][None], 8)[0]
        error = router_state.load_error(counts, target)
        if rule == "sign":
            return (router_state.sign_update(bias, error, r.bias_rate), integral, last), error
        return router_state.pid_update(integral, last, error, r.pid_gains), error

    _, errors = jax.jit(lambda c: jax.lax.scan(step, c, length=400))((jnp.zeros(8),) * 3)
    assert np.abs(errors[0]).max() > 0.5 and np.abs(errors[-20:]).max() < 0.15


def test_temperature_is_annealed_from_dense_to_sparse():
    r = RouterConfig(temperature=4.0, final_temperature=0.25, anneal_steps=10)
    at = [float(router_state.temperature(r, jnp.int32(s))) for s in (0, 5, 10, 99)]
    assert at == pytest.approx([4.0, 1.0, 0.25, 0.25])


def routed(rule: dict, **values):
    """One layer of attention and sparse experts, with a state in its router."""
    ffn = SparseMoEConfig(num_experts=8, hidden=16, router=RouterConfig(**rule), **values)
    return plain(model__ffns=FrozenDict(moe=ffn), model__ffn_pattern=("moe",), train__batch_size=16)


def batches(i):
    return random_batch(i, rows=16)


RULE = dict(
    scoring="sigmoid", bias_rule="pid", temperature=2.0, final_temperature=1.0, anneal_steps=2
)


@pytest.fixture(scope="module")
def alone():
    return run_steps(routed(RULE), 3, batches, devices=jax.devices()[:1])


FACTORINGS = [
    pytest.param(
        dict(data=2, expert=2, tensor=2),
        "all_to_all",
        id="data x expert x tensor",
        marks=pytest.mark.slow,
    ),
    pytest.param(dict(fsdp=2, expert=4), "ring", id="fsdp x expert", marks=pytest.mark.slow),
    pytest.param(
        dict(data=2, fsdp=2, expert=2),
        "gather_weights",
        id="data x fsdp x expert",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("mesh, exchange", FACTORINGS)
def test_eight_devices_equal_one(mesh, exchange, alone):
    """Losses, gradient norms, loads, drop counts, and the state of the router, which starts where
    all are equal.
    """
    config = routed(RULE, exchange=exchange)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **mesh))
    _, state, log = run_steps(config, 3, batches)
    _, single, expected = alone
    for a, e in zip(log, expected):
        assert a.keys() == e.keys()
        for key in e:
            np.testing.assert_allclose(a[key], e[key], rtol=2e-4, err_msg=key)
    for (path, a), e in zip(
        jax.tree_util.tree_leaves_with_path(state.routers), jax.tree.leaves(single.routers)
    ):
        assert rel_rms(a, e) < 1e-4, jax.tree_util.keystr(path)


@pytest.mark.slow
def test_state_moves_with_counts_of_the_whole_batch(alone):
    """Temperature by step, bias by the loads of all micro-batches: two halves or one whole make no
    difference.
    """
    _, single, log = alone
    leaves = {path[-1].key: x for path, x in jax.tree_util.tree_leaves_with_path(single.routers)}
    assert leaves["temperature"] == 1.0 and np.abs(leaves["bias"]).min() > 0
    config = dataclasses.replace(
        routed(RULE), train=dataclasses.replace(routed(RULE).train, accumulation_steps=2)
    )
    _, halves, halved = run_steps(config, 1, batches, devices=jax.devices()[:1])
    np.testing.assert_array_equal(halved[0]["expert_load"], log[0]["expert_load"])
    assert halved[0]["router_z_loss"] == pytest.approx(log[0]["router_z_loss"], rel=1e-5)
    errors = [
        x
        for path, x in jax.tree_util.tree_leaves_with_path(halves.routers)
        if path[-1].key == "error"
    ]
    np.testing.assert_allclose(errors[0][0], 1.0 - log[0]["expert_load"][0], atol=1e-6)


def padded_batch(i):
    """Rows of unequal length, two of them empty."""
    batch = batches(i)
    length = np.array([0, 32, 5, 31, 17, 9, 3, 30] * 2)[:, None]
    is_token = np.arange(32) < length
    keep = lambda a: np.where(is_token, a, 0).astype(a.dtype)
    return jax.tree.map(keep, batch)


def gradient_of_step(parts, **losses):
    """Of one layer whose routers have some losses: gradients, metrics and counts."""
    config = routed({}, **losses)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, accumulation_steps=parts)
    )
    state = jax.eval_shape(lambda: init_state(config, optax.sgd(1.0), jax.random.key(0)))
    values = np.random.default_rng(0)
    state = jax.tree.map(lambda s: (0.3 * values.normal(size=s.shape)).astype(s.dtype), state)
    batch = jax.tree.map(jnp.asarray, padded_batch(0))
    run = jax.jit(lambda state: accumulated_gradients(config, state, batch))
    return jax.device_get(run(state))


@pytest.mark.parametrize(
    "losses",
    [
        dict(balance_loss=10.0, sequence_loss=5.0, z_loss=1.0),
        pytest.param(
            dict(balance_loss=10.0, z_loss=0.0, capacity_factor=0.5, copy_experts=2),
            marks=pytest.mark.slow,
        ),
        pytest.param(dict(balance_loss=0.0, z_loss=1.0), marks=pytest.mark.slow),
    ],
)
def test_micro_batches_make_no_difference_to_router_losses(losses):
    """Gradients and log of one batch of unequal rows: in one piece, and in eight of two rows."""
    whole, log, counts = gradient_of_step(1, **losses)
    assert log["aux_loss"] > 0.1
    grads, metrics, counts_of_parts = gradient_of_step(8, **losses)
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(whole)):
        assert rel_rms(a, e) < 1e-5, jax.tree_util.keystr(path)
    assert metrics.keys() == log.keys()
    for name in log:
        np.testing.assert_allclose(metrics[name], log[name], rtol=2e-5, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, counts_of_parts, counts)


def test_a_skipped_step_leaves_the_state_alone():
    poisoned = lambda i: batches(i).replace(loss_mask=np.full((16, 32), np.nan, np.float32))
    _, state, log = run_steps(routed(RULE), 1, poisoned, devices=jax.devices()[:1])
    leaves = {path[-1].key: x for path, x in jax.tree_util.tree_leaves_with_path(state.routers)}
    assert (
        log[0]["skipped_steps"] == 1 and leaves["temperature"] == 2.0 and not np.any(leaves["bias"])
    )


@pytest.mark.slow
def test_noise_is_new_every_step_and_the_same_on_any_mesh():
    """Straight-through Gumbel: the same batch twice is routed otherwise; eight devices draw what
    one draws.
    """
    config = routed(dict(selection="gumbel", renormalize=False))
    same = lambda i: batches(0)
    _, _, one = run_steps(config, 2, same, devices=jax.devices()[:1])
    _, _, eight = run_steps(config, 2, same)
    assert np.abs(one[0]["expert_load"] - one[1]["expert_load"]).max() > 0.01
    for a, e in zip(eight, one):
        np.testing.assert_allclose(a["expert_load"], e["expert_load"], atol=1e-6)
        assert a["loss"] == pytest.approx(e["loss"], rel=1e-4)
