"""What is built on attention to other keys: GPSA, Hopfield networks, gated prefixes, block gates.

Each against its paper's formula in float64 numpy, values and gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_gradients, rel_rms, slow

from gatedjax.config import GatedAttentionConfig
from gatedjax.errors import InputError
from gatedjax.layers import GatedAttention, TokenInfo
from gatedjax.layers.added_losses import ADDED_LOSSES
from gatedjax.layers.block_gate import (
    BlockGate,
    block_attention_map,
    block_gate_loss,
    blocks_above,
    top_blocks,
)
from gatedjax.layers.gpsa import (
    GatedPositionalSelfAttention,
    gated_positional_attention,
    local_weights,
    positional_queries_and_keys,
)
from gatedjax.layers.hopfield import (
    Hopfield,
    HopfieldLookup,
    HopfieldPooling,
    associate,
    retrieve,
)
from gatedjax.layers.prefix import GatedPrefix, prefix_attention
from kernels_pallas.attention import attention
from kernels_pallas.ops import qr_attention, sinkhorn_attention


def softmax(s):
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def draw(seed=0, **shapes):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def compare(f, formula, arrays):
    """`f(**arrays)` against numpy's `formula`, and the gradient of a weighted sum of it."""
    want = formula(**arrays)
    cotangent = np.random.default_rng(9).normal(size=want.shape)
    with jax.enable_x64(True):
        given = {name: jnp.asarray(x) for name, x in arrays.items()}

        def weighted(given):
            y = f(**given)
            return jnp.sum(y * cotangent), y

        run = jax.jit(jax.value_and_grad(weighted, has_aux=True))
        (_, got), gradient = run(given)
        assert rel_rms(got, want) < 1e-12
        check_gradients(lambda a: (formula(**a) * cotangent).sum(), arrays, gradient)


# --- GPSA

GRID = (3, 4)


def gpsa_formula(q, k, v, weights, gate):
    """With the table of all pairs of patches, as the paper's code has it."""
    y, x = np.divmod(np.arange(GRID[0] * GRID[1]), GRID[1])
    dx, dy = (c[None, :] - c[:, None] for c in (x, y))
    table = np.stack([dx, dy, dx**2 + dy**2], axis=-1)
    by_content = softmax(np.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5)
    by_position = softmax(np.einsum("tsn,hn->hts", table, weights))[None]
    g = (1 / (1 + np.exp(-gate)))[:, None, None]
    mixed = (1 - g) * by_content + g * by_position
    mixed = mixed / mixed.sum(-1, keepdims=True)
    return np.einsum("bhts,bshv->bthv", mixed, v)


def test_positions_as_queries_and_keys():
    """Their products are the table's, but for a number of every row."""
    weights = draw(w=(2, 3))["w"].astype(np.float32)
    queries, keys = positional_queries_and_keys(jnp.asarray(weights), GRID)
    products = np.einsum("thn,sn->hts", queries[0], keys[0, :, 0])
    y, x = np.divmod(np.arange(12), 4)
    dx, dy = (c[None, :] - c[:, None] for c in (x, y))
    table = np.einsum("tsn,hn->hts", np.stack([dx, dy, dx**2 + dy**2], -1), weights)
    rest = products - table
    assert np.abs(rest - rest[..., :1]).max() < 1e-4


@pytest.mark.slow
def test_gpsa():
    arrays = draw(q=(2, 12, 4, 5), k=(2, 12, 4, 5), v=(2, 12, 4, 3), weights=(4, 3), gate=(4,))
    compare(functools.partial(gated_positional_attention, grid=GRID), gpsa_formula, arrays)


def test_local_heads_look_at_their_place():
    """9 heads, one for every neighbor of a patch; with an even side half steps."""
    weights = local_weights(9, locality=3.0)
    table = np.array([[dx, dy, dx**2 + dy**2] for dy in (-1, 0, 1) for dx in (-1, 0, 1)])
    assert (np.argmax(weights @ table.T, axis=1) == np.arange(9)).all()
    np.testing.assert_array_equal(local_weights(4, 1.0)[0], [-1, -1, -1])
    assert not local_weights(5, 1.0)[4].any()


