"""Masks select: what a query does not see may be NaN or infinite, and changes no bit of its output
and gradients; what it sees shows.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import FLOAT32, assert_close, cast, draw, truth, value_and_gradients
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels_pallas.attention import NORMALIZERS, attention_sharded, tile
from kernels_pallas.attention.documents import document_numbers
from kernels_pallas.ops import attention, attention_step

TOKENS = 40
# The first document ends here.
CUT = 16
IDS = np.repeat([[7, 3]], [CUT, TOKENS - CUT], axis=1).astype(np.int32)
MASKS = {
    "causal": {},
    "window": dict(window=5),
    "documents": dict(segment_ids=IDS, logits_soft_cap=3.0),
    "documents, not causal": dict(segment_ids=IDS, causal=False),
}
FLOATS = ("q", "k", "v", "gate_logits", "dy")


def seen_pairs(segment_ids=None, causal=True, window=None, **_):
    i, j = np.mgrid[:TOKENS, :TOKENS]
    seen = np.abs(i - j) < (window or TOKENS)
    if causal:
        seen &= j <= i
    if segment_ids is not None:
        seen &= segment_ids[0][:, None] == segment_ids[0][None]
    return seen


@cache
def arrays_of(backend):
    arrays, _ = draw(B=1, T=TOKENS, H=2, Hk=1, K=8, V=8, gate="element-wise")
    arrays["dy"] = np.random.default_rng(5).normal(size=arrays["q"].shape)
    return {name: np.asarray(x, np.float32) for name, x in arrays.items()}


@cache
def compiled(backend, mask, normalizer):
    interpret = backend == "tpu"

    def both(arrays):
        def y(floats):
            q, k, v, gate_logits = floats
            return attention(
                q,
                k,
                v,
                gate_logits=gate_logits,
                normalizer=normalizer,
                implementation=backend,
                interpret=interpret,
                **MASKS[mask],
            )

        *floats, dy = (arrays[name] for name in FLOATS)
        y, pullback = jax.vjp(y, tuple(floats))
        return {"y": y, **dict(zip(FLOATS, pullback(dy)[0]))}

    return jax.jit(both)


def check(backend, mask, normalizer="softmax", places=((3, np.nan), (CUT + 3, -np.inf))):
    run = compiled(backend, mask, normalizer)
    arrays = arrays_of(backend)
    clean = run(arrays)
    seen = seen_pairs(**MASKS[mask])
    for name in FLOATS:
        for token, value in places:
            bad = {**arrays, name: arrays[name].copy()}
            bad[name][0, token, 0, 1] = value
            found = run(bad)
            # Of these queries something is not finite, and so may be what they see.
            rows = seen[:, token] if name in ("k", "v") else np.arange(TOKENS) == token
            keys = seen[rows].any(0)
            may_change = dict(y=rows, q=rows, gate_logits=rows, k=keys, v=keys)
            for result, x in found.items():
                same = ~may_change[result]
                np.testing.assert_array_equal(
                    x[0, same], clean[result][0, same], f"{name} {result}"
                )
            if name in ("v", "gate_logits") or np.isnan(value):
                shows = "q" if name == "dy" else "y"
                x = np.asarray(found[shows])[0]
                # Minus infinity closes a gate.
                if (name, value) != ("gate_logits", -np.inf):
                    assert not np.isfinite(x[rows]).all((1, 2)).any(), (name, shows)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", ["reference", "xla", "tpu"])
def test_what_is_not_seen_changes_no_bit(backend, mask):
    check(backend, mask)


SOME = ("sigmoid", "softpick", "self_adjust", "reweighted_softplus", "entmax")
REST = tuple(sorted(set(NORMALIZERS) - {"softmax", *SOME}))


@pytest.mark.parametrize("normalizer", SOME)
def test_normalizers(normalizer):
    check("xla", "documents", normalizer, places=((3, np.nan),))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "xla", "tpu"])
@pytest.mark.parametrize("normalizer", [*SOME, *REST])
def test_every_normalizer(backend, normalizer):
    if backend == "tpu" and NORMALIZERS[normalizer].passes > 1:
        pytest.skip("the kernel takes normalizers of one pass")
    for mask in ("window", "documents"):
        check(backend, mask, normalizer)


def test_infinities_follow_ieee():
    """An infinite value that is seen gives the infinity, or NaN, that numpy gives."""
    weights = jnp.asarray([[0.5, 0.5, 0], [0, 1, 0], [0.25, 0.25, 0.5], [0, 0, 1]], jnp.float32)
    seen = jnp.asarray([[1, 1, 0], [1, 1, 0], [1, 1, 1], [0, 0, 1]], bool)
    x = jnp.asarray([[1, np.inf], [2, -np.inf], [np.nan, np.inf]], jnp.float32)
    actual = tile.selecting_product(weights, seen, x, lambda x, y: x @ y)
    np.testing.assert_array_equal(
        actual, [[1.5, np.nan], [2, np.nan], [np.nan] * 2, [np.nan, np.inf]]
    )


def test_a_product_that_multiplies_is_found(monkeypatch):
    monkeypatch.setattr(tile, "selecting_product", lambda w, seen, x, product: product(w, x))
    compiled.cache_clear()
    with pytest.raises(AssertionError, match="q k"):
        check("xla", "causal")
    compiled.cache_clear()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_unused_slots_may_hold_anything(implementation):
    arrays, _ = draw(B=2, T=12, H=2, Hk=1, slopes=True)
    a = cast(arrays, jnp.float32)
    valid = jnp.asarray(np.random.default_rng(0).random((2, 12)) < 0.5)
    garbage = jnp.asarray([np.nan, np.inf, -np.inf, 3e38], jnp.float32)
    by_slot = jnp.resize(garbage, (2, 12))[..., None, None]

    @jax.jit
    def both(k, v):
        def step(q, k, v):
            distances = jnp.arange(24, dtype=jnp.uint8).reshape(2, 12)
            return attention_step(
                q,
                k,
                v,
                valid=valid,
                alibi_slopes=a["alibi_slopes"],
                distances=distances,
                implementation=implementation,
            )

        y, pullback = jax.vjp(step, a["q"][:, 0], k, v)
        return y, pullback(jnp.ones_like(y))

    expected = both(a["k"], a["v"])
    hidden = ~valid[..., None, None]
    actual = both(*(jnp.where(hidden, by_slot, a[name]) for name in "kv"))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert not np.any(actual[1][1][~valid])
    seen_nan = a["v"].at[:, jnp.argmax(valid[0])].set(jnp.nan)
    assert np.isnan(both(a["k"], seen_nan)[0][0]).all()


def test_sharded():
    """Of four devices every one has a piece of a NaN document; another begins on the third."""
    mesh = jax.make_mesh((4,), ("context",), axis_types=(AxisType.Auto,))
    time = P(None, "context")
    arrays = cast(arrays_of("xla"), jnp.float32)
    ids = jnp.asarray(np.repeat([[1, 2, 1]], [9, 14, 17], axis=1))

    @jax.jit
    @jax.value_and_grad
    def loss(v, rows):
        def part(q, k, v, ids):
            return attention_sharded(q, k, v, axis_name="context", segment_ids=ids)

        split = jax.shard_map(part, mesh=mesh, in_specs=(time,) * 4, out_specs=time)
        y = split(arrays["q"], arrays["k"], v, ids)
        return jnp.sum(jnp.where(rows[:, None, None], y, 0) ** 2)

    # An id that comes back is another document.
    last = jnp.arange(TOKENS) >= 23
    expected = loss(arrays["v"], last)
    actual = loss(jnp.where(last[:, None, None], arrays["v"], jnp.nan), last)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("backend", ["reference", "xla", "tpu"])
def test_an_id_that_comes_back_is_another_document(backend):
    arrays, _ = draw(B=1, T=24, H=2, Hk=1)
    a = cast(arrays, jnp.float32)
    options = dict(implementation=backend, interpret=backend == "tpu")
    run = lambda ids: value_and_gradients(a, segment_ids=ids, **options)
    back = jnp.asarray(np.repeat([[5, 2, 5]], [7, 9, 8], axis=1))
    numbers = document_numbers(back)
    np.testing.assert_array_equal(numbers, np.repeat([[0, 1, 2]], [7, 9, 8], axis=1))
    assert_close(run(back), truth(arrays, segment_ids=numbers), FLOAT32)
