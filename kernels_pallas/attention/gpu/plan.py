"""The static arguments of the GPU kernels of `attention`, and which tiles a program computes.

A program of a kernel has one block of tokens of its own: of queries in the kernels of y and dq, of
keys in the kernels of dk and dv. It loops over the blocks of the other kind that they see, or that
see them. Tiles that the mask hides entirely are not in the loop, and only those that the mask cuts
compare positions.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float, Int

from kernels_pallas.attention.gpu.tuning import (
    MAX_D,
    MIN_BLOCK,
    KernelConfig,
    Schedule,
    padded_channels,
)
from kernels_pallas.attention.kernels import (
    GateKind,
    count_visible_pairs,
    saved_outputs,
    unsupported_arrays,
)
from kernels_pallas.attention.normalizers.base import Normalizer
from kernels_pallas.attention.tile_ranges import Reach, tile_ranges

# What a kernel gets for an array. Its type at run time is `jax.Ref`, which does not declare `at`.
Ref = Any


class Plan(NamedTuple):
    """The static arguments of a call."""

    # In the kernels, and for what XLA computes of rows around them (`exponentials.py`).
    normalizer: Normalizer
    normalizer_around: Normalizer
    causal: bool
    window: int | None
    # Times `unit`, as it bounds logits that are.
    logits_soft_cap: float | None
    scale: float
    # What logits are multiplied by.
    unit: float
    # The true number of tokens.
    T: int
    # The tokens that arrays have: whole blocks.
    length: int
    H: int
    Hk: int
    # Padded to powers of two.
    K: int
    V: int
    # The kind of the output gate.
    gate: GateKind
    # Whether there are segment ids, and ALiBi slopes.
    segments: bool
    slopes: bool
    # What products are rounded to before they are multiplied again.
    operand: jnp.dtype
    # Of matmuls of float32 operands, as `jax.lax.dot` takes it.
    precision: lax.Precision | lax.DotAlgorithmPreset | None
    # Of y.
    out_dtype: jnp.dtype
    schedule: Schedule
    interpret: bool

    @property
    def group(self) -> int:
        """Query heads to a key head."""
        return self.H // self.Hk

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that the mask leaves, without segments."""
        return count_visible_pairs(self.T, self.causal, self.window)

    @property
    def hides_pairs(self) -> bool:
        """Whether any tile has a pair that the mask hides."""
        is_cut = self.causal or self.window is not None or self.length > self.T
        return is_cut or self.segments

    @property
    def saved_outputs(self) -> list[int]:
        """Which outputs of the normalizer the forward kernel writes for the backward kernels."""
        return saved_outputs(self.normalizer, self.gate, self.out_dtype)