def test_gpsa_layer_is_checked_and_starts_local():
    layer = GatedPositionalSelfAttention(num_heads=4, grid=GRID)
    params = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 12, 8)))["params"]
    assert params["positions"].shape == (4, 3) and params["gate"].shape == (4,)
    with pytest.raises(InputError, match=r"grid: got \(3, 4\), expected 11 patches, as in q"):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 11, 8)))
    with pytest.raises(InputError, match="num_heads: got 4, expected a divisor of the width 6"):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 12, 6)))


# --- Hopfield networks


def hopfield_formula(states, patterns, values, beta=0.7, steps=3):
    group = states.shape[2] // patterns.shape[2]
    patterns, values = (np.repeat(x, group, axis=2) for x in (patterns, values))

    def read(states, values):
        weights = softmax(beta * np.einsum("bthk,bshk->bhts", states, patterns))
        return np.einsum("bhts,bshv->bthv", weights, values)

    for _ in range(steps):
        states = read(states, patterns)
    return read(states, values)


@pytest.mark.slow
def test_association_after_three_steps():
    arrays = draw(states=(2, 5, 4, 6), patterns=(2, 9, 2, 6), values=(2, 9, 2, 3))
    compare(
        functools.partial(associate, beta=0.7, steps=3, tolerance=0.0), hopfield_formula, arrays
    )


@pytest.mark.slow
def test_retrieval():
    """64 patterns in 32 channels come back from noise in one step; at a small beta all states end
    in one point between the patterns; and a head that stands still stays.
    """
    rng = np.random.default_rng(0)
    patterns = jnp.asarray(rng.choice([-1.0, 1.0], size=(1, 64, 1, 32)), jnp.float32)
    noisy = patterns + 0.4 * rng.normal(size=patterns.shape).astype(np.float32)
    run = jax.jit(functools.partial(retrieve, tolerance=1e-4), static_argnames=("beta", "steps"))
    found = run(noisy, patterns, beta=1.0, steps=1)
    assert np.abs(found - patterns).max() < 1e-2 < np.abs(noisy - patterns).max()
    fixed = run(noisy, patterns, beta=1.0, steps=8)
    again = run(fixed, patterns, beta=1.0, steps=1)
    assert np.sqrt(((again - fixed) ** 2).sum(-1)).max() <= 1e-4
    metastable = np.asarray(run(noisy, patterns, beta=0.02, steps=40))
    mean = np.asarray(patterns).mean(1, keepdims=True)
    assert np.abs(metastable - metastable[:, :1]).max() < 1e-3
    assert np.abs(metastable - mean).max() < 0.5 < np.abs(patterns - mean).max()


@pytest.mark.slow
def test_a_head_that_stands_still_takes_no_more_steps():
    """With a tolerance above every step the first one is the last."""
    arrays = {name: jnp.asarray(x) for name, x in draw(s=(1, 2, 1, 3), p=(1, 4, 1, 3)).items()}
    run = functools.partial(retrieve, arrays["s"], arrays["p"], beta=1.0)
    one = run(steps=1)
    np.testing.assert_array_equal(run(steps=3, tolerance=100.0), one)
    assert not np.allclose(run(steps=3), one)


def test_hopfield_layers():
    """Shapes and names: an association, pooling by learned states, a lookup in learned patterns."""
    association = Hopfield(num_heads=2, head_dim=4, steps=2)
    x, stored = jnp.zeros((3, 5, 8)), jnp.zeros((3, 7, 6))

    def shapes(layer, *inputs):
        y, params = jax.eval_shape(
            lambda *a: layer.init_with_output(jax.random.key(0), *a), *inputs
        )
        return y.shape, jax.tree.map(jnp.shape, params["params"])

    shape, params = shapes(association, x, stored)
    assert shape == x.shape
    assert set(params) == {"state_norm", "state", "pattern_norm", "pattern"} | {
        "value_norm",
        "value",
        "out",
    }
    shape, params = shapes(HopfieldPooling(association, num_states=2), x)
    assert shape == (3, 2, 8) and params["states"] == (2, 8)
    shape, params = shapes(HopfieldLookup(association, num_patterns=9), x)
    assert shape == x.shape and params["patterns"] == (9, 8)


