"""`attention` without Pallas: tiles with an online normalizer, memory linear in T both ways.

This is the entry: the static arguments of a call, the gate, and the derivatives. The loops over
tiles are in `block_loops.py`. The forward pass keeps the output and a few numbers a row, from which
the backward pass recomputes the tiles.

The log-sum-exp is a number that the forward pass keeps anyway. Its gradient joins that of the
logits, ds = p (dp - sum(do o) + dlse): so it is taken from sum(do o), and nothing else changes.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from kernels_pallas.attention import block_loops, blocks, reference, tile
from kernels_pallas.attention.blocks import Plan, UngatedInputs
from kernels_pallas.attention.inputs import (
    AttentionInputs,
    AttentionOptions,
    Outputs,
    StepInputs,
    StepOptions,
    statistics_dtype,
)
from kernels_pallas.attention.normalizers.base import Row
from kernels_pallas.common.opaque import opaque
from kernels_pallas.common.second_order import differentiable_gradient, kept

# What the op names with `checkpoint_name`.
OUT_NAME = "attention_out"
STATISTIC_NAME = "attention_lse"
# By kernels only: as they came, rotated and normed.
QUERIES_AND_KEYS_NAME = "attention_queries_and_keys"


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
    outputs, saved = block_loops.forward(plan, inputs)
    return _results(plan, inputs, gate_logits, outputs, saved)


def _results(
    plan: Plan,
    inputs: UngatedInputs,
    gate_logits: Array | None,
    outputs: tuple[Array, ...],
    saved: Row,
) -> Outputs:
    """y, and with `return_lse` the log-sum-exp, of what `block_loops.forward` returned."""
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
    return block_loops.input_gradients(plan, inputs, row), dgate


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
    outputs, saved = block_loops.forward(plan, inputs)
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


# The gate.


def _gated(o: Array, gate_logits: Array | None) -> Array:
    return o if gate_logits is None else o * _sigmoid(gate_logits)


def _gate_gradient(
    dy: Float[Array, "B T H V"],
    gate_logits: Float[Array, "B T H #V"] | None,
    o: Float[Array, "B T H V"],
) -> tuple[Array, Array | None]:
    """do, in the statistics' dtype, and dgate = dy o g (1 - g)."""
    dy = dy.astype(statistics_dtype(dy))
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
    return jax.nn.sigmoid(gate_logits.astype(statistics_dtype(gate_logits)))
