"""What the TPU and GPU backends share around their kernels: refusals, the mesh, what is saved.

The forward pass saves for the backward pass, beside its inputs:

    the ungated output in float32 (or y, where that is the same array), and other outputs of the
        normalizer that its gradient needs; by the name "attention_out", as is y
    a few statistics of every row, such as the log-sum-exp; by the name "attention_lse"

A checkpoint policy that keeps both names runs no kernel again.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.attention import xla
from kernels_pallas.attention.inputs import (
    AttentionInputs,
    AttentionOptions,
    Outputs,
    StepInputs,
    StepOptions,
)
from kernels_pallas.attention.normalizers.base import Normalizer
from kernels_pallas.attention.xla import OUT_NAME, QUERIES_AND_KEYS_NAME, STATISTIC_NAME
from kernels_pallas.common.mesh import by_rows_and_heads
from kernels_pallas.common.padding import padded

# An input of a kernel, or the shape and dtype of an output.
Shaped = Array | jax.ShapeDtypeStruct

GateKind = Literal["none", "head", "element"]


def gate_kind(gate_logits: Array | None) -> GateKind:
    """Whether there is an output gate, and whether it has one value a head or one an element."""
    if gate_logits is None:
        return "none"
    return "head" if gate_logits.shape[-1] == 1 else "element"


# --- what no kernel covers


def unsupported_arrays(
    q: Array,
    k: Array,
    v: Array,
    normalizer: Normalizer,
    max_channels: int,
) -> str | None:
    """Why a kernel cannot take these arrays, or None if it can.

    Args:
      q: queries, [..., K].
      k: keys, [..., K].
      v: values, [..., V].
      normalizer: how logits become weights.
      max_channels: the largest K and V that the kernel's blocks are made for.

    Returns:
      The end of a sentence that begins with the name of the backend.
    """
    if any(x.dtype == jnp.float64 for x in (q, k, v)):
        return "does not compute in float64"
    K = q.shape[-1]
    V = v.shape[-1]
    if max(K, V) > max_channels:
        return f"takes K and V up to {max_channels}, not {K} and {V}"
    if normalizer.passes > 1:
        name = type(normalizer).__name__
        return f"takes normalizers that pass over the keys once, not {name}"
    if normalizer.parameters:
        name = type(normalizer).__name__
        return f"takes normalizers without learned numbers, not {name}: implementation='xla' does"
    return None


def unsupported_other_keys(inputs: AttentionInputs, options: AttentionOptions) -> str | None:
    """Why a kernel of self-attention that returns y alone cannot take a call, or None."""
    T = inputs.q.shape[1]
    S = inputs.k.shape[1]
    if S != T:
        return f"takes as many keys as queries, not {S} and {T}"
    if inputs.key_segment_ids is not None:
        return "takes no segment_ids of keys apart from those of queries"
    if inputs.block_mask is not None:
        return "takes no block_mask"
    return "returns no log-sum-exp (return_lse)" if options.return_lse else None


# --- what kernels of a GPU get


def padded_tokens(x: Array, length: int, width: int) -> Array:
    """[B, T, heads, D] padded with zeros to [B, length, heads, width]."""
    whole_blocks = padded(x, 1, length)
    return padded(whole_blocks, 3, width)


def gate_for_kernel(
    gate_logits: Array | None,
    length: int,
    width: int,
) -> Array | None:
    """[B, length, H, width], or for a gate by head [B, H, length] in float32."""
    if gate_logits is None:
        return None
    if gate_kind(gate_logits) == "element":
        return padded_tokens(gate_logits, length, width)
    # [B, T, H, 1] -> [B, H, T]: consecutive tokens of a head are consecutive in memory.
    by_head = jnp.swapaxes(gate_logits[..., 0], 1, 2)
    return padded(by_head.astype(jnp.float32), 2, length)


# --- on a mesh


def over_mesh(attend: Callable[[AttentionInputs], Outputs], inputs: AttentionInputs) -> Outputs:
    """attend(inputs) where every device of the ambient mesh computes its own rows and heads."""
    axes = {
        "q": "b.h.",
        "k": "b.h.",
        "v": "b.h.",
        "gate_logits": "b.h.",
        "sink_logits": "h",
        "alibi_slopes": "h",
        "segment_ids": "b.",
        "key_segment_ids": "b.",
        "block_mask": "bh..",
        "normalizer_parameters": ".h",
    }

    def attend_part(*arrays: Any) -> tuple[Array, Array | None]:
        result = attend(AttentionInputs(*arrays))
        return result if isinstance(result, tuple) else (result, None)

    # A device must hold the query heads of the key heads that it holds, so both are cut alike.
    common_heads = math.gcd(inputs.q.shape[2], inputs.k.shape[2])
    y, lse = by_rows_and_heads(
        attend_part,
        tuple(inputs),
        [axes[name] for name in AttentionInputs._fields],
        ["b.h.", "bh."],
        common_heads,
    )
    assert y is not None
    return y if lse is None else (y, lse)


def step_over_mesh(attend: Callable[[StepInputs], Array], inputs: StepInputs) -> Array:
    """`over_mesh` of one token against a cache."""
    axes = {
        "q": "bh.",
        "k_cache": "b.h.",
        "v_cache": "b.h.",
        "gate_logits": "bh.",
        "sink_logits": "h",
        "alibi_slopes": "h",
        "valid": "b.",
        "distances": "b.",
        "normalizer_parameters": ".h",
    }

    def attend_part(*arrays: Any) -> tuple[Array]:
        return (attend(StepInputs(*arrays)),)

    # As in `over_mesh`.
    common_heads = math.gcd(inputs.q.shape[1], inputs.k_cache.shape[2])
    (y,) = by_rows_and_heads(
        attend_part,
        tuple(inputs),
        [axes[name] for name in StepInputs._fields],
        ["bh."],
        common_heads,
    )
    assert y is not None
    return y


# --- one token against a cache


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gated_step(
    ungated: Callable[[StepInputs], Array],
    options: StepOptions,
    inputs: StepInputs,
) -> Array:
    """y [B, H, V] of a kernel of one token, with the gradients of the xla backend.

    Nobody trains by decoding, so no kernel computes gradients.

    Args:
      ungated: the kernel: the output before the gate, float32 [B, H, V].
      options: the static arguments of the call.
      inputs: its arrays.

    Returns:
      y in the dtype of the values.
    """
    output = ungated(inputs)
    if inputs.gate_logits is not None:
        gate_logits = inputs.gate_logits.astype(jnp.float32)
        output = output * jax.nn.sigmoid(gate_logits)
    return output.astype(inputs.v_cache.dtype)


def _step_saving(
    ungated: Callable[[StepInputs], Array],
    options: StepOptions,
    inputs: StepInputs,
) -> tuple[Array, StepInputs]:
    return gated_step(ungated, options, inputs), inputs


def _step_backward(
    ungated: Callable[[StepInputs], Array],
    options: StepOptions,
    inputs: StepInputs,
    dy: Array,
) -> tuple[StepInputs]:
    # A kernel of the forward pass can be interpreted; the gradients come from none.
    del ungated

    def step_by_xla(inputs: StepInputs) -> Array:
        return xla.attention_step(inputs, options)

    _, pull_back = jax.vjp(step_by_xla, inputs)
    return pull_back(dy)


gated_step.defvjp(_step_saving, _step_backward)


# --- the cost of a call


def count_visible_pairs(T: int, causal: bool, window: int | None) -> int:
    """Pairs of a query and a key that the mask leaves, without segments."""
    reach = T if window is None else min(window, T)
    # The first `reach` queries see 1, 2, ... keys up to themselves, and every later one `reach`.
    up_to_itself = reach * (T - reach) + reach * (reach + 1) // 2
    # Without causality a query also sees keys after it, as many in all; itself is counted once.
    return up_to_itself if causal else 2 * up_to_itself - T


# --- what the backward pass gets


def row_statistics(normalizer: Normalizer) -> int:
    """How many numbers of a row the normalizer keeps while the kernel loops over the keys."""
    column = jax.ShapeDtypeStruct((8, 1), jnp.float32)
    return len(jax.eval_shape(normalizer.start, column))


def saved_statistics(normalizer: Normalizer) -> int:
    """How many numbers of a row the normalizer saves for the backward pass."""
    column = jax.ShapeDtypeStruct((8, 1), jnp.float32)
    weighted_sum = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    _, saved = jax.eval_shape(
        normalizer.finish,
        (column,) * row_statistics(normalizer),
        [weighted_sum] * normalizer.sums,
    )
    return len(saved)


def y_is_output(gate: GateKind, out_dtype: jnp.dtype) -> bool:
    """Whether y is the normalizer's first output itself: not gated and not rounded."""
    return gate == "none" and out_dtype == jnp.float32