# --- NoRGa


def prefix_formula(q, k, v, prefix_k, prefix_v, alpha, tau):
    """One softmax over prefix and tokens, causal among the tokens."""
    B, T, H, K = q.shape
    group = H // k.shape[2]
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    of_prefix = (np.repeat(x, group, axis=1) for x in (prefix_k, prefix_v))
    prefix_k, prefix_v = (np.broadcast_to(x, (B, *x.shape)) for x in of_prefix)
    a = np.einsum("bthk,bshk->bhts", q, prefix_k) * K**-0.5
    s = np.einsum("bthk,bshk->bhts", q, k) * K**-0.5
    s = np.where(np.tri(T, dtype=bool), s, -np.inf)
    weights = softmax(np.concatenate([a + alpha * np.tanh(tau * a), s], axis=-1))
    return np.einsum("bhts,bshv->bthv", weights, np.concatenate([prefix_v, v], axis=1))


@pytest.mark.slow
def test_gated_prefix():
    arrays = draw(
        q=(2, 5, 4, 6),
        k=(2, 5, 2, 6),
        v=(2, 5, 2, 3),
        prefix_k=(3, 2, 6),
        prefix_v=(3, 2, 3),
        alpha=(),
        tau=(),
    )
    compare(prefix_attention, prefix_formula, arrays)


def test_gated_prefix_starts_as_published():
    q, k = jnp.zeros((1, 5, 4, 6)), jnp.zeros((1, 5, 2, 6))
    params = jax.eval_shape(GatedPrefix(length=3).init, jax.random.key(0), q, k, k)["params"]
    assert {n: x.shape for n, x in params.items()} == {
        "keys": (3, 2, 6),
        "values": (3, 2, 6),
        "alpha": (),
        "tau": (),
    }


# --- SeerAttention


