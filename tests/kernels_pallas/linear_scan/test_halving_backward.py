"""The halving of vector decays and its derivative, of one chunk, beside sums over pairs in
float64.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms

from kernels_pallas.linear_scan.tpu import vector_decay_backward
from kernels_pallas.linear_scan.tpu.tile import ChunkCotangents, TileOptions, merge_levels
from kernels_pallas.linear_scan.tpu.vector_decay import halve_and_keep, transposed_scores

C, K = 16, 4


def options(reverse: bool, dtype=jnp.float32) -> TileOptions:
    return TileOptions(
        rounds=False,
        operand=jnp.dtype(dtype),
        inclusive=False,
        reverse=reverse,
        stack=False,
    )


def result(generator):
    """What it returns."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


def by_pairs(reads, writes, logs, dscores, dreads, dwrites):
    """(scores, dreads, dwrites, dlogs): token i sees the write of j through the decays between."""
    scores = np.zeros((C, C))
    to_reads, to_writes, to_logs = np.zeros((3, C, K))
    for i in range(C):
        before = reads[i] * np.exp(logs[:i].sum(0)) * dreads[i]
        after = writes[i] * np.exp(logs[i + 1 :].sum(0)) * dwrites[i]
        to_reads[i] += before / reads[i]
        to_writes[i] += after / writes[i]
        to_logs[:i] += before
        to_logs[i + 1 :] += after
        for j in range(i):
            product = reads[i] * writes[j] * np.exp(logs[j + 1 : i].sum(0))
            scores[i, j] = product.sum()
            to_reads[i] += dscores[i, j] * product / reads[i]
            to_writes[j] += dscores[i, j] * product / writes[j]
            to_logs[j + 1 : i] += dscores[i, j] * product
    return scores, to_reads, to_writes, to_logs


@pytest.mark.parametrize("reverse", [False, True])
def test_one_product_a_merge_sends_back_to_reads_and_writes(reverse, monkeypatch):
    # The kernels' own bitcast is not evaluated outside of `jit`.
    same_size = SimpleNamespace(bitcast=jax.lax.bitcast_convert_type)
    monkeypatch.setattr(vector_decay_backward, "pltpu", same_size)
    rng = np.random.default_rng(0)
    reads, writes, dreads, dwrites = rng.normal(size=(4, C, K))
    dscores = rng.normal(size=(C, C))
    logs = -rng.exponential(size=(C, K))
    low = [jnp.asarray(x, jnp.float32) for x in (reads, writes, logs, dscores, dreads, dwrites)]
    merges = result(halve_and_keep(options(reverse), low[0], low[1], jnp.exp(low[2]))).merges
    levels = merge_levels(C, not reverse)
    scores = result(transposed_scores(options(reverse), levels, merges, None))
    cotangents = ChunkCotangents(
        dv=None,
        dscores=low[3],
        dreads=low[4],
        dwrites=low[5],
        dlog_total=jnp.zeros((8, K)),
        dstate=None,
    )
    bits = vector_decay_backward.pair_bits(options(reverse), C)
    got = result(
        vector_decay_backward.backward(options(reverse), bits, merges, cotangents, low[3].T)
    )
    tokens = [reads, writes, logs, dscores, dreads, dwrites]
    if reverse:
        tokens = [x[::-1] for x in tokens]
        tokens[3] = tokens[3][:, ::-1]
    expected = by_pairs(*tokens)
    if reverse:
        expected = [x[::-1] for x in expected]
        expected[0] = expected[0][:, ::-1]
    for name, a, b in zip(("scores", "dreads", "dwrites", "dlogs"), (scores.T, *got), expected):
        assert rel_rms(a, b) <= 5e-7, name


def test_bits_of_two_rows_of_bfloat16_lie_in_one_word():
    bits = vector_decay_backward.pair_bits(options(False, jnp.bfloat16), C)
    i, j = np.mgrid[:C, :C]
    for h, words in bits.of_merge.items():
        pairs = np.asarray(words).view(np.uint32)
        is_pair = (i ^ j) // h == 1
        np.testing.assert_array_equal(pairs & 0xFFFF, np.where(is_pair[::2], 0xFFFF, 0))
        np.testing.assert_array_equal(pairs >> 16, np.where(is_pair[1::2], 0xFFFF, 0))
