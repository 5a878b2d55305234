"""Optimizers and rules of papers, against their formulas in float64 numpy."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gatedjax.config import OptimConfig
from gatedjax.errors import InputError
from gatedjax.training import optim_memory, optim_noise, optim_rules
from gatedjax.training.muon import Matrices, joined_matrices, split_matrices
from gatedjax.training.optim import make_optimizer, make_schedule
from gatedjax.training.optim_refined import refined

PLAIN = dict(warmup_steps=0, schedule="constant", clip_norm=0.0, weight_decay=0.0)
AXES = {"w": ("embed", "mlp"), "b": ("embed_act",)}
CURVATURE = {"w": np.array([[1.0, 4.0], [0.5, 2.0], [3.0, 0.1]]), "b": np.array([5.0, 0.3, 1.0])}


def quadratic(steps, config, axes=None, **sizes):
    """Steps of an optimizer on sum of c x^2 / 2, from x = 1: the parameters after each."""
    tx = make_optimizer(config, steps, axes or AXES, **sizes)
    params = {name: jnp.ones(c.shape) for name, c in CURVATURE.items()}
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = {name: CURVATURE[name].astype(np.float32) * x for name, x in params.items()}
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    history = []
    for _ in range(steps):
        params, state = step(params, state)
        history.append(params)
    return history


def test_memory_of_sgd():
    """The paper's formula, with inner products over all parameters."""
    lam, rate, most = 0.1, 0.2, 0.9
    curvature = np.concatenate([c.ravel() for c in CURVATURE.values()])
    x, d = np.ones(9), None
    betas = []
    for actual in quadratic(8, OptimConfig(name="am_msgd", lr=rate, **PLAIN)):
        g = curvature * x
        d = g if d is None else d
        apart = d - g
        beta = ((1 + lam) * g @ d - apart @ (g + lam * d)) / max(apart @ apart, 1e-30)
        betas.append(np.clip(beta, 0, most))
        d = ((betas[-1] + lam) * d + (1 - betas[-1]) * g) / (1 + lam)
        x = x - rate * d
        flat = np.concatenate([np.ravel(actual[name]) for name in CURVATURE])
        np.testing.assert_allclose(flat, x, rtol=1e-4, atol=1e-5)
    # Neither end alone.
    assert betas[0] != betas[-1]
    assert min(betas) < most


def dual(beta, g, d, p, u, lam):
    """What beta maximizes: the least value of the model's proximal step, over the rate."""
    held = (1 - beta) * g + beta * d + lam * p * d
    return beta * (g @ u) - 0.5 * held @ (held / (p * (1 + lam * p)))


def test_memory_maximizes_its_model():
    """beta is the top of a parabola, of Adam's preconditioner too; P = 1 is the SGD formula."""
    rng = np.random.default_rng(0)
    lam = optim_memory.LAMBDA
    found = set()
    for seed in range(6):
        g, d, u = rng.normal(size=(3, 5))
        p = np.exp(rng.normal(size=5)) if seed else np.ones(5)
        d = g + 0.5 * d if seed % 2 else d
        u = d if seed == 0 else u
        low, middle, high = (dual(b, g, d, p, u, lam) for b in (-1.0, 0.0, 1.0))
        top = 0.5 * (low - high) / (low - 2 * middle + high)
        if seed == 0:
            apart = d - g
            paper = ((1 + lam) * g @ d - apart @ (g + lam * d)) / (apart @ apart)
            np.testing.assert_allclose(top, paper, rtol=1e-9)
        memory, beta = optim_memory.adam_memory(*map(np.float32, (g, d, p, u)))
        expected = np.clip(top, 0, optim_memory.MOST_BETA_OF_ADAM)
        np.testing.assert_allclose(beta[0], expected, rtol=1e-3, atol=1e-5)
        held = ((1 - expected) * g + (expected + lam * p) * d) / (1 + lam * p)
        np.testing.assert_allclose(memory, held, rtol=2e-3, atol=1e-4)
        found.add(float(np.round(expected, 6)))
    assert len(found) > 2


