"""`attention` and `attention_step`: the public functions. Checks, defaults and the choice of implementation."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kernels_pallas import dispatch
from kernels_pallas.attention import reference, xla
from kernels_pallas.attention.gpu import op as gpu
from kernels_pallas.attention.normalizers.base import Normalizer
from kernels_pallas.attention.normalizers.named import NORMALIZERS
from kernels_pallas.attention.tpu import op as tpu
from kernels_pallas.common.checks import (
    all_varying,
    check_float,
    check_integer,
    check_interpret,
    check_shape,
    default_scale,
)


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T Hk V"],
    *,
    gate_logits: Float[Array, "B T H V"] | Float[Array, "B T H 1"] | None = None,
    normalizer: str | Normalizer = "softmax",
    causal: bool = True,
    window: int | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    sink_logits: Float[Array, "H"] | None = None,
    alibi_slopes: Float[Array, "H"] | None = None,
    logits_soft_cap: float | None = None,
    scale: float | None = None,
    implementation: dispatch.Implementation | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H V"]:
    """Self-attention, its output multiplied by sigmoid(gate_logits). Memory is linear in T, forward and backward.

        s_ij = scale q_i k_j,  or c tanh(scale q_i k_j / c) with logits_soft_cap c;  less slope |i - j| with alibi_slopes
        o_i = sum_j W_ij v_j,  j over the keys that i may see
        W_ij = exp(s_ij) / (exp(sink) + sum_j exp(s_ij))  for softmax; see `normalizers/base.py` for the others
        y_i = o_i sigmoid(gate_i)

    Differentiable in every float input. A token that may see nothing has o = 0 and no gradient.

    Args:
      q, k, v: queries, keys and values, float16, bfloat16, float32 (or float64 under x64). Hk divides H: query head h
        uses key and value head h // (H / Hk). 16-bit inputs are multiplied as such; sums and the softmax are float32.
      gate_logits: pre-activation of the gate on the output, element-wise or head-wise; the sigmoid is taken in float32.
      normalizer: how logits become weights: a name of `NORMALIZERS`, or an object with other parameters, as Entmax(alpha=1.3).
      causal: token i sees j <= i only.
      window: w: token i sees j with i-w < j <= i, and |i-j| < w without `causal`.
      segment_ids: documents packed in a row: tokens see only those of equal id.
      sink_logits: a logit per head that takes its share of the weight and has no value; softmax only. Zeros:
        "softmax plus one".
      alibi_slopes: per head, >= 0 to favor near keys (arXiv 2108.12409); learned or not. Added after the soft cap.
      logits_soft_cap: c > 0.
      scale: a number, K**-0.5 if None.
      implementation: None, "reference", "xla", "tpu" or "gpu"; see `kernels_pallas.dispatch`.
      interpret: run a named kernel ("tpu", "gpu") in interpret mode, on CPU.

    Returns:
      y in v's dtype.

    Raises:
      ValueError: a shape, dtype or option that does not fit, by name.
      NotImplementedError: the implementation asked for does not cover this call.

    Sources: the gate, position G1 of arXiv 2505.06708; online softmax 1805.02867; tiles recomputed in the backward pass
    2205.14135; sinks as in gpt-oss.
    """
    op = "attention"
    normalizer = check_call(
        op,
        q,
        k,
        v,
        gate_logits,
        normalizer,
        window,
        segment_ids,
        sink_logits,
        alibi_slopes,
        logits_soft_cap,
    )
    check_interpret(op, interpret, implementation)
    refusals = {
        "tpu": tpu.unsupported(q, k, v, normalizer),
        "gpu": gpu.unsupported(q, k, v, normalizer),
    }
    chosen = dispatch.choose(op, implementation, refusals)
    room = {"reference": reference, "xla": xla, "tpu": tpu, "gpu": gpu}[chosen]
    arrays = all_varying(q, k, v, gate_logits, sink_logits, alibi_slopes, segment_ids)
    fixed = dict(
        causal=causal,
        window=window,
        logits_soft_cap=logits_soft_cap,
        scale=default_scale(scale, q.shape[-1]),
    )
    if interpret:
        fixed["interpret"] = interpret
    return room.attention(*arrays, normalizer=normalizer.for_length(q.shape[1]), **fixed)


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
    logits_soft_cap: float | None = None,
    scale: float | None = None,
    implementation: dispatch.Implementation | None = None,
    interpret: bool = False,
) -> Float[Array, "B H V"]:
    """One token of `attention` against a cache, for decoding: the same formulas and arguments without T.

    `valid` says which of the S cache slots the token may see, itself included: causality, window and documents are
    there. The order of the slots does not matter, so a ring buffer will do; `alibi_slopes` want the tokens' `distances`
    from this one. A normalizer with a length (sigmoid, relu, clipped softmax) must be an object that has one, because the
    number of slots says nothing. Differentiable. On GPU a kernel reads the cache, split over its length; elsewhere
    XLA does. Returns y in v_cache's dtype.

    Raises:
      ValueError: a shape, dtype or option that does not fit, by name.
      NotImplementedError: the implementation asked for does not cover this call.
    """
    op = "attention_step"
    _check_queries_and_keys(op, q, {"k_cache": k_cache, "v_cache": v_cache}, "S")
    normalizer = _normalizer(op, normalizer, sink_logits)
    if normalizer != normalizer.for_length(1):
        raise ValueError(
            f"{op}: normalizer: got {normalizer} without a length, expected {type(normalizer).__name__}(length=...)"
        )
    _check_row_options(
        op,
        q,
        v_cache,
        gate_logits,
        {"sink_logits": sink_logits, "alibi_slopes": alibi_slopes},
        logits_soft_cap,
    )
    if valid.shape != k_cache.shape[:2]:
        raise ValueError(f"{op}: valid: got shape {valid.shape}, expected {k_cache.shape[:2]}")
    if valid.dtype != jnp.bool_:
        raise ValueError(f"{op}: valid: got dtype {valid.dtype}, expected bool")
    if distances is not None:
        check_shape(op, "distances", distances, k_cache.shape[:2])
        check_integer(op, "distances", distances)
    if (alibi_slopes is None) != (distances is None):
        raise ValueError(
            f"{op}: alibi_slopes, distances: got one of them, expected both or neither"
        )
    check_interpret(op, interpret, implementation)
    refusals = {
        "tpu": tpu.unsupported_step(),
        "gpu": gpu.unsupported_step(q, k_cache, v_cache, normalizer),
    }
    room = {"reference": reference, "xla": xla, "gpu": gpu}[
        dispatch.choose(op, implementation, refusals)
    ]
    arrays = all_varying(
        q, k_cache, v_cache, gate_logits, sink_logits, alibi_slopes, valid, distances
    )
    fixed = dict(logits_soft_cap=logits_soft_cap, scale=default_scale(scale, q.shape[-1]))
    if interpret:
        fixed["interpret"] = interpret
    return room.attention_step(*arrays, normalizer=normalizer, **fixed)


def check_call(
    op,
    q,
    k,
    v,
    gate_logits,
    normalizer,
    window,
    segment_ids,
    sink_logits,
    alibi_slopes,
    logits_soft_cap,
) -> Normalizer:
    """The normalizer as an object. Raises ValueError for an argument of `attention` that does not fit, by name."""
    _check_queries_and_keys(op, q, {"k": k, "v": v}, "T")
    normalizer = _normalizer(op, normalizer, sink_logits)
    _check_row_options(
        op,
        q,
        v,
        gate_logits,
        {"sink_logits": sink_logits, "alibi_slopes": alibi_slopes},
        logits_soft_cap,
    )
    if k.shape[1] != q.shape[1]:
        raise ValueError(
            f"{op}: k: got shape {k.shape}, expected {q.shape[1]} tokens as in q of shape {q.shape}"
        )
    if segment_ids is not None:
        check_shape(op, "segment_ids", segment_ids, q.shape[:2])
        check_integer(op, "segment_ids", segment_ids)
    if window is not None and window < 1:
        raise ValueError(
            f"{op}: window: got {window}, expected None or a number of tokens from 1 on"
        )
    return normalizer


def _normalizer(op: str, normalizer: str | Normalizer, sink_logits: Array | None) -> Normalizer:
    if not isinstance(normalizer, Normalizer):
        if normalizer not in NORMALIZERS:
            raise ValueError(
                f"{op}: normalizer: got {normalizer!r}, expected a Normalizer or one of {', '.join(NORMALIZERS)}"
            )
        normalizer = NORMALIZERS[normalizer]
    if sink_logits is not None and not normalizer.takes_sinks:
        raise ValueError(
            f"{op}: sink_logits: got an array with normalizer={normalizer}, expected none: only softmax has sinks"
        )
    return normalizer


def _check_queries_and_keys(op: str, q, keys: dict, time: str) -> None:
    """q [B, (T,) H, K] against k and v [B, T or S, Hk, K or V], by the names that the caller gave them."""
    query_axes = "[B, T, H, K]" if time == "T" else "[B, H, K]"
    if q.ndim != query_axes.count(",") + 1 or 0 in q.shape:
        raise ValueError(f"{op}: q: got shape {q.shape}, expected {query_axes} with no empty axis")
    (k_name, k), (v_name, v) = keys.items()
    for name, x, last in ((k_name, k, "K"), (v_name, v, "V")):
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(
                f"{op}: {name}: got shape {x.shape}, expected [B, {time}, Hk, {last}] with no empty axis"
            )
    B, *_, H, K = q.shape
    if k.shape[0] != B or k.shape[3] != K or H % k.shape[2]:
        expected = [B, time, f"a divisor of {H}", K]
        raise ValueError(
            f"{op}: {k_name}: got shape {k.shape}, expected {expected} for q of shape {q.shape}"
        )
    if v.shape[:3] != k.shape[:3]:
        expected = [*k.shape[:3], "V"]
        raise ValueError(
            f"{op}: {v_name}: got shape {v.shape}, expected {expected} for {k_name} of shape {k.shape}"
        )
    for name, x in {"q": q, **keys}.items():
        check_float(op, name, x)


def _check_row_options(
    op: str, q, v, gate_logits, by_head: dict, logits_soft_cap: float | None
) -> None:
    if gate_logits is not None:
        shapes = ((*q.shape[:-1], v.shape[-1]), (*q.shape[:-1], 1))
        if gate_logits.shape not in shapes:
            raise ValueError(
                f"{op}: gate_logits: got shape {gate_logits.shape}, expected {shapes[0]} or {shapes[1]}"
            )
        check_float(op, "gate_logits", gate_logits)
    for name, x in by_head.items():
        if x is not None:
            if x.shape != q.shape[-2:-1]:
                raise ValueError(f"{op}: {name}: got shape {x.shape}, expected {q.shape[-2:-1]}")
            check_float(op, name, x)
    if logits_soft_cap is not None and not logits_soft_cap > 0:
        raise ValueError(
            f"{op}: logits_soft_cap: got {logits_soft_cap}, expected None or a number above 0"
        )
