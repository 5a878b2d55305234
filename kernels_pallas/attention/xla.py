"""`attention` without Pallas: tiles with an online normalizer, memory linear in T both ways.

Queries, keys and values are cut into blocks (`blocks.py`). The outer loop goes over query blocks,
the inner one over the key blocks that some row of the query block may see: its bounds come from
`causal` and `window`, so a tile that is fully masked costs nothing; one that the block mask hides
in every row and head costs a look. The forward pass keeps the output and a few numbers a row; the
backward pass loops over the same tiles and recomputes them.

The log-sum-exp is a number that the forward pass keeps anyway. Its gradient joins that of the
logits, ds = p (dp - sum(do o) + dlse): so it is taken from sum(do o), and nothing else changes.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from kernels_pallas.attention import blocks, reference, tile
from kernels_pallas.attention.blocks import KeyBlocks, Plan, QueryBlocks, UngatedInputs
from kernels_pallas.attention.inputs import (
    AttentionInputs,
    AttentionOptions,
    Outputs,
    StepInputs,
    StepOptions,
)
from kernels_pallas.attention.normalizers.base import AddTile, Row, masked, row_max
from kernels_pallas.common.mesh import varying_like
from kernels_pallas.common.opaque import opaque
from kernels_pallas.common.second_order import differentiable_gradient, kept

# What the op names with `checkpoint_name`.
OUT_NAME = "attention_out"
STATISTIC_NAME = "attention_lse"


def block_sizes(T: int) -> tuple[int, int]:
    """Queries and keys in a tile, as measured on a CPU.

    Small tiles skip more of a short sequence's triangle.
    """
    most = 64 if T <= 256 else 128
    block = min(T, most)
    return block, block


def attention(
    inputs: AttentionInputs,
    options: AttentionOptions,
    *,
    first: Int[Array, ""] | int | None = None,
) -> Outputs:
    """As `api.attention`, with every default filled in. Any T.

    Args:
      inputs: the arrays. The queries may be a part of the sequence.
      options: the static arguments.
      first: the position of the first query among the keys, all of which are there; 0 if None.

    Returns:
      y in v's dtype; with `return_lse` (y, lse).
    """
    plan, ungated = _without_gate(inputs, options, first)
    return _attention(plan, ungated, inputs.gate_logits)


def _without_gate(
    inputs: AttentionInputs,
    options: AttentionOptions,
    first: Int[Array, ""] | int | None = None,
) -> tuple[Plan, UngatedInputs]:
    """The static arguments of a call of `attention`, and what decides its ungated output."""
    block_q, _ = block_sizes(inputs.q.shape[1])
    _, block_k = block_sizes(inputs.k.shape[1])
    plan = Plan(
        **options._asdict(),
        block_q=block_q,
        block_k=block_k,
        # Queries that are a part of the sequence see themselves too.
        sees_itself=first is not None or inputs.sees_itself,
    )
    ungated = UngatedInputs(
        q=inputs.q,
        k=inputs.k,
        v=inputs.v,
        sink_logits=inputs.sink_logits,
        alibi_slopes=inputs.alibi_slopes,
        q_segments=inputs.segment_ids,
        k_segments=inputs.segments_of_keys,
        first=first,
        block_mask=inputs.block_mask,
        normalizer_parameters=inputs.normalizer_parameters,
    )
    return plan, ungated


def attention_step(inputs: StepInputs, options: StepOptions) -> Float[Array, "B H V"]:
    """As `api.attention_step`: one tile, whose rows are the query heads of a key head."""
    plan = Plan(
        normalizer=options.normalizer,
        causal=False,
        window=None,
        logits_soft_cap=options.logits_soft_cap,
        scale=options.scale,
        block_q=1,
        block_k=inputs.k_cache.shape[1],
        sees_itself=False,
    )
    # The query is in document 0, and so is every slot that it may see.
    q_segments = jnp.zeros_like(inputs.valid[:, :1], jnp.int32)
    k_segments = jnp.where(inputs.valid, 0, 1)
    ungated = UngatedInputs(
        q=inputs.q[:, None],
        k=inputs.k_cache,
        v=inputs.v_cache,
        sink_logits=inputs.sink_logits,
        alibi_slopes=inputs.alibi_slopes,
        q_segments=q_segments,
        k_segments=k_segments,
        distances=inputs.distances,
        normalizer_parameters=inputs.normalizer_parameters,
    )
    gate_logits = inputs.gate_logits
    if gate_logits is not None:
        # T = 1, like the query.
        gate_logits = gate_logits[:, None]
    y = _attention(plan, ungated, gate_logits)
    assert isinstance(y, Array)
    return y[:, 0]


class _Residuals(NamedTuple):
    """What the forward pass keeps for the backward pass."""

    inputs: UngatedInputs
    gate_logits: Array | None
    # o, and the other outputs of the normalizer in `deltas` [B, T, H, V].
    outputs: tuple[Array, ...]
    # Of rows, in blocks [Nq, B, Hk, R, 1].
    saved: Row


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    plan: Plan,
    inputs: UngatedInputs,
    gate_logits: Array | None,
) -> Outputs:
    outputs, saved = _forward(plan, inputs)
    return _results(plan, inputs, gate_logits, outputs, saved)


def _results(
    plan: Plan,
    inputs: UngatedInputs,
    gate_logits: Array | None,
    outputs: tuple[Array, ...],
    saved: Row,
) -> Outputs:
    """y, and with `return_lse` the log-sum-exp, of what `_forward` returned."""
    y = _gated(outputs[0], gate_logits).astype(inputs.v.dtype)
    if not plan.return_lse:
        return y
    # What softmax saves of a row. [B, T, H, 1] -> [B, H, T]
    (lse,) = saved
    by_token = blocks.join(lse, plan.block_q, inputs.q.shape[1])
    return y, jnp.swapaxes(by_token[..., 0], 1, 2)


def _attention_fwd(
    plan: Plan,
    inputs: UngatedInputs,
    gate_logits: Array | None,
) -> tuple[Outputs, _Residuals]:
    y, outputs, saved = _saving(plan, inputs, gate_logits)
    # A checkpoint policy that saves these names runs no forward loop again. A layer multiplies y by
    # a matrix and needs it again for that matrix's gradient.
    y = jax.tree.map(lambda x: checkpoint_name(x, OUT_NAME), y)
    outputs = tuple(checkpoint_name(o, OUT_NAME) for o in outputs)
    saved = tuple(checkpoint_name(x, STATISTIC_NAME) for x in saved)
    return y, _Residuals(inputs, gate_logits, outputs, saved)


def _attention_bwd(
    plan: Plan,
    residuals: _Residuals,
    dy: Outputs,
) -> tuple[UngatedInputs, Array | None]:
    return differentiable_gradient(
        partial(_gradients, plan),
        partial(_plain, plan),
        residuals,
        (residuals.inputs, residuals.gate_logits),
        dy,
    )


def _plain(plan: Plan, arrays: tuple[UngatedInputs, Array | None]) -> Outputs:
    """The same function for second derivatives."""
    inputs, gate_logits = arrays
    return reference.attention_by_blocks(
        AttentionInputs(
            q=inputs.q,
            k=inputs.k,
            v=inputs.v,
            gate_logits=gate_logits,
            sink_logits=inputs.sink_logits,
            alibi_slopes=inputs.alibi_slopes,
            segment_ids=inputs.q_segments,
            key_segment_ids=inputs.k_segments,
            block_mask=inputs.block_mask,
            normalizer_parameters=inputs.normalizer_parameters,
        ),
        AttentionOptions(
            normalizer=plan.normalizer,
            causal=plan.causal,
            window=plan.window,
            logits_soft_cap=plan.logits_soft_cap,
            scale=plan.scale,
            return_lse=plan.return_lse,
        ),
        first=inputs.first,
        distances=inputs.distances,
    )


def _gradients(
    plan: Plan,
    residuals: _Residuals,
    dy: Outputs,
) -> tuple[UngatedInputs, Array | None]:
    """The backward pass: the gradients of the inputs and of the gate."""
    outputs = residuals.outputs
    dlse = None
    if isinstance(dy, tuple):
        dy, dlse = dy
    # dy is the broadcast of a number if the loss is a sum: see `opaque`.
    inputs, dy = opaque((residuals.inputs, dy))
    do, dgate = _gate_gradient(dy, residuals.gate_logits, outputs[0])
    # With y = o sigmoid(gate_logits), sum(do o) is sum(dy y): nothing is divided by a gate that
    # may be 0. The outputs kept are o and those of `normalizer.deltas`, in order.
    needed = outputs if 0 in plan.normalizer.deltas else outputs[1:]
    deltas = [jnp.sum(do * o, axis=-1, keepdims=True) for o in needed]
    if dlse is not None:
        # Of softmax, which has one delta. [B, H, T] -> [B, T, H, 1]
        deltas = [deltas[0] - jnp.swapaxes(dlse, 1, 2)[..., None]]

    kv_heads = inputs.k.shape[2]
    row = tile.RowGradient(
        do=blocks.split(do, kv_heads, plan.block_q),
        deltas=[blocks.split(delta, kv_heads, plan.block_q) for delta in deltas],
        saved=residuals.saved,
    )
    return _input_gradients(plan, inputs, row), dgate


_attention.defvjp(_attention_fwd, _attention_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _saving(
    plan: Plan,
    inputs: UngatedInputs,
    gate_logits: Array | None,
) -> tuple[Outputs, tuple[Array, ...], Row]:
    """(y, what the backward pass needs of the outputs, and of rows).

    Second derivatives differentiate the forward pass of the first ones, so this has a derivative
    too: that of y. The rest depends on the inputs as well, but `differentiable_gradient` counts
    that as the inputs' own.
    """
    outputs, saved = _forward(plan, inputs)
    y = _results(plan, inputs, gate_logits, outputs, saved)
    return y, outputs, saved


def _saving_fwd(
    plan: Plan,
    inputs: UngatedInputs,
    gate_logits: Array | None,
) -> tuple[tuple, _Residuals]:
    results = _saving(plan, inputs, gate_logits)
    _, outputs, saved = results
    inputs, gate_logits = kept((inputs, gate_logits))
    return results, _Residuals(inputs, gate_logits, outputs, saved)


def _saving_bwd(
    plan: Plan,
    residuals: _Residuals,
    cotangents: tuple,
) -> tuple[UngatedInputs, Array | None]:
    return _attention_bwd(plan, residuals, cotangents[0])


_saving.defvjp(_saving_fwd, _saving_bwd)


# For a backend whose forward pass alone is a kernel.


class Saved(NamedTuple):
    """y, and what the backward pass needs beside the inputs. Of a normalizer with one statistic.

    Attributes:
      y: the gated output.
      output: the ungated one, not rounded to 16 bits.
      statistic: what the normalizer saves of a row, such as the log-sum-exp.
    """

    y: Float[Array, "B T H V"]
    output: Float[Array, "B T H V"]
    statistic: Float[Array, "B T H"]


def attention_saving(inputs: AttentionInputs, options: AttentionOptions) -> Saved:
    """`attention`, and what `gradient` needs."""
    plan, ungated = _without_gate(inputs, options)
    y, (output,), (statistic,) = _saving(plan, ungated, inputs.gate_logits)
    assert isinstance(y, Array)
    by_token = blocks.join(statistic, plan.block_q, inputs.q.shape[1])
    return Saved(y, output, by_token[..., 0])


def gradient(
    inputs: AttentionInputs,
    options: AttentionOptions,
    saved: Saved,
    dy: Float[Array, "B T H V"],
) -> AttentionInputs:
    """The gradients of `attention`, whose forward pass some backend has computed.

    Args:
      inputs: the arrays of the call.
      options: its static arguments.
      saved: the results.
      dy: the gradient of y.

    Returns:
      Those of the floats in `inputs`, None for the rest. They have derivatives of their own.
    """
    plan, ungated = _without_gate(inputs, options)
    statistic = blocks.split(saved.statistic[..., None], inputs.k.shape[2], plan.block_q)
    residuals = _Residuals(ungated, inputs.gate_logits, (saved.output,), (statistic,))
    gradients, dgate = _attention_bwd(plan, residuals, dy)
    return AttentionInputs(
        q=gradients.q,
        k=gradients.k,
        v=gradients.v,
        gate_logits=dgate,
        sink_logits=gradients.sink_logits,
        alibi_slopes=gradients.alibi_slopes,
        normalizer_parameters=gradients.normalizer_parameters,
    )


# The forward pass.


class _Carry(NamedTuple):
    """What the rows of a query block know after some key blocks."""

    # The normalizer's statistics.
    row: Row
    # Of weighted values.
    sums: list[Array]
    # The largest logit or sink [B, Hk, R, 1]; None if the normalizer does without.
    largest: Array | None
    # Whether the row sees a key; None if it sees itself.
    sees: Array | None


def _forward(plan: Plan, inputs: UngatedInputs) -> tuple[tuple[Array, ...], Row]:
    """The normalizer's ungated outputs [B, T, H, V], and what it saves [Nq, B, Hk, R, 1].

    They are not rounded to 16 bits. Kept in bfloat16, o would bring most of the error of dq,
    through deltas, and half of that of the gate's gradient.
    """
    # Keys or values that are a broadcast would meet a fault of XLA on CPUs: see `opaque`.
    inputs = opaque(inputs)
    normalizer = plan.normalizer
    T = inputs.q.shape[1]
    num_keys = inputs.k.shape[1]
    V = inputs.v.shape[-1]
    query_blocks = blocks.cut_queries(plan, inputs)
    key_blocks = blocks.cut_keys(plan, inputs)
    constants = blocks.row_constants(plan, inputs)
    dtype = constants.zero.dtype
    product = partial(tile.matmul, "...rc,...cv->...rv", dtype=dtype)
    # A single query's product is smaller than the values of all keys, and shows what is in them.
    any_special = tile.has_special if T == 1 else tile.has_special(inputs.v)
    empty_sum = jnp.broadcast_to(constants.zero, (*constants.zero.shape[:-1], V))

    def attend(_: None, rows: QueryBlocks):
        """One query block against every key block that it sees."""
        first_query = blocks.first_position(plan, inputs, rows.number)
        first, end = blocks.key_range(plan, num_keys, first_query)

        def masked_logits(j, keys: KeyBlocks) -> tuple[Array, Array | None, Array]:
            mask = blocks.tile_mask(plan, inputs, constants, rows, j, keys)
            logits = tile.logits(
                rows.q,
                keys.k,
                mask.alibi,
                scale=plan.scale,
                logits_soft_cap=plan.logits_soft_cap,
                dtype=dtype,
            )
            return logits.s, mask.seen, mask.keys

        def pass_over_keys(start: Row, add: AddTile) -> Row:
            """A pass that computes logits only, for `Normalizer.prepare`."""

            def add_block(j, row: Row) -> Row:
                return add(row, *masked_logits(j, blocks.take(key_blocks, j)))

            return blocks.loop(first, end, partial(_where_on, rows, add_block), start)

        def add_block(j, carry: _Carry) -> _Carry:
            row, sums, largest, sees = carry
            keys = blocks.take(key_blocks, j)
            s, seen, positions = masked_logits(j, keys)
            added = normalizer.add(row, s, seen, positions)
            # The values are multiplied by weights that are not normalized yet.
            sums = tile.accumulate(sums, added, keys.v, product, seen, any_special)
            if largest is not None:
                # Softmax takes this maximum anyway, and XLA takes it once.
                largest = jnp.maximum(largest, row_max(masked(s, seen)))
            if sees is not None and seen is not None:
                sees = sees | jnp.any(seen, axis=-1, keepdims=True)
            return _Carry(added.row, sums, largest, sees)

        def is_undefined(end: _Carry) -> Array | None:
            """The rows that see something, but no logit above -inf: 0 / 0. None if none can be."""
            if end.largest is None:
                return None
            undefined = end.largest == -jnp.inf
            if end.sees is not None:
                undefined = undefined & end.sees
            if T % plan.block_q:
                undefined = undefined & blocks.is_no_padding(plan, inputs, rows)
            return undefined

        # Most normalizers know nothing before, and make no other pass.
        known = normalizer.prepare(pass_over_keys, constants.zero, constants.parameters)
        row = normalizer.start(constants.zero, known, constants.sink)
        sums = [empty_sum] * normalizer.sums
        largest = None
        sees = None
        if normalizer.from_maximum:
            largest = constants.zero - jnp.inf if constants.sink is None else constants.sink
            sees = None if plan.sees_itself else constants.zero > 0
        start = _Carry(row, sums, largest, sees)
        last = blocks.loop(first, end, partial(_where_on, rows, add_block), start)
        outputs, saved = normalizer.finish(last.row, last.sums)
        undefined = is_undefined(last)
        if undefined is not None:
            outputs = tuple(jnp.where(undefined, jnp.nan, o) for o in outputs)
            saved = tuple(jnp.where(undefined, jnp.nan, x) for x in saved)
        # o, and what the backward pass multiplies by do.
        kept = [o for n, o in enumerate(outputs) if n == 0 or n in normalizer.deltas]
        return None, (kept, saved)

    # Query blocks do not depend on each other: nothing is carried.
    _, (outputs, saved) = blocks.scan_blocks(attend, None, query_blocks)
    outputs = tuple(blocks.join(o, plan.block_q, T) for o in outputs)
    return outputs, saved


def _where_on[Carry](
    rows: QueryBlocks,
    add: Callable[[int | Array, Carry], Carry],
    j: int | Array,
    carry: Carry,
) -> Carry:
    """add(j, carry), if the block mask leaves anything of the tile.

    Args:
      rows: the tile's block of queries.
      add: adds the tile of one block of keys.
      j: the number of that block.
      carry: what is known of the rows.

    Returns:
      What is known after the tile.
    """
    is_on = blocks.tile_is_on(rows, j)
    if is_on is None:
        return add(j, carry)
    return jax.lax.cond(is_on, partial(add, j), lambda carry: carry, carry)


# The backward pass.


def _input_gradients(
    plan: Plan,
    inputs: UngatedInputs,
    row: tile.RowGradient,
) -> UngatedInputs:
    """The gradients of `inputs`. Each tile is computed once; dk and dv are added up in place."""
    num_keys = inputs.k.shape[1]
    query_blocks = blocks.cut_queries(plan, inputs)
    key_blocks = blocks.cut_keys(plan, inputs)
    constants = blocks.row_constants(plan, inputs)
    dtype = constants.zero.dtype
    any_special = tile.has_special(inputs.q, inputs.k, row.do)
    no_dslopes = None if constants.slopes is None else constants.zero

    def zeros_like(x: Array) -> Array:
        return varying_like(jnp.zeros(x.shape, dtype), x)

    def query_block(dkv: tuple[Array, Array], xs: tuple[QueryBlocks, tile.RowGradient]):
        """One query block: its dq, and what it adds to the dk and dv of all keys."""
        rows, row = xs

        def add_block(j, carry):
            dq, dslopes, dk, dv = carry
            keys = blocks.take(key_blocks, j)
            new = tile.gradients(
                plan.normalizer,
                rows.q,
                keys.k,
                keys.v,
                row,
                blocks.tile_mask(plan, inputs, constants, rows, j, keys),
                any_special,
                scale=plan.scale,
                logits_soft_cap=plan.logits_soft_cap,
                dtype=dtype,
            )
            if dslopes is not None:
                dslopes = dslopes + new.dslopes
            # A loop over query blocks carries dk and dv, so that XLA updates them in place.
            dk = blocks.add_at(dk, j, new.dk)
            dv = blocks.add_at(dv, j, new.dv)
            return dq + new.dq, dslopes, dk, dv

        # The tiles of the forward pass, and no others.
        first_query = blocks.first_position(plan, inputs, rows.number)
        first, end = blocks.key_range(plan, num_keys, first_query)
        start = (zeros_like(rows.q), no_dslopes, *dkv)
        dq, dslopes, dk, dv = blocks.loop(first, end, partial(_where_on, rows, add_block), start)
        dq = (plan.scale * dq).astype(rows.q.dtype)
        return (dk, dv), (dq, dslopes)

    # Sums over query blocks and over the heads of a group, in the statistics' dtype.
    no_dkv = (zeros_like(key_blocks.k), zeros_like(key_blocks.v))
    dkv, by_row = blocks.scan_blocks(query_block, no_dkv, (query_blocks, row))
    dk, dv = dkv
    dq, dslopes = by_row

    dsink = None
    if inputs.sink_logits is not None:
        assert constants.sink is not None
        # By row, of all blocks; the rows of a head share its sink.
        sink = constants.sink[None]
        dsink = plan.normalizer.sink_gradient(sink, row.deltas, row.saved)
        dsink = blocks.sum_by_head(dsink, plan.block_q).astype(inputs.sink_logits.dtype)
    if inputs.alibi_slopes is not None:
        dslopes = blocks.sum_by_head(dslopes, plan.block_q).astype(inputs.alibi_slopes.dtype)

    dparameters = None
    if inputs.normalizer_parameters is not None:
        by_row = plan.normalizer.parameter_gradients(row.deltas, row.saved)
        by_head = [blocks.sum_by_head(x, plan.block_q) for x in by_row]
        dparameters = jnp.stack(by_head).astype(inputs.normalizer_parameters.dtype)

    # Tiles leave the scale out: see `tile.TileGradients`. Integer inputs have no gradient (None).
    dk = blocks.join(plan.scale * dk, plan.block_k, num_keys)
    dv = blocks.join(dv, plan.block_k, num_keys)
    return UngatedInputs(
        q=blocks.join(dq, plan.block_q, inputs.q.shape[1]),
        k=dk.astype(inputs.k.dtype),
        v=dv.astype(inputs.v.dtype),
        sink_logits=dsink,
        alibi_slopes=dslopes,
        normalizer_parameters=dparameters,
    )


# The gate.


def _gated(o: Array, gate_logits: Array | None) -> Array:
    return o if gate_logits is None else o * _sigmoid(gate_logits)


def _gate_gradient(
    dy: Float[Array, "B T H V"],
    gate_logits: Float[Array, "B T H #V"] | None,
    o: Float[Array, "B T H V"],
) -> tuple[Array, Array | None]:
    """do, in the statistics' dtype, and dgate = dy o g (1 - g)."""
    dy = dy.astype(tile.statistics_dtype(dy))
    if gate_logits is None:
        return dy, None
    gate = _sigmoid(gate_logits)
    # y = o g, and the sigmoid's derivative is g (1 - g).
    dgate = dy * o * gate * (1 - gate)
    if gate_logits.shape != o.shape:
        # A head-wise gate multiplies every channel.
        dgate = jnp.sum(dgate, axis=-1, keepdims=True)
    return dy * gate, dgate.astype(gate_logits.dtype)


def _sigmoid(gate_logits: Array) -> Array:
    """sigmoid(gate_logits), in float32."""
    return jax.nn.sigmoid(gate_logits.astype(tile.statistics_dtype(gate_logits)))