def test_memory_of_adam():
    """The whole step, with weight decay and a rate that changes, tensor by tensor."""
    lam, most, b2, eps, decay = 0.1, 0.89, 0.9, 1e-3, 0.05
    config = OptimConfig(
        name="am_adamw",
        lr=0.1,
        beta2=b2,
        eps=eps,
        warmup_steps=3,
        schedule="linear",
        weight_decay=decay,
        clip_norm=0.0,
    )
    rates = [float(make_schedule(config, 6)(t)) for t in range(6)]
    state = {n: [np.ones(c.shape), 0, 0, 0, 1.0] for n, c in CURVATURE.items()}
    for t, actual in enumerate(quadratic(6, config)):
        for name, (x, d, v, u, product) in state.items():
            g = CURVATURE[name] * x
            v = b2 * v + (1 - b2) * g**2
            p = (1 - most * product) * (np.sqrt(v / (1 - b2 ** (t + 1))) + eps)
            u = u * (rates[t - 1] / rates[t] if t else 0)
            weight = 1 / (p * (1 + lam * p))
            apart = d - g
            top = np.sum(g * u) - np.sum(apart * weight * (g + lam * p * d))
            beta = np.clip(top / np.sum(apart * weight * apart), 0, most)
            d = ((1 - beta) * g + (beta + lam * p) * d) / (1 + lam * p)
            # Norms and biases do not decay.
            u = d / p + (decay if name == "w" else 0) * x
            state[name] = [x - rates[t] * u, d, v, u, product * beta]
            np.testing.assert_allclose(actual[name], state[name][0], rtol=2e-3, atol=1e-4)


def test_a_stack_of_tensors_has_a_beta_each():
    rng = np.random.default_rng(0)
    stack = rng.normal(size=(4, 2, 3, 5)).astype(np.float32)
    g, d, p, u = stack[0], stack[1], np.abs(stack[2]) + 0.1, stack[3]
    of_stack = jax.jit(optim_memory.adam_memory, static_argnums=4)
    _, betas = of_stack(g, d, p, u, (0,))
    assert betas.shape == (2, 1, 1)
    for i in range(2):
        _, alone = of_stack(g[i], d[i], p[i], u[i], ())
        np.testing.assert_allclose(betas[i].ravel(), alone.ravel(), rtol=1e-5)


HELD = Matrices((1,), (2, 3), "half")


def test_matrices_are_taken_apart_and_joined():
    x = np.arange(2 * 3 * 2 * 4.0).reshape(2, 3, 2, 4)
    own, gate = split_matrices(jnp.asarray(x), HELD)
    np.testing.assert_array_equal(own, x[..., :2].reshape(2, 3, 4))
    np.testing.assert_array_equal(gate, x[..., 2:].reshape(2, 3, 4))
    np.testing.assert_array_equal(joined_matrices([own, gate], x.shape, HELD), x)


@pytest.mark.slow
def test_noise_of_gradients_slows_matrices_down():
    """LANTON against Muon: the same where gradients do not change, otherwise times its factor, with
    nuclear norms by a decomposition.
    """
    rng = np.random.default_rng(0)
    axes = {
        "a": ("layers", "embed", "mlp"),
        "b": ("embed", "mlp"),
        "table": ("vocab", "embed_vocab"),
    }
    params = {"a": jnp.zeros((2, 4, 6)), "b": jnp.zeros((4, 3)), "table": jnp.zeros((5, 4))}
    steady = {name: rng.normal(size=p.shape) for name, p in params.items()}
    noise = {"a": np.array([0.0, 5.0])[:, None, None], "b": 1.0, "table": 0.0}
    alpha, b2, count = 2.0, 0.8, 4
    seen = []
    updates = {}
    for name in ("muon", "lanton"):
        config = OptimConfig(name=name, lr=1.0, beta2=b2, lanton_alpha=alpha, **PLAIN)
        tx = make_optimizer(config, 10, axes)
        state = tx.init(params)
        update = jax.jit(tx.update)
        draws = np.random.default_rng(1)
        for _ in range(count):
            grads = {n: g + noise[n] * draws.normal(size=g.shape) for n, g in steady.items()}
            grads = {n: g.astype(np.float32) for n, g in grads.items()}
            seen.append(grads)
            updates[name], state = update(grads, state, params)
    seen = seen[count:]
    h = {"a0": 0.0, "a1": 0.0, "b": 0.0}
    for before, after in itertools.pairwise(seen):
        apart = {n: after[n].astype(float) - before[n] for n in ("a", "b")}
        matrices = {"a0": apart["a"][0], "a1": apart["a"][1], "b": apart["b"]}
        for key, matrix in matrices.items():
            h[key] = b2 * h[key] + (1 - b2) * np.linalg.norm(matrix, "nuc") ** 2
    a = {key: alpha / math.sqrt(alpha**2 + x) for key, x in h.items()}
    factors = {key: math.sqrt(x / max(a.values())) for key, x in a.items()}
    assert factors["a0"] == 1 and factors["a1"] < 0.6
    by_matrix = {"a0": ("a", 0), "a1": ("a", 1), "b": ("b", slice(None))}
    for key, (name, index) in by_matrix.items():
        slowed = updates["lanton"][name][index]
        # Newton-Schulz's singular values are not all 1.
        expected = factors[key] * updates["muon"][name][index]
        np.testing.assert_allclose(slowed, expected, rtol=0.15, err_msg=key)
    np.testing.assert_array_equal(updates["lanton"]["table"], updates["muon"]["table"])


