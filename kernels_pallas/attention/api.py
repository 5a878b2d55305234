"""`attention` and `attention_step`: the public functions. They check, fill in and dispatch."""

from functools import partial
from typing import Any

from jax import Array
from jaxtyping import Bool, Float, Int

from kernels_pallas import dispatch
from kernels_pallas.attention import cudnn, gpu, mosaic_gpu, reference, xla
from kernels_pallas.attention.checks import (
    check_inputs,
    check_other_keys,
    check_step_inputs,
    checked_options,
    checked_step_options,
    segment_id_pair,
    with_parameters,
)
from kernels_pallas.attention.documents import comparable_ids, document_numbers
from kernels_pallas.attention.inputs import AttentionInputs, Outputs, StepInputs
from kernels_pallas.attention.kernels import over_mesh, step_over_mesh
from kernels_pallas.attention.normalizers.base import Normalizer
from kernels_pallas.attention.tpu import op as tpu
from kernels_pallas.attention.tpu import step as tpu_step
from kernels_pallas.common.checks import all_varying, check_interpret
from kernels_pallas.common.mesh import on_explicit_axes


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S Hk K"],
    v: Float[Array, "B S Hk V"],
    *,
    gate_logits: Float[Array, "B T H V"] | Float[Array, "B T H 1"] | None = None,
    normalizer: str | Normalizer = "softmax",
    causal: bool = True,
    window: int | None = None,
    segment_ids: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    block_mask: Bool[Array, "B H _ _"] | None = None,
    sink_logits: Float[Array, "H"] | None = None,
    alibi_slopes: Float[Array, "H"] | None = None,
    normalizer_parameters: Float[Array, "P H"] | None = None,
    logits_soft_cap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: dispatch.Implementation | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H V"] | Any:  # `Outputs`: a caller knows which of the two it asked for
    """Attention, its output multiplied by sigmoid(gate_logits).

        s_ij = scale q_i k_j                            the logits
        s_ij = c tanh(s_ij / c)                         with logits_soft_cap c
        s_ij = s_ij - slope |i - j|                     with alibi_slopes
        o_i = sum_j W_ij v_j                            over the keys j that i may see
        W_ij = exp(s_ij) / (exp(sink) + sum_j exp(s_ij))        for softmax
        y_i = o_i sigmoid(gate_i)

    The weights of the other normalizers are in `normalizers/`. Memory is linear in T, forward and
    backward. Differentiable in every float input.

    Masks select. Whatever a token may not see (another document, what comes later, what is outside
    of the window) may be NaN or infinite: the token's output and gradients are the same bits. What
    it sees shows: of NaN comes NaN. Infinite logits give what the formula gives: a weight of 0, or
    NaN, as in a row of softmax whose every logit is -inf.

    Args:
      q, k, v: queries, keys and values, float16, bfloat16, float32 (or float64 under x64).
        Hk divides H: query head h uses key and value head h // (H / Hk). 16-bit inputs are
        multiplied as such; sums and the softmax are float32. S is T, but without `causal` keys
        may be of another sequence, of any length.
      gate_logits: logits of the gate on the output, element-wise or head-wise; the sigmoid is
        taken in float32.
      normalizer: how logits become weights: a name of `NORMALIZERS`, or an object with other
        parameters, such as Entmax(alpha=1.3).
      causal: token i sees j <= i only.
      window: w >= 1: token i sees j with i-w < j <= i, and |i-j| < w without `causal`. None, or
        any number from T on, is no limit.
      segment_ids: documents packed in a row, integers of any dtype. A document is a run of equal
        ids, and tokens see only their own; an id that comes back later is another document. Where
        keys are of another sequence, a pair (of queries, of keys): tokens see keys of an equal id,
        wherever it is.
      block_mask: bool, which blocks of 64 keys the queries of a block of 64 may see, beside what
        else they may: [B, H, ceil(T / 64), ceil(S / 64)]. It has no gradient.
      sink_logits: a logit per head that takes its part of the weight and has no value; softmax
        only. Zeros are "softmax plus one".
      alibi_slopes: per head, >= 0 to favor near keys (arXiv 2108.12409); learned or not. Added
        after the soft cap.
      normalizer_parameters: learned numbers of the normalizer, a row of one a head for each of its
        `parameters`, in their order: entmax's alpha, for one. None for their starts; other
        normalizers have none.
      logits_soft_cap: c > 0.
      scale: a number, K**-0.5 if None.
      return_lse: also return log(exp(sink) + sum_j exp(s_ij)) of every row; softmax only. With it
        `merge_attention` makes one attention of several over other keys.
      implementation: None, "reference", "xla", "tpu", "gpu", "cudnn" or "mosaic_gpu" (the last two
        are never chosen by None); see `kernels_pallas.dispatch`.
      interpret: run a named kernel ("tpu", "gpu", "mosaic_gpu") in interpret mode, on CPU.

    Returns:
      y in v's dtype; with `return_lse` (y, lse), lse [B, H, T] in float32 (float64 if an input is),
      -inf where a query sees nothing. Differentiable in both.

    Raises:
      ValueError: a shape, dtype or option that does not fit, by name.
      NotImplementedError: the implementation asked for does not cover this call.

    Sources: the gate, position G1 of arXiv 2505.06708; online softmax 1805.02867; tiles recomputed
    in the backward pass 2205.14135; sinks as in gpt-oss.
    """
    op = "attention"
    query_segments, key_segments = segment_id_pair(op, segment_ids)
    inputs = AttentionInputs(
        q=q,
        k=k,
        v=v,
        gate_logits=gate_logits,
        sink_logits=sink_logits,
        alibi_slopes=alibi_slopes,
        segment_ids=query_segments,
        key_segment_ids=key_segments,
        block_mask=block_mask,
    )
    check_inputs(op, inputs)
    inputs = with_parameters(op, inputs, normalizer, normalizer_parameters)
    if query_segments is not None and key_segments is not None:
        query_segments, key_segments = comparable_ids(query_segments, key_segments)
    elif query_segments is not None:
        query_segments = document_numbers(query_segments)
    inputs = inputs._replace(segment_ids=query_segments, key_segment_ids=key_segments)
    options = checked_options(
        op,
        inputs,
        normalizer=normalizer,
        causal=causal,
        window=window,
        logits_soft_cap=logits_soft_cap,
        scale=scale,
        return_lse=return_lse,
    )
    check_other_keys(op, inputs, options.causal)
    # Only here: a part of a sequence (`sharded.py`) does not know the number of keys by itself.
    options = options.for_length(k.shape[1], num_queries=q.shape[1])
    check_interpret(op, interpret, implementation)

    # A kernel that is asked says why it cannot take this call, or None. The reference and xla take
    # every call.
    refusals = {
        "tpu": partial(tpu.unsupported, inputs, options),
        "gpu": partial(gpu.unsupported, inputs, options),
        "cudnn": partial(cudnn.unsupported, inputs, options),
        "mosaic_gpu": partial(mosaic_gpu.unsupported, inputs, options),
    }
    chosen = dispatch.choose(op, implementation, refusals, inputs)
    inputs = dispatch.for_its_platform(op, chosen, interpret, inputs)
    # Inside shard_map a custom derivative wants all of its inputs varying alike.
    inputs = AttentionInputs._make(all_varying(*inputs))
    if chosen in ("reference", "xla"):
        plain = reference.attention if chosen == "reference" else xla.attention

        def attend(inputs: AttentionInputs) -> Outputs:
            return plain(inputs, options)

        # XLA splits these by itself, but not where types must say how each array is split.
        if on_explicit_axes(*inputs):
            return over_mesh(attend, inputs)
        return attend(inputs)
    if chosen == "tpu":
        return tpu.attention(inputs, options, interpret=interpret)
    if chosen == "cudnn":
        return cudnn.attention(inputs, options)
    if chosen == "mosaic_gpu":
        return mosaic_gpu.attention(inputs, options, interpret=interpret)
    # The one that is left.
    return gpu.attention(inputs, options, interpret=interpret)


