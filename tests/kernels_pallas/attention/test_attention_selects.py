"""Masks select: what a query does not see may be NaN or infinite, and changes no bit of its output
and gradients; what it sees shows.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import FLOAT32, assert_close, cast, draw, truth, value_and_gradients
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels_pallas.attention import NORMALIZERS, attention_sharded, products
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


@pytest.mark.parametrize(
    "backend, mask",
    [
        ("xla", "causal"),
        ("xla", "window"),
        ("xla", "documents"),
        ("tpu", "causal"),
        ("tpu", "window"),
        ("tpu", "documents"),
        ("reference", "documents"),
    ],
)
def test_what_is_not_seen_changes_no_bit(backend, mask):
    check(backend, mask)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend, mask",
    [
        ("xla", "documents, not causal"),
        ("tpu", "documents, not causal"),
        ("reference", "causal"),
        ("reference", "window"),
        ("reference", "documents, not causal"),
    ],
)
def test_what_is_not_seen_changes_no_bit_slowly(backend, mask):
    check(backend, mask)


SOME = ("softpick", "self_adjust", "entmax")
REST = tuple(sorted(set(NORMALIZERS) - {"softmax", *SOME}))


@pytest.mark.parametrize("normalizer", SOME)
def test_normalizers(normalizer):
    check("xla", "documents", normalizer, places=((3, np.nan),))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "xla", "tpu"])
@pytest.mark.parametrize("normalizer", [*SOME, *REST])
def test_every_normalizer(backend, normalizer):
    if backend == "tpu" and (
        NORMALIZERS[normalizer].passes > 1 or NORMALIZERS[normalizer].parameters
    ):
        pytest.skip("the kernel takes normalizers of one pass without learned numbers")
    for mask in ("window", "documents"):
        check(backend, mask, normalizer)


@cache
def bad_rows():
    """Arrays of which every row of the batch has one number that is not finite."""
    a = {name: x[:, :12] for name, x in arrays_of("xla").items()}
    # An infinite query in this channel has logits of one sign only.
    a["k"] = np.where(np.arange(8) == 1, np.abs(a["k"]) + 0.1, a["k"])
    places = [
        (name, token, value)
        for name in FLOATS
        for token in (0, 3, 10)
        for value in (np.nan, np.inf, -np.inf)
    ]
    a = {name: np.repeat(x, len(places), axis=0) for name, x in a.items()}
    for row, (name, token, value) in enumerate(places):
        a[name][row, token, 0, 1] = value
    return places, a


def check_shows(normalizer):
    places, arrays = bad_rows()
    *floats, dy = (arrays[name] for name in FLOATS)

    def run(implementation):
        @jax.jit
        def both(floats):
            def y(floats):
                q, k, v, gate_logits = floats
                return attention(
                    q,
                    k,
                    v,
                    gate_logits=gate_logits,
                    normalizer=normalizer,
                    implementation=implementation,
                )

            y, pullback = jax.vjp(y, floats)
            return y, *pullback(dy)[0]

        return both(tuple(floats))

    for result, x, expected in zip(("y", *FLOATS), run("xla"), run("reference")):
        lost = np.isfinite(x) & ~np.isfinite(expected)
        lost_in = [places[row] for row in np.flatnonzero(lost.any((1, 2, 3)))]
        assert not lost_in, (result, lost_in)
        assert np.isfinite(x).any()
    return run("xla")[0]


def test_what_is_seen_shows():
    """As in the reference: NaN, and rows of which every logit is minus infinity."""
    places, _ = bad_rows()
    y = check_shows("softmax")
    assert np.isnan(y[places.index(("q", 3, -np.inf)), 3, 0]).all()


@pytest.mark.slow
@pytest.mark.parametrize("normalizer", sorted(set(NORMALIZERS) - {"softmax"}))
def test_what_is_seen_shows_in_every_normalizer(normalizer):
    check_shows(normalizer)


@pytest.mark.parametrize("implementation", ["reference", "xla", "tpu", "gpu"])
def test_a_sink_is_above_minus_infinity(implementation):
    """A row whose every logit is minus infinity is all sink; without one it is 0 / 0."""
    q = np.full((1, 3, 1, 1), -np.inf, np.float32)
    ones = np.ones_like(q)

    @jax.jit
    def both(sinks, valid):
        options = dict(sink_logits=sinks, implementation=implementation)
        options["interpret"] = implementation in ("tpu", "gpu")
        # On TPU the step is the xla backend's.
        of_step = {**options, "interpret": implementation == "gpu"}
        if implementation == "tpu":
            of_step["implementation"] = "xla"
        step = attention_step(q[:, 0], ones, ones, valid=valid, **of_step)
        return attention(q, ones, ones, **options), step

    some = np.asarray([[True, False, True]])
    for sink, expected in ((None, np.nan), (-np.inf, np.nan), (-3.0, 0)):
        sinks = None if sink is None else np.asarray([sink], np.float32)
        y, step = both(sinks, some)
        np.testing.assert_array_equal(y, np.full(y.shape, expected))
        np.testing.assert_array_equal(step, np.full(step.shape, expected))
        # A token that sees no slot has zeros.
        assert not np.any(both(sinks, some & False)[1])


def test_tpu_in_whole_blocks():
    """There the fast version compares nothing but the triangles of the diagonal."""
    arrays, _ = draw(B=1, T=256, H=1, Hk=1, K=8, V=8)
    a = {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}

    @partial(jax.jit, static_argnums=1)
    def both(a, implementation="tpu"):
        def y(*qkv):
            interpret = implementation == "tpu"
            return attention(*qkv, implementation=implementation, interpret=interpret)

        y, pullback = jax.vjp(y, *(a[name] for name in "qkv"))
        return dict(zip("yqkv", (y, *pullback(jnp.cos(y)))))

    clean = both(a)
    assert_close(clean, both(a, "xla"), FLOAT32)
    for name in "qkv":
        found = both({**a, name: a[name].at[0, 200, 0, 1].set(jnp.nan)})
        rows = np.arange(256) >= 200
        if name == "q":
            rows = np.arange(256) == 200
        np.testing.assert_array_equal(found["y"][0, ~rows], clean["y"][0, ~rows])
        np.testing.assert_array_equal(found["q"][0, ~rows], clean["q"][0, ~rows])
        assert np.isnan(found["y"][0, rows, 0]).any(-1).all()
        after = slice(201 if name == "q" else 256, None)
        np.testing.assert_array_equal(found["k"][0, after], clean["k"][0, after])


def test_infinities_follow_ieee():
    """An infinite value that is seen gives the infinity, or NaN, that numpy gives."""
    weights = jnp.asarray([[0.5, 0.5, 0], [0, 1, 0], [0.25, 0.25, 0.5], [0, 0, 1]], jnp.float32)
    seen = jnp.asarray([[1, 1, 0], [1, 1, 0], [1, 1, 1], [0, 0, 1]], bool)
    x = jnp.asarray([[1, np.inf], [2, -np.inf], [np.nan, np.inf]], jnp.float32)
    actual = products.selecting_product(weights, seen, x, lambda x, y: x @ y)
    np.testing.assert_array_equal(
        actual, [[1.5, np.nan], [2, np.nan], [np.nan] * 2, [np.nan, np.inf]]
    )


def test_a_product_that_multiplies_is_found(monkeypatch):
    monkeypatch.setattr(products, "selecting_product", lambda w, seen, x, product: product(w, x))
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
