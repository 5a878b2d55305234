"""Gated KalmaNet against its recurrence in float64 numpy, one token after the other, with
numpy.linalg.solve in place of the iteration.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_gradients, rel_rms
from random_parameters import random_parameters

from gatedjax.config import KalmaNetConfig
from gatedjax.layers import KalmaNet
from gatedjax.layers.ridge_scan import chebyshev, ridge_scan
from gatedjax.layers.token_info import TokenInfo

B, T, H, K, V = 2, 11, 2, 4, 3
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


GIVEN = {
    "q": normal(B, T, H, K),
    "k": normal(B, T, H, K),
    "v": normal(B, T, H, V),
    "log_decay": -np.abs(0.3 * normal(B, T, H)),
    "alpha": 1 / (1 + np.exp(-normal(B, T, H))),
    "state": np.concatenate([np.full((B, H, K, K), 0.5) + np.eye(K), normal(B, H, K, V)], -1),
}


def recurrence(q, k, v, log_decay, alpha, state, ridge=0.02):
    """(o, state): [H | U] token by token."""
    o = np.zeros(v.shape)
    for t in range(q.shape[1]):
        written = np.concatenate([k[:, t], v[:, t]], -1)
        state = np.exp(log_decay[:, t])[..., None, None] * state
        state = state + k[:, t][..., None] * written[..., None, :]
        gram = state[..., :K]
        size = np.sqrt((gram**2).sum((-2, -1)))[..., None, None]
        x = np.linalg.solve(gram + ridge * size * np.eye(K), q[:, t][..., None])[..., 0]
        read = q[:, t] + alpha[:, t][..., None] * (x - q[:, t])
        o[:, t] = np.einsum("bhk,bhkv->bhv", read, state[..., K:])
    return K**-0.5 * o, state


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def symmetric(given):
    """The first state's H is symmetric, as every sum of k k is."""
    state = given["state"]
    gram = state[..., :K]
    gram = (gram + gram.swapaxes(-1, -2)) / 2
    joined = jnp.concatenate if isinstance(state, jax.Array) else np.concatenate
    return given | {"state": joined([gram, state[..., K:]], -1)}


def test_equals_the_recurrence():
    """Chunks that do not divide the length, a first state; enough iterations for float32."""
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=(B, T, H, V)), rng.normal(size=(B, H, K, K + V))]

    def loss(given):
        given = symmetric(given)
        state = given.pop("state")
        outputs = ridge_scan(**given, initial_state=state, iterations=90, chunk_size=4)
        return sum((o * w).sum() for o, w in zip(outputs, weights)), outputs

    given = jax.tree.map(jnp.asarray, GIVEN)
    gradient, outputs = jax.jit(jax.grad(loss, has_aux=True))(given)
    expected = recurrence(**float64(GIVEN))
    for found, right in zip(outputs, expected):
        assert rel_rms(found, right) < 2e-5
    # The differences of the whole are in float64, so gradients of float32 are what errs.
    check_gradients(
        lambda g: sum((o * w).sum() for o, w in zip(recurrence(**symmetric(g)), weights)),
        GIVEN,
        gradient,
    )


def test_chebyshev_is_as_near_as_published():
    """30 iterations at a condition of 51: an error of some 4e-4 of the worst right side."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(24, 24)))[0]
    matrix = basis * np.linspace(0.02, 1.02, 24) @ basis.T
    right = rng.normal(size=24)
    exact = np.linalg.solve(matrix, right)
    for iterations, largest in ((10, 0.3), (30, 1e-3), (60, 1e-4)):
        x = chebyshev(
            lambda x: matrix.astype(np.float32) @ x,
            jnp.asarray(right, jnp.float32),
            low=0.02,
            high=1.02,
            iterations=iterations,
        )
        assert rel_rms(x, exact) < largest


@pytest.mark.slow
def test_layer_decodes_and_keeps_documents_apart():
    config = KalmaNetConfig(num_heads=2, key_dim=4, value_dim=6, chunk_size=4)
    layer = KalmaNet(config, 1e-5, 0.4, jnp.float32)
    x = jnp.asarray(normal(B, T, 8))
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    params = random_parameters(layer, x, TokenInfo(positions))
    run = jax.jit(functools.partial(layer.apply, {"params": params}, method="with_cache"))
    whole, _ = run(x, TokenInfo(positions))

    y, cache = run(x[:, :6], TokenInfo(positions[:, :6]), layer.init_cache(B, T))
    parts = [y]
    for t in range(6, T):
        y, cache = run(x[:, t : t + 1], TokenInfo(positions[:, t : t + 1]), cache)
        parts.append(y)
    assert rel_rms(jnp.concatenate(parts, 1), whole) < 1e-4

    ids = jnp.asarray([[1] * 5 + [2] * 6] * B)
    packed, _ = run(x, TokenInfo(positions, ids))
    alone, _ = run(x[:, 5:], TokenInfo(positions[:, :6]))
    assert rel_rms(packed[:, :5], whole[:, :5]) < 1e-4
    assert rel_rms(packed[:, 5:], alone) < 1e-4

    # A prompt that ends in padding leaves the state of its last token.
    padded = jnp.where(jnp.arange(T) < 6, 1, 0)[None].repeat(B, 0)
    info = TokenInfo(positions, padded)
    _, cache = run(x, info, layer.init_cache(B, T))
    y, _ = run(x[:, 6:7], TokenInfo(positions[:, 6:7]), cache)
    assert rel_rms(y, whole[:, 6:7]) < 1e-4