def attention_step(
    q: Float[Array, "B H K"],
    k_cache: Float[Array, "B S Hk K"],
    v_cache: Float[Array, "B S Hk V"],
    *,
    valid: Bool[Array, "B S"],
    gate_logits: Float[Array, "B H V"] | Float[Array, "B H 1"] | None = None,
    normalizer: str | Normalizer = "softmax",
    sink_logits: Float[Array, "H"] | None = None,
    alibi_slopes: Float[Array, "H"] | None = None,
    distances: Int[Array, "B S"] | None = None,
    normalizer_parameters: Float[Array, "P H"] | None = None,
    logits_soft_cap: float | None = None,
    scale: float | None = None,
    implementation: dispatch.Implementation | None = None,
    interpret: bool = False,
) -> Float[Array, "B H V"]:
    """One token of `attention` against a cache, for decoding: the same formulas without T.

    Differentiable. On TPU and GPU a kernel reads the cache, split over its length; elsewhere XLA
    does. The one of TPUs does not read blocks in which no slot is valid.

    Args:
      q, k_cache, v_cache: one query, and the keys and values of S slots. The order of the slots
        does not matter, so a ring buffer will do.
      valid: which slots the token may see, itself included: causality, window and documents are
        expressed here. The other slots may hold anything, NaN too. A token that sees no slot has
        o = 0 and no gradient.
      normalizer: as in `attention`. One that depends on the number of keys (sigmoid, relu, clipped
        softmax) must be an object with a length, because the number of slots says nothing.
      distances: how many tokens back each slot's key is, integers of any dtype; with
        `alibi_slopes`, and only then.
      gate_logits, sink_logits, alibi_slopes, normalizer_parameters, logits_soft_cap, scale: as in
        `attention`.
      implementation, interpret: as in `attention`.

    Returns:
      y in v_cache's dtype.

    Raises:
      ValueError: a shape, dtype or option that does not fit, by name.
      NotImplementedError: the implementation asked for does not cover this call.
    """
    op = "attention_step"
    inputs = StepInputs(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        gate_logits=gate_logits,
        sink_logits=sink_logits,
        alibi_slopes=alibi_slopes,
        valid=valid,
        distances=distances,
    )
    check_step_inputs(op, inputs)
    inputs = with_parameters(op, inputs, normalizer, normalizer_parameters)
    options = checked_step_options(
        op,
        inputs,
        normalizer=normalizer,
        logits_soft_cap=logits_soft_cap,
        scale=scale,
    )
    check_interpret(op, interpret, implementation)

    refusals = {
        "tpu": partial(tpu_step.unsupported, inputs, options),
        "gpu": partial(gpu.unsupported_step, inputs, options),
    }
    chosen = dispatch.choose(op, implementation, refusals, inputs)
    inputs = dispatch.for_its_platform(op, chosen, interpret, inputs)
    inputs = StepInputs._make(all_varying(*inputs))
    if chosen in ("reference", "xla"):
        plain = reference.attention_step if chosen == "reference" else xla.attention_step

        def attend(inputs: StepInputs) -> Array:
            return plain(inputs, options)

        # As in `attention`.
        if on_explicit_axes(*inputs):
            return step_over_mesh(attend, inputs)
        return attend(inputs)
    if chosen == "tpu":
        return tpu_step.attention_step(inputs, options, interpret=interpret)
    return gpu.attention_step(inputs, options, interpret=interpret)
