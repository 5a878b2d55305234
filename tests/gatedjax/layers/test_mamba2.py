"""Mamba-2 against its recurrence in float64 numpy, one token after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms, slow

from gatedjax.config import Mamba2Config
from gatedjax.errors import InputError
from gatedjax.layers import Mamba2
from gatedjax.layers.token_info import TokenInfo

B, T, M = 2, 9, 16
X = np.random.default_rng(1).normal(size=(B, T, M)).astype(np.float32)
BASE = dict(num_heads=4, head_dim=6, state_dim=5, chunk_size=4)
VARIANTS = {
    "one group": {},
    "two groups, limits": dict(
        num_groups=2, min_step_size=0.02, max_step_size=0.2, conv_bias=False
    ),
}


@functools.cache
def made(name):
    config = Mamba2Config(**BASE | VARIANTS[name])
    module = Mamba2(config, 1e-5, 0.4, jnp.float32)
    params = jax.jit(module.init)(jax.random.key(0), X[:, :2])["params"]
    return module, jax.tree.map(
        lambda p: p + 0.2 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )


@functools.cache
def jitted(module):
    return jax.jit(functools.partial(module.apply, method="with_cache"))


def call(name, x=X, cache=None, start=0, segment_ids=None):
    module, params = made(name)
    positions = jnp.broadcast_to(start + jnp.arange(x.shape[1]), x.shape[:2])
    return jitted(module)({"params": params}, x, TokenInfo(positions, segment_ids), cache)


def silu(y):
    return y / (1 + np.exp(-y))


def float64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def expected(c: Mamba2Config, params, x):
    p, x = float64(params), np.asarray(x, np.float64)
    project = lambda name: np.tensordot(x, p[name]["kernel"], 1)
    z, dt = project("output_gate"), project("dt")
    inputs = [project(name) for name in ("value", "key", "query")]
    flat = np.concatenate([y.reshape(*x.shape[:2], -1) for y in inputs], -1)
    width = len(p["conv"])
    padded = np.pad(flat, ((0, 0), (width - 1, 0), (0, 0)))
    mixed = sum(padded[:, i : i + x.shape[1]] * p["conv"][i] for i in range(width))
    mixed = silu(mixed + p["conv_bias"] if c.conv_bias else mixed)
    ends = np.cumsum([y[0, 0].size for y in inputs])[:-1]
    xs, b, c_ = (part.reshape(y.shape) for part, y in zip(np.split(mixed, ends, -1), inputs))
    dt = np.clip(np.logaddexp(0, dt + p["dt_bias"]), c.min_step_size, c.max_step_size)
    y = np.zeros_like(xs)
    per_group = c.num_heads // c.num_groups
    for row in range(x.shape[0]):
        for h in range(c.num_heads):
            state = np.zeros((c.head_dim, c.state_dim))
            for t in range(x.shape[1]):
                at, group = (row, t, h), (row, t, h // per_group)
                state = np.exp(-np.exp(p["a_log"][h]) * dt[at]) * state
                state = state + dt[at] * np.outer(xs[at], b[group])
                y[at] = state @ c_[group] + p["skip"][h] * xs[at]
    y = y * silu(z)
    groups = y.reshape(*x.shape[:2], c.num_groups, -1)
    groups = groups / np.sqrt((groups**2).mean(-1, keepdims=True) + 1e-5)
    y = groups.reshape(y.shape) * p["norm_scale"]
    return np.tensordot(y, p["out"]["kernel"], 2)


@pytest.mark.parametrize("name", ["two groups, limits", slow("one group")])
def test_equals_the_recurrence_and_its_gradients_equal_differences(name):
    """Of every parameter and the input, along one direction each."""
    module, params = made(name)
    weight = np.random.default_rng(2).normal(size=X.shape)
    given = {"params": params, "x": jnp.asarray(X)}

    def loss(given):
        y = module.apply({"params": given["params"]}, given["x"])
        return jnp.sum(y * weight), y

    gradient, y = jax.jit(jax.grad(loss, has_aux=True))(given)
    assert rel_rms(y, expected(module.config, params, X)) < 1e-5
    leaves, tree = jax.tree.flatten(float64(given))
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(given)]
    for i, found in enumerate(jax.tree.leaves(gradient)):
        direction = np.random.default_rng(i).normal(size=leaves[i].shape)

        def moved(step, i=i, direction=direction):
            changed = [*leaves]
            changed[i] = leaves[i] + step * direction
            at = jax.tree.unflatten(tree, changed)
            return (expected(module.config, at["params"], at["x"]) * weight).sum()

        slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
        size = np.sqrt((np.asarray(found, np.float64) ** 2).sum() * direction.size)
        error = abs((np.asarray(found, np.float64) * direction).sum() - slope)
        assert error < 2e-5 * size + 1e-6, names[i]


def test_documents_and_decoding_equal_each_alone():
    name = "two groups, limits"
    module, params = made(name)
    whole = expected(module.config, params, X)
    y, _ = call(name, segment_ids=jnp.asarray([[1] * 4 + [2] * 5] * B))
    assert rel_rms(y[:, :4], whole[:, :4]) < 1e-5
    assert rel_rms(y[:, 4:], expected(module.config, params, X[:, 4:])) < 1e-5
    y, cache = call(name, X[:, :6], module.init_cache(B, T))
    parts = [y]
    for t in range(6, T):
        y, cache = call(name, X[:, t : t + 1], cache, t)
        parts.append(y)
    assert rel_rms(np.concatenate(parts, 1), whole) < 1e-5


def test_published_starts():
    config = Mamba2Config(num_heads=64, head_dim=4)
    params = jax.jit(Mamba2(config).init)(jax.random.key(0), X[:, :2])["params"]
    rate, dt = np.exp(params["a_log"]), np.logaddexp(0, params["dt_bias"])
    assert 1 <= rate.min() < 4 and 12 < rate.max() <= 16
    assert 1e-3 <= dt.min() < 2e-3 and 0.05 < dt.max() <= 0.1
    assert (params["skip"] == 1).all() and (params["norm_scale"] == 1).all()
    assert 0.4 < abs(params["conv_bias"]).max() <= 0.5


BAD = {
    "num_groups: got 3": dict(num_heads=4, num_groups=3),
    "min_step_size: got 0.5": dict(min_step_size=0.5, max_step_size=0.25),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_values_are_named(message):
    with pytest.raises(InputError) as error:
        Mamba2Config(**BAD[message])
    assert str(error.value).startswith(message)