def gate_formula(q, k, of_queries, of_keys, causal=True):
    """Log-probabilities, block by block, token by token."""
    B, T, H, _ = q.shape
    D = of_queries.shape[-1]
    N = -(-T // 64)
    frequencies = 10_000.0 ** -(np.arange(0, D, 2) / D)

    def rotated(x, position):
        angle = position * frequencies
        left, right = x[: D // 2], x[D // 2 :]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([left * cos - right * sin, right * cos + left * sin])

    logits = np.full((B, H, N, N), -np.inf)
    for b, h, i in np.ndindex(B, H, N):
        hk = h * k.shape[2] // H
        query = q[b, i * 64 : (i + 1) * 64, h].mean(0) @ of_queries[h]
        for j in range(i + 1 if causal else N):
            tokens = k[b, j * 64 : (j + 1) * 64, hk]
            pooled = np.concatenate([tokens.max(0), tokens.min(0), tokens.mean(0)])
            key = rotated(pooled @ of_keys[hk], 64 * j)
            logits[b, h, i, j] = rotated(query, 64 * i) @ key * D**-0.5
    with np.errstate(divide="ignore"):
        return np.log(softmax(logits))


def map_formula(q, k):
    B, T, H, K = q.shape
    k = np.repeat(k, H // k.shape[2], axis=2)
    s = np.einsum("bthk,bshk->bhts", q, k) * K**-0.5
    weights = softmax(np.where(np.tri(T, dtype=bool), s, -np.inf))
    N = -(-T // 64)
    largest = np.zeros((B, H, N, N))
    for i, j in np.ndindex(N, N):
        block = weights[:, :, i * 64 : (i + 1) * 64, j * 64 : (j + 1) * 64]
        largest[:, :, i, j] = block.max((2, 3))
    return largest / largest.sum(-1, keepdims=True)


@pytest.mark.slow
def test_block_gate_and_its_loss():
    """The gate, its target and their divergence; the gradient reaches the gate alone."""
    arrays = draw(q=(1, 150, 4, 5), k=(1, 150, 2, 5))
    matrices = draw(1, query=(4, 5, 8), key=(2, 15, 8))
    gate = BlockGate(dim=8)

    def loss(matrices, q, k):
        log_gate = gate.apply({"params": matrices}, q, k)
        target = block_attention_map(q, k)
        return block_gate_loss(log_gate, target), (log_gate, target)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    with jax.enable_x64(True):
        (value, (log_gate, target)), (gradient, dq, dk) = run(matrices, arrays["q"], arrays["k"])
        value, log_gate, target = (np.asarray(x) for x in (value, log_gate, target))
    want = gate_formula(arrays["q"], arrays["k"], matrices["query"], matrices["key"])
    seen = np.isfinite(want)
    # Rotations are float32.
    assert np.abs(log_gate[seen] - want[seen]).max() < 1e-5
    assert (log_gate[~seen] == -np.inf).all()
    assert rel_rms(target, map_formula(**arrays)) < 1e-12
    assert not np.asarray(dq).any() and not np.asarray(dk).any()

    def divergence(matrices):
        log_gate = gate_formula(arrays["q"], arrays["k"], matrices["query"], matrices["key"])
        ratio = np.where(seen, np.log(np.where(seen, target, 1)) - log_gate, 0)
        return (target * ratio).sum(-1).mean()

    assert abs(value - divergence(matrices)) < 1e-6
    check_gradients(divergence, matrices, gradient)


def test_choice_of_blocks():
    log_gate = jnp.log(jnp.array([[[[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.5, 0.3, 0.2]]]]))
    np.testing.assert_array_equal(
        blocks_above(log_gate, 0.25)[0, 0], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    )
    np.testing.assert_array_equal(top_blocks(log_gate, 1)[0, 0], np.eye(3))
    np.testing.assert_array_equal(top_blocks(log_gate, 2)[0, 0], [[1, 0, 0], [1, 1, 0], [1, 0, 1]])
    np.testing.assert_array_equal(top_blocks(log_gate, 9)[0, 0], np.tri(3))


@pytest.mark.slow
def test_a_trained_gate_keeps_what_attention_needs():
    """After some steps of training its top half of the blocks holds more weight than a fresh one's,
    and attention under that mask is nearer to the whole.
    """
    rng = np.random.default_rng(0)
    shape = (1, 512, 2, 16)
    # Blocks that look for one another: each has a direction, each query one of an earlier block.
    directions = rng.normal(size=(8, 16))
    wanted = [rng.integers(0, i + 1) for i in range(8)]
    k = directions.repeat(64, 0)[None, :, None] + 0.3 * rng.normal(size=shape)
    q = directions[wanted].repeat(64, 0)[None, :, None] + 0.3 * rng.normal(size=shape)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, rng.normal(size=shape)))
    gate = BlockGate(dim=16)
    fresh = gate.init(jax.random.key(0), q, k)
    target = block_attention_map(q, k)

    @jax.jit
    def step(params):
        gradient = jax.grad(lambda p: block_gate_loss(gate.apply(p, q, k), target))(params)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient)

    params = fresh
    for _ in range(100):
        params = step(params)
    whole = attention(q, k, v)

    @jax.jit
    def masked(params):
        return attention(q, k, v, block_mask=top_blocks(gate.apply(params, q, k), 2))

    def error(params):
        return rel_rms(masked(params), whole)

    assert error(params) < 0.5 * error(fresh)


# --- As options of the attention layer

PLAIN = dict(
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    gate_granularity="headwise",
    qk_norm=False,
    rope_fraction=0.0,
)


def layer_of(T, **options):
    """A layer with random parameters, its input, and the parts that its formula is made of."""
    layer = GatedAttention(GatedAttentionConfig(**PLAIN, **options), init_std=0.5)
    x = jnp.asarray(draw(x=(2, T, 8))["x"], jnp.float32)
    params = jax.jit(layer.init)(jax.random.key(0), x)["params"]
    parts = {}
    for name in ("query", "key", "value", "gate"):
        p = params[name]["projection"] if name == "gate" else params[name]
        parts[name] = np.einsum("btm,mhd->bthd", x, p["kernel"])
    return layer, params, x, parts


def output(params, parts, o):
    return np.einsum("bthd,hdm->btm", o / (1 + np.exp(-parts["gate"])), params["out"]["kernel"])


@pytest.mark.slow
def test_a_layer_with_a_prefix_is_the_formula_and_decodes():
    layer, params, x, parts = layer_of(5, prefix=3)
    params["prefix"] |= {"alpha": jnp.float32(0.7), "tau": jnp.float32(1.3)}
    p = params["prefix"]
    o = prefix_formula(
        parts["query"], parts["key"], parts["value"], p["keys"], p["values"], 0.7, 1.3
    )
    whole = jax.jit(layer.apply)({"params": params}, x)
    assert rel_rms(whole, output(params, parts, o)) < 1e-5
    positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
    cache = layer.init_cache(2, 5)
    for piece in (slice(0, 3), slice(3, 4), slice(4, 5)):
        info = TokenInfo(positions[:, piece])
        y, cache = layer.apply({"params": params}, x[:, piece], info, cache, method="with_cache")
        assert rel_rms(y, whole[:, piece]) < 1e-5


@pytest.mark.parametrize(
    "normalizer, op", [slow("sinkhorn", sinkhorn_attention), ("qr", qr_attention)]
)
def test_a_doubly_stochastic_layer(normalizer, op):
    layer, params, x, parts = layer_of(5, normalizer=normalizer, causal=False)
    o = op(*(jnp.asarray(parts[name]) for name in ("query", "key", "value")))
    got = jax.jit(layer.apply)({"params": params}, x)
    assert rel_rms(got, output(params, parts, np.asarray(o))) < 1e-4
    with pytest.raises(ValueError, match="cache: got one with causal=False, expected none"):
        layer.init_cache(2, 5)


@pytest.mark.slow
def test_a_layer_with_a_block_gate():
    """The mask is the gate's; the loss is the divergence from the map, documents apart."""
    layer, params, x, parts = layer_of(150, block_gate=8, block_gate_top=2)
    q, k, v = (jnp.asarray(parts[name]) for name in ("query", "key", "value"))
    log_gate = BlockGate(8).apply({"params": params["block_gate"]}, q, k)
    mask = top_blocks(log_gate, 2)
    assert not np.asarray(mask[..., 2, :]).all()
    got = jax.jit(layer.apply)({"params": params}, x)
    o = np.asarray(attention(q, k, v, block_mask=mask))
    assert rel_rms(got, output(params, parts, o)) < 1e-5

    segment_ids = jnp.asarray([[1] * 70 + [2] * 80, [1] * 60 + [0] * 90])
    info = TokenInfo(jnp.zeros((2, 150), jnp.int32), segment_ids)
    _, sown = layer.apply({"params": params}, x, info, mutable=[ADDED_LOSSES])
    # The map by hand: queries of a document see its keys.
    is_same = (segment_ids[:, :, None] == segment_ids[:, None]) & np.tri(150, dtype=bool)
    s = np.einsum("bthk,bshk->bhts", q, np.repeat(k, 2, axis=2)) * 6**-0.5
    weights = softmax(np.where(is_same[:, None], s, -np.inf))
    weights = np.pad(weights, ((0, 0), (0, 0), (0, 42), (0, 42)))
    target = weights.reshape(2, 4, 3, 64, 3, 64).max((3, 5))
    target = target / target.sum(-1, keepdims=True)
    ratio = np.where(target > 0, np.log(np.where(target > 0, target, 1)) - log_gate, 0)
    divergence = (target * ratio).sum(-1)
    # Of the second row only the first block holds tokens.
    wanted = 10 * (divergence[0].sum() + divergence[1, :, 0].sum()) / (4 * 4)
    assert np.isclose(sown[ADDED_LOSSES]["block_gate_loss"][0], wanted, rtol=1e-4)