def test_factors_are_the_papers():
    h = {"x": (np.array([0.0, 3.0]),), "y": (np.array([8.0]), np.array([1e30]))}
    factors = optim_noise.noise_factors(h, alpha=1.0)
    np.testing.assert_allclose(factors["x"][0], [1.0, math.sqrt(0.5)], rtol=1e-6)
    np.testing.assert_allclose(factors["y"][0], math.sqrt(1 / 3), rtol=1e-6)
    assert 0 < float(factors["y"][1][0]) < 1e-7


def test_gradients_across_the_weights():
    rng = np.random.default_rng(0)
    w, g = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    actual = jax.jit(optim_rules.across, static_argnums=2)(g, w, (0,))
    for i in range(3):
        expected = g[i] - np.sum(w[i] * g[i]) / np.sum(w[i] ** 2) * w[i]
        np.testing.assert_allclose(actual[i], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(optim_rules.across(g, np.zeros_like(w)), g)
    # In the chain: of 1 . x^2 all of the gradient lies along the weights.
    config = OptimConfig(name="am_msgd", lr=0.1, perpendicular=True, **PLAIN)
    tx = make_optimizer(config, 3, {"w": ("embed", "mlp")})
    params = {"w": jnp.asarray(w[0], jnp.float32)}
    updates, _ = tx.update(params, tx.init(params), params)
    assert float(jnp.max(jnp.abs(updates["w"]))) < 1e-6


def closed_form(norms, power):
    """The loop of the paper's code, `find_closed_form_schedule`, over its largest value."""
    weights = np.asarray(norms, float) ** -power
    rates = [w * weights[t + 1 :].sum() for t, w in enumerate(weights)]
    return np.array(rates) / max(rates)


def test_refined_schedules():
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(refined(np.full(11, 3.0), 2.0), np.linspace(1, 0, 11), atol=1e-12)
    norms = rng.exponential(size=20) + 0.1
    for power in (1.0, 2.0):
        np.testing.assert_allclose(refined(norms, power, 0.0), closed_form(norms, power))
    # A median over 5 steps does not see one spike.
    spike = np.full(50, 2.0)
    spike[20] = 1000.0
    np.testing.assert_allclose(refined(spike, 2.0), np.linspace(1, 0, 50), atol=1e-12)
    with pytest.raises(InputError, match=r"norms: got \[0.0\], expected numbers above 0"):
        refined([1.0, 0.0], 2.0)


def test_a_schedule_is_refined_from_a_run(tmp_path):
    """A run of 40 steps, recorded every 4th and once again after a restart, refines one of 20."""
    norms = {step: 5.0 if step < 20 else 1.0 for step in range(4, 41, 4)}
    lines = [{"step": 8, "split": "train", "grad_norm": 99.0}]
    lines += [{"step": step, "split": "train", "grad_norm": norm} for step, norm in norms.items()]
    lines += [{"step": 40, "split": "validation", "loss": 1.0}]
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    values = dict(schedule="refined", refined_from=str(tmp_path), warmup_steps=0, lr=2.0)
    rates = np.array([float(make_schedule(OptimConfig(**values), 20)(t)) for t in range(20)])
    assert rates.max() == 2.0 and rates[-1] == 0.0
    # 1 / 25 of the weight at first, with medians on both sides of the change.
    assert rates[:7].max() < 0.1
    assert np.all(np.diff(rates[12:]) < 0)
    # With sums of absolute values it follows those, to the power 1.
    for line in lines:
        if "grad_norm" in line:
            line["grad_norm_l1"] = line["grad_norm"]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    of_adam = np.array([float(make_schedule(OptimConfig(**values), 20)(t)) for t in range(20)])
    assert rates[3] < of_adam[3] < 0.8


def test_rates_and_decays_by_width():
    """At twice the width: matrices half the rate and sqrt 2 of the decay; tables do not decay."""
    axes = {"w": ("embed", "mlp"), "table": ("vocab", "embed_vocab"), "b": ("embed_act",)}
    params = {"w": jnp.full((2, 2), 3.0), "table": jnp.ones((2, 2)), "b": jnp.ones(2)}
    values = dict(PLAIN, lr=0.1, weight_decay=0.5, eps=1e-12, base_width=64)
    values["lr_by_name"] = ("w -> 0.5",)
    tx = make_optimizer(OptimConfig(**values), 10, axes, width=128)
    updates, _ = jax.jit(lambda p: tx.update(p, tx.init(p), p))(params)
    # Adam's first step is the sign.
    decay = 0.5 * math.sqrt(2) * 3.0
    np.testing.assert_allclose(updates["w"], -0.1 * 0.5 * 0.5 * (1 + decay), rtol=1e-5)
    for name in ("table", "b"):
        np.testing.assert_allclose(updates[name], -0.1, rtol=1e-5)


def test_rates_by_batch():
    assert optim_rules.batch_factor("adamw", 32, 8) == 2.0
    assert optim_rules.batch_factor("am_msgd", 32, 8) == 4.0
    config = OptimConfig(name="am_msgd", lr=0.01, base_batch_size=8, **PLAIN)
    (moved,) = quadratic(1, config, batch_size=32)
    np.testing.assert_allclose(moved["b"], 1 - 0.04 * CURVATURE["b"], rtol=1e-5)


def test_probe_of_widths():
    """Matrices whose largest singular value follows the rule have the same probe at any width."""
    rng = np.random.default_rng(0)
    probes = []
    for width, rate, decay in [(16, 0.1, 0.1), (32, 0.05, 0.2)]:
        q, _ = np.linalg.qr(rng.normal(size=(width, width)))
        top = math.sqrt(rate / decay) * width**0.75
        probes.append(optim_rules.width_probe([(1.5 * top * q)[None]], rate, decay, width))
    np.testing.assert_allclose(probes, 1.5, rtol=1e-9)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"schedule": "refined", "warmup_steps": 0}, "refined_from: got '', expected a run dir"),
        ({"refined_from": "x"}, "refined_from: got 'x', expected '' with schedule 'cosine'"),
        ({"schedule": "refined", "refined_from": "x"}, "warmup_steps: got 20, expected 0 with"),
        ({"name": "lion", "base_width": 8}, "base_width: got 8, expected 0 with lion"),
        ({"lanton_alpha": 0.0}, "lanton_alpha: got 0.0, expected above 0"),
    ],
)
def test_bad_optimizers_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        OptimConfig(**values)


def test_a_run_without_norms_is_refused(tmp_path):
    values = dict(schedule="refined", warmup_steps=0)
    with pytest.raises(InputError, match=r"refined_from: got '.*nowhere', expected a run dir"):
        make_schedule(OptimConfig(**values, refined_from=str(tmp_path / "nowhere")), 9)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n')
    with pytest.raises(InputError, match="expected a run with two records of grad_norm"):
        make_schedule(OptimConfig(**values, refined_from=str(tmp_path)), 9)