def saved_outputs(normalizer: Normalizer, gate: GateKind, out_dtype: jnp.dtype) -> list[int]:
    """Which outputs of the normalizer the forward kernel writes out for the backward pass."""
    needed = set(normalizer.deltas)
    if gate != "none":
        # The gradient of the gate is a product with the ungated output.
        needed.add(0)
    if y_is_output(gate, out_dtype):
        needed.discard(0)
    return sorted(needed)


class ForwardResult(NamedTuple):
    """What a forward kernel returns.

    Attributes:
      y: the gated output.
      outputs: ungated outputs of the normalizer in float32, by their number: `saved_outputs`.
      statistics: what the normalizer saves of every row, float32.
    """

    y: Array
    outputs: dict[int, Array]
    statistics: list[Array]


def forward_result(results: dict[str, Array]) -> ForwardResult:
    """From a kernel's results by name: "y", "o0", "o1", ..., "saved0", "saved1", ..."""
    outputs = {}
    statistics = []
    for name, array in results.items():
        if name.startswith("saved"):
            statistics.append(array)
        elif name.startswith("o"):
            outputs[int(name.removeprefix("o"))] = array
    return ForwardResult(results["y"], outputs, statistics)


class Residuals(NamedTuple):
    """What the backward pass gets: the kernel's inputs, and what the forward pass saved."""

    inputs: Any
    outputs: dict[int, Array]
    statistics: list[Array]


def residuals(
    result: ForwardResult, inputs: Any, normalizer: Normalizer
) -> tuple[Array, Residuals]:
    """(y, what the backward pass gets), with the names that a checkpoint policy can keep.

    Queries and keys have a name for the backward pass alone: what the forward pass names and uses,
    jax rounds to the dtype it has, in a pass of its own over what a kernel returned.
    """
    inputs = inputs._replace(
        q=checkpoint_name(inputs.q, QUERIES_AND_KEYS_NAME),
        k=checkpoint_name(inputs.k, QUERIES_AND_KEYS_NAME),
    )
    # A layer multiplies y by a matrix and needs it again for that matrix's gradient.
    y = checkpoint_name(result.y, OUT_NAME)
    outputs = {n: checkpoint_name(o, OUT_NAME) for n, o in result.outputs.items()}
    if 0 in normalizer.deltas and 0 not in outputs:
        # `saved_outputs` left it out because y is the same array.
        outputs[0] = y
    statistics = [checkpoint_name(x, STATISTIC_NAME) for x in result.statistics]
    return y, Residuals(inputs, outputs, statistics)
