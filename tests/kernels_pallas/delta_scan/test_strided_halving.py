"""The halving of the forward kernel, in another order of tokens, against the mathematics of a chunk
written plainly. No kernel is run: memory is an array.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms

from kernels_pallas.delta_scan import tile
from kernels_pallas.delta_scan.tpu import scalar_decay, strided, strided_halving, vector_decay
from kernels_pallas.delta_scan.tpu.plan import SPAN
from kernels_pallas.delta_scan.tpu.tile import ChunkTerms, Solved, inverse
from kernels_pallas.linear_scan.tpu.tile import TileOptions, merge_levels

CHUNK = strided.CHUNK
K = 128
F32 = TileOptions(
    rounds=False,
    operand=jnp.dtype(jnp.float32),
    inclusive=True,
    reverse=False,
    stack=False,
)


class Memory:
    """A reference as a kernel has it, for slices of rows."""

    def __init__(self, shape: tuple[int, int]):
        self._array = np.full(shape, np.nan, np.float32)

    def _rows(self, rows):
        return slice(rows.start, rows.start + rows.size * rows.stride, rows.stride)

    def __getitem__(self, rows):
        return jnp.asarray(self._array[self._rows(rows)])

    def __setitem__(self, rows, x):
        self._array[self._rows(rows)] = np.asarray(x)


@pytest.fixture(autouse=True)
def outside_of_kernels(monkeypatch):
    """What exists in kernels only, of arrays."""

    def bitcast(x, dtype):
        """Two rows of bfloat16 are one of words, the first in the lower half."""
        x = np.asarray(x)
        if x.dtype.itemsize == jnp.dtype(dtype).itemsize:
            return jnp.asarray(x.view(dtype))
        if x.dtype.itemsize == 4:
            pairs = x.view(jnp.bfloat16).reshape(*x.shape, 2)
            return jnp.asarray(np.moveaxis(pairs, 2, 1).reshape(-1, x.shape[1]))
        pairs = np.moveaxis(x.reshape(-1, 2, x.shape[1]), 1, 2)
        return jnp.asarray(np.ascontiguousarray(pairs).view(dtype)[..., 0])

    monkeypatch.setattr(strided_halving.pltpu, "roll", jnp.roll)
    monkeypatch.setattr(strided_halving.pltpu, "bitcast", bitcast)


def finished(generator):
    """What a generator returns."""
    while True:
        try:
            next(generator)
        except StopIteration as stop:
            return stop.value


def tokens(seed: int) -> dict[str, np.ndarray]:
    """Of one chunk, with decays of every size."""
    rng = np.random.default_rng(seed)
    q, erase, k = rng.normal(size=(3, CHUNK, K))
    logs = rng.choice(
        [-1e4, -50.0, -1.0, -0.05, 0.0], p=[0.05, 0.05, 0.3, 0.3, 0.3], size=(CHUNK, K)
    )
    return {"q": q, "erase": erase / K, "k": k, "log_decay": logs}


def strided_terms(options: TileOptions, x: dict[str, np.ndarray]):
    """Of `strided_halving`, from tokens in their order."""
    order = strided.lanes_of_tokens(np.arange(CHUNK))
    q, erase, k, log_decay = (jnp.asarray(y[order], jnp.float32) for y in x.values())
    decay = jnp.exp(log_decay)
    spans = np.split(x["log_decay"], CHUNK // SPAN)
    return finished(
        strided_halving.chunk_terms(
            options,
            q * decay,
            erase * decay,
            k,
            decay,
            tuple(jnp.exp(jnp.asarray(s, jnp.float32).sum(0, keepdims=True)) for s in spans),
            jnp.sum(q * k, axis=1, keepdims=True),
            Memory(strided.scratch_shape(1, K)),
            head=0,
        )
    )


def expected_terms(x: dict[str, np.ndarray]) -> tuple[list[tile.ChunkTerms], np.ndarray]:
    """Of both spans, and the diagonal of the read scores."""
    spans = zip(*(np.split(y, CHUNK // SPAN) for y in x.values()))
    terms = [tile.vector_decay(*(jnp.asarray(y, jnp.float32) for y in span)) for span in spans]
    return terms, (x["q"] * x["k"]).sum(-1)


@pytest.mark.parametrize("operand, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 5e-3)])
def test_equals_the_plain_halving(operand, tolerance):
    x = tokens(0)
    got = strided_terms(F32._replace(operand=jnp.dtype(operand)), x)
    want, diagonal = expected_terms(x)
    read_scores = np.zeros((CHUNK, CHUNK))
    for n, terms in enumerate(want):
        span = slice(n * SPAN, (n + 1) * SPAN)
        read_scores[span, span] = terms.read_scores
        for name in ("reads", "erases", "writes"):
            assert rel_rms(getattr(got, name)[span], getattr(terms, name)) < tolerance, name
        np.testing.assert_allclose(got.totals[n][0], terms.total, rtol=1e-6)
    read_scores += np.diag(diagonal)
    assert rel_rms(got.read_scores, read_scores) < tolerance
    # Of another span, and of later tokens, nothing.
    assert not np.asarray(got.read_scores)[read_scores == 0].any()


def test_inverse_of_both_spans():
    x = tokens(1)
    got = finished(inverse(F32, strided_terms(F32, x)))
    for n, terms in enumerate(expected_terms(x)[0]):
        # The kernel's erase keys are the negative ones.
        want = tile.inverse(-terms.erase_scores, "highest")
        assert rel_rms(got[:, n * SPAN : (n + 1) * SPAN], want) < 2e-6


def close(got: ChunkTerms, want: ChunkTerms):
    for name in ("read_scores", "reads", "erases", "writes"):
        assert rel_rms(getattr(got, name), getattr(want, name)) < 2e-6, name


@pytest.mark.parametrize("decay", ["vector", "none"])
def test_the_backward_kernel_goes_on_from_both_spans(decay):
    """As if it had computed the chunk as one span."""
    levels = merge_levels(CHUNK, reverse=False)
    x = tokens(2)
    q, erase, k, logs = (jnp.asarray(y, jnp.float32) for y in x.values())
    if decay == "vector":
        of_spans = strided_terms(F32, x)
        decays = jnp.exp(logs)
        total = jnp.exp(logs.sum(0, keepdims=True))
        diagonal = jnp.sum(q * k, axis=1, keepdims=True)

        def whole(*solved):
            of_tokens = (q * decays, erase * decays, k, decays, total, diagonal)
            return finished(vector_decay.chunk_terms(F32, levels, *of_tokens, *solved))[0]
    else:

        def whole(*solved, spans=1):
            factors = scalar_decay.undecayed(levels, spans)
            of_tokens = (q, erase, k, factors)
            return finished(scalar_decay.chunk_terms(F32, levels, *of_tokens, *solved))[0]

        of_spans = whole(spans=2)
    solved = Solved(finished(inverse(F32, of_spans)), of_spans.read_scores)
    assert solved.block == SPAN
    got, want = whole(solved), whole()
    close(got, want)
    assert len(got.erase_rows) == 1
    both = [inverse(F32, got, solved.inverses), inverse(F32, want)]
    assert rel_rms(*map(finished, both)) < 2e-6


@pytest.mark.parametrize("error", ["lanes", "rows", "erases"])
def test_planted_errors_are_found(error, monkeypatch):
    if error == "lanes":
        # Scores that made room are not moved back.
        monkeypatch.setattr(strided_halving.pltpu, "roll", lambda x, shift, axis: x)
    elif error == "rows":
        # Rows come back as if they had kept their order.
        monkeypatch.setattr(strided.Order, "store_strided", strided.Order.store)
    else:
        # Erase keys become queries.
        merged = strided_halving._merged

        def wrong(rows, h):
            return merged(rows, h)._replace(erases=merged(rows, h).reads)

        monkeypatch.setattr(strided_halving, "_merged", wrong)
    with pytest.raises(AssertionError):
        test_equals_the_plain_halving(jnp.float32, 2e-6)