class KernelInputs(NamedTuple):
    """The arrays of a call, padded to whole blocks and to powers of two."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T Hk K"]
    v: Float[Array, "B T Hk V"]
    gate_logits: Float[Array, "B T H V"] | Float[Array, "B H T"] | None
    sink_logits: Float[Array, "H"] | None
    alibi_slopes: Float[Array, "H"] | None
    segment_ids: Int[Array, "B T"] | None


def unsupported_by_kernels(
    q: Array,
    k: Array,
    v: Array,
    normalizer: Normalizer,
) -> str | None:
    """Why no kernel of this folder can take these arrays, or None if one can.

    Args:
      q: queries, [..., K].
      k: keys, [..., K].
      v: values, [..., V].
      normalizer: how logits become weights.

    Returns:
      The end of a sentence that begins with the name of the backend.
    """
    refusal = unsupported_arrays(q, k, v, normalizer, MAX_D)
    if refusal is not None:
        return refusal
    # Offsets are 32-bit integers in Triton.
    width = padded_channels(max(q.shape[-1], v.shape[-1]))
    elements = max(math.prod(x.shape[:-1]) * width for x in (q, k))
    if elements >= 2**31:
        return f"takes arrays below 2**31 elements, not {elements}"
    return None


# --- which tiles


def loop_over_tiles(
    plan: Plan,
    reach: Reach,
    n: Array,
    block: int,
    other_block: int,
    spans: Ref | None,
    add_tile: Callable[[bool, Array, Array, Any], Any],
    carry: Any,
    heads: int = 1,
) -> Any:
    """carry = add_tile(by_position, head, block, carry) for every tile of a program.

    Args:
      plan: the static arguments.
      reach: of the tokens of the program's block.
      n: the number of the program's block.
      block: tokens in the program's block.
      other_block: tokens in a block of the loop.
      spans: of `segment_spans`, of the program's row of the batch; None without segments.
      add_tile: computes one tile.
      carry: before the first tile.
      heads: the tiles are computed for each of so many heads.

    Returns:
      The carry after the last tile.
    """
    limits = None if spans is None else _limits(spans, n)
    for first, end, by_position in tile_ranges(plan, reach, n, block, other_block, limits):

        def add_block(
            head: Array,
            other: Array,
            carry: Any,
            masks=by_position,
        ) -> Any:
            return add_tile(masks, head, other, carry)

        # A loop for each range: whether tiles are masked is known while the kernel is compiled.
        carry = loop_over_heads(heads, first, end, add_block, carry)
    return carry


def loop_over_heads(
    heads: int,
    first: Array,
    end: Array,
    add: Callable[[Array, Array, Any], Any],
    carry: Any,
) -> Any:
    """carry = add(head, i, carry) for i from `first` to before `end`, for every head."""
    count = end - first

    def add_number(t: Array, carry: Any) -> Any:
        # Heads and blocks are one loop. A nested one would cost registers, and here the loads run
        # ahead from one head into the next.
        head = lax.div(t, count) if heads > 1 else jnp.int32(0)
        other = first + t - head * count
        return add(head, other, carry)

    return lax.fori_loop(0, heads * count, add_number, carry)


def few_rows_at_a_time(
    plan: Plan,
    config: KernelConfig,
    reach: Reach,
    n: Array,
    block: int,
    other_block: int,
    spans: Ref | None,
    compute: Callable[[Array, Array, Array], None],
) -> None:
    """compute(rows, first, end) for the tokens of a program's block, a few at a time.

    Args:
      plan, reach, n, block, other_block, spans: as of `loop_over_tiles`.
      config: of the kernel.
      compute: computes and writes what belongs to the tokens at the positions `rows`; the tiles of
        `loop_over_tiles` have the tokens from `first` to before `end`.
    """
    limits = None if spans is None else _limits(spans, n)
    ranges = tile_ranges(plan, reach, n, block, other_block, limits)
    first = ranges[0].first * other_block
    end = ranges[-1].end * other_block
    # As many as registers hold: 8 elements a thread of each array.
    few = 8 * 32 * config.num_warps // max(plan.K, plan.V)
    few = min(block, max(MIN_BLOCK, few))
    parts = block // few

    def compute_part(i: Array, carry: None) -> None:
        rows = (n * parts + i) * few + lax.iota(jnp.int32, few)
        compute(rows, first, end)
        return carry

    lax.fori_loop(0, parts, compute_part, None)


# --- segments


def segment_spans(
    segment_ids: Int[Array, "B T"],
    block: int,
    other_block: int,
) -> Int[Array, "B N 2"]:
    """For every block of `block` tokens, which blocks of `other_block` may share a segment with it.

    Blocks are compared by their least and largest ids. That is exact where ids never fall, as in
    packed documents; otherwise the result may have more blocks than needed.

    Args:
      segment_ids: by token, whole blocks of both sizes.
      block: tokens in a program's block.
      other_block: tokens in a block of its loop.

    Returns:
      The first such block, and one after the last.
    """
    least, most = _bounds(segment_ids, block)
    other_least, other_most = _bounds(segment_ids, other_block)
    # Two ranges of ids overlap if each begins before the other ends. [B, N, other N]
    begins_before = least[:, :, None] <= other_most[:, None, :]
    ends_after = other_least[:, None, :] <= most[:, :, None]
    shares = begins_before & ends_after
    first = jnp.argmax(shares, 2)
    # argmax finds the first True; of the reversed array, the last.
    end = shares.shape[2] - jnp.argmax(jnp.flip(shares, 2), 2)
    return jnp.stack([first, end], 2).astype(jnp.int32)


def _bounds(segment_ids: Int[Array, "B T"], block: int) -> tuple[Array, Array]:
    """The least and the largest id in every block, [B, N]."""
    blocks = segment_ids.reshape(
        segment_ids.shape[0],
        -1,
        block,
    )
    return blocks.min(2), blocks.max(2)


def _limits(spans: Ref, n: Array) -> tuple[Array, Array]:
    """Block n's row of `segment_spans`, for `tile_ranges`."""
    first = pltriton.load(spans.at[n, jnp.int32(0)])
    end = pltriton.load(spans.at[n, jnp.int32(1)])
    return first, end
