"""Checks of the arguments of attention, and the defaults of its static ones.

What does not fit is a ValueError that names the op, the argument, what was got and what was
expected.
"""

import math
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from kernels_pallas.attention.doubly_stochastic import NOT_CAUSAL
from kernels_pallas.attention.inputs import (
    MASK_BLOCK,
    AttentionInputs,
    AttentionOptions,
    StepInputs,
    StepOptions,
    statistics_dtype,
)
from kernels_pallas.attention.normalizers.base import Normalizer, Softmax
from kernels_pallas.attention.normalizers.named import NORMALIZERS
from kernels_pallas.common.checks import (
    check_bool,
    check_integer,
    check_shape,
    default_scale,
)

_FLOAT_DTYPES = tuple(
    jnp.dtype(dtype) for dtype in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)
)


def check_inputs(op: str, inputs: AttentionInputs) -> None:
    """Raises ValueError for an array of `attention` that does not fit."""
    q = inputs.q
    k = inputs.k
    v = inputs.v
    # The number of axes comes first: what follows reads them by their places.
    _check_axes(op, "q", q, "[B, T, H, K]")
    _check_axes(op, "k", k, "[B, S, Hk, K]")
    _check_axes(op, "v", v, "[B, S, Hk, V]")
    _check_keys(op, "k", k, "v", v, q, length="S")

    _check_gate_logits(op, inputs.gate_logits, q, v)
    _check_by_head(op, "sink_logits", inputs.sink_logits, q)
    _check_by_head(op, "alibi_slopes", inputs.alibi_slopes, q)
    if inputs.segment_ids is not None:
        check_shape(op, "segment_ids", inputs.segment_ids, q.shape[:2])
        check_integer(op, "segment_ids", inputs.segment_ids)
    if inputs.key_segment_ids is not None:
        check_shape(op, "segment_ids of keys", inputs.key_segment_ids, k.shape[:2])
        check_integer(op, "segment_ids of keys", inputs.key_segment_ids)
    if inputs.block_mask is not None:
        blocks = (-(-q.shape[1] // MASK_BLOCK), -(-k.shape[1] // MASK_BLOCK))
        check_shape(op, "block_mask", inputs.block_mask, (q.shape[0], q.shape[2], *blocks))
        check_bool(op, "block_mask", inputs.block_mask)


def check_same_length(op: str, inputs: AttentionInputs) -> None:
    """Raises ValueError where keys are of another number of tokens than queries."""
    q = inputs.q
    k = inputs.k
    if k.shape[1] != q.shape[1]:
        expected = f"{q.shape[1]} tokens as in q of shape {q.shape}"
        raise ValueError(f"{op}: k: got shape {k.shape}, expected {expected}")


def check_other_keys(
    op: str,
    inputs: AttentionInputs,
    causal: bool,
) -> None:
    """Raises ValueError for keys of another sequence where that has no meaning."""
    if causal:
        # Their tokens would have to be the same ones.
        check_same_length(op, inputs)
        if inputs.key_segment_ids is not None:
            problem = "got a pair with causal=True, expected one array or causal=False"
            raise ValueError(f"{op}: segment_ids: {problem}")
    T = inputs.q.shape[1]
    S = inputs.k.shape[1]
    if T != S and inputs.segment_ids is not None and inputs.key_segment_ids is None:
        expected = "a pair (of queries, of keys)"
        raise ValueError(
            f"{op}: segment_ids: got one array for {T} queries and {S} keys, expected {expected}"
        )


def segment_id_pair(op: str, segment_ids: Any) -> tuple[Array | None, Array | None]:
    """(of queries, of keys): what `attention` got as `segment_ids`; None where it got none."""
    if not isinstance(segment_ids, tuple | list):
        return segment_ids, None
    if len(segment_ids) != 2 or any(ids is None for ids in segment_ids):
        got = f"got {len(segment_ids)} of them"
        raise ValueError(f"{op}: segment_ids: {got}, expected an array or a pair of arrays")
    of_queries, of_keys = segment_ids
    return of_queries, of_keys


def check_step_inputs(op: str, inputs: StepInputs) -> None:
    """Raises ValueError for an array of `attention_step` that does not fit."""
    q = inputs.q
    k = inputs.k_cache
    v = inputs.v_cache
    _check_axes(op, "q", q, "[B, H, K]")
    _check_axes(op, "k_cache", k, "[B, S, Hk, K]")
    _check_axes(op, "v_cache", v, "[B, S, Hk, V]")
    _check_keys(op, "k_cache", k, "v_cache", v, q, length="S")

    _check_gate_logits(op, inputs.gate_logits, q, v)
    _check_by_head(op, "sink_logits", inputs.sink_logits, q)
    _check_by_head(op, "alibi_slopes", inputs.alibi_slopes, q)
    check_shape(op, "valid", inputs.valid, k.shape[:2])
    check_bool(op, "valid", inputs.valid)
    if inputs.distances is not None:
        check_shape(op, "distances", inputs.distances, k.shape[:2])
        check_integer(op, "distances", inputs.distances)
    # Slots are in no order, so their positions do not tell the distances.
    if (inputs.alibi_slopes is None) != (inputs.distances is None):
        problem = "got one of them, expected both or neither"
        raise ValueError(f"{op}: alibi_slopes, distances: {problem}")


def checked_options(
    op: str,
    inputs: AttentionInputs,
    *,
    normalizer: str | Normalizer,
    causal: bool,
    window: int | None,
    logits_soft_cap: float | None,
    scale: float | None,
    return_lse: bool = False,
) -> AttentionOptions:
    """The static arguments of `attention`, checked, with their defaults.

    Args:
      op: the public name, for the errors.
      inputs: the arrays of the call, checked.
      normalizer, causal, window, logits_soft_cap, scale, return_lse: as in `api.attention`.

    Returns:
      The options. The normalizer is an object, and does not know the number of keys yet.

    Raises:
      ValueError: an argument that does not fit.
    """
    normalizer = _normalizer_object(op, normalizer, inputs.sink_logits)
    for name, value in {"causal": causal, "return_lse": return_lse}.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"{op}: {name}: got {value!r}, expected True or False")
    if return_lse and type(normalizer) is not Softmax:
        got = f"got True with normalizer={normalizer}"
        raise ValueError(f"{op}: return_lse: {got}, expected False: only softmax has one")
    return AttentionOptions(
        normalizer=normalizer,
        causal=bool(causal),
        window=_checked_window(op, window),
        logits_soft_cap=_checked_soft_cap(op, logits_soft_cap),
        scale=_checked_scale(op, scale, inputs.q.shape[-1]),
        return_lse=bool(return_lse),
    )


def checked_step_options(
    op: str,
    inputs: StepInputs,
    *,
    normalizer: str | Normalizer,
    logits_soft_cap: float | None,
    scale: float | None,
) -> StepOptions:
    """The static arguments of `attention_step`, checked, with their defaults.

    Args:
      op: the public name, for the errors.
      inputs: the arrays of the call, checked.
      normalizer, logits_soft_cap, scale: as in `api.attention`.

    Returns:
      The options.

    Raises:
      ValueError: an argument that does not fit.
    """
    normalizer = _normalizer_object(op, normalizer, inputs.sink_logits)
    # The number of slots says nothing about the number of keys. Whatever changes with a length
    # has none yet.
    if normalizer != normalizer.for_length(1):
        expected = f"{type(normalizer).__name__}(length=...)"
        raise ValueError(
            f"{op}: normalizer: got {normalizer} without a length, expected {expected}"
        )
    return StepOptions(
        normalizer=normalizer,
        logits_soft_cap=_checked_soft_cap(op, logits_soft_cap),
        scale=_checked_scale(op, scale, inputs.q.shape[-1]),
    )


def with_parameters[Inputs: (AttentionInputs, StepInputs)](
    op: str,
    inputs: Inputs,
    normalizer: str | Normalizer,
    parameters: Array | None,
) -> Inputs:
    """The inputs with the normalizer's learned numbers, checked; their starts if none are given.

    Args:
      op: the public name, for the errors.
      inputs: the arrays of the call, checked.
      normalizer, parameters: as `normalizer` and `normalizer_parameters` of `api.attention`.

    Returns:
      The inputs.

    Raises:
      ValueError: a normalizer that there is not, or numbers that it does not have.
    """
    normalizer = _normalizer_object(op, normalizer, inputs.sink_logits)
    starts = normalizer.parameters
    num_heads = inputs.q.shape[-2]
    if parameters is None:
        if not starts:
            return inputs
        # The numbers that a layer would start from, not learned.
        dtype = statistics_dtype(inputs.q)
        rows = [jnp.full(num_heads, start, dtype) for start in starts.values()]
        return inputs._replace(normalizer_parameters=jnp.stack(rows))
    expected = (len(starts), num_heads)
    if not starts or parameters.shape != expected:
        named = f"{expected} for {', '.join(starts)}" if starts else "None"
        raise ValueError(
            f"{op}: normalizer_parameters: got shape {parameters.shape}, expected {named} "
            f"with normalizer={normalizer}"
        )
    _check_float(op, "normalizer_parameters", parameters)
    return inputs._replace(normalizer_parameters=parameters)


def _normalizer_object(
    op: str,
    normalizer: str | Normalizer,
    sink_logits: Array | None,
) -> Normalizer:
    """The normalizer of that name; an object is returned as it is."""
    if not isinstance(normalizer, Normalizer):
        if normalizer in NOT_CAUSAL:
            got = f"{normalizer!r}, which no causal model has: its columns sum over later queries"
            expected = f"kernels_pallas.ops.{NOT_CAUSAL[normalizer]} in its place"
            raise ValueError(f"{op}: normalizer: got {got}; expected {expected}")
        if normalizer not in NORMALIZERS:
            expected = f"a Normalizer or one of {', '.join(NORMALIZERS)}"
            raise ValueError(f"{op}: normalizer: got {normalizer!r}, expected {expected}")
        normalizer = NORMALIZERS[normalizer]
    # Other normalizers have no denominator, or one in which exp(sink) has no meaning.
    if sink_logits is not None and not normalizer.takes_sinks:
        got = f"an array with normalizer={normalizer}"
        expected = "none: only softmax has sinks"
        raise ValueError(f"{op}: sink_logits: got {got}, expected {expected}")
    return normalizer


def _check_axes(
    op: str,
    name: str,
    x: Array,
    axes: str,
) -> None:
    """`axes` as they are printed, such as "[B, T, H, K]"."""
    num_axes = axes.count(",") + 1
    # An empty axis is refused too: a softmax over no keys has no meaning.
    if x.ndim != num_axes or 0 in x.shape:
        raise ValueError(f"{op}: {name}: got shape {x.shape}, expected {axes} with no empty axis")


def _check_keys(
    op: str,
    k_name: str,
    k: Array,
    v_name: str,
    v: Array,
    q: Array,
    *,
    length: str,
) -> None:
    """k [B, T or S, Hk, K] and v [B, T or S, Hk, V] against q [B, (T,) H, K]."""
    B = q.shape[0]
    H, K = q.shape[-2:]
    # Grouped heads: H / Hk query heads share a key head.
    Hk = k.shape[2]
    if k.shape[0] != B or k.shape[3] != K or H % Hk != 0:
        expected = [B, length, f"a divisor of {H}", K]
        raise ValueError(
            f"{op}: {k_name}: got shape {k.shape}, expected {expected} for q of shape {q.shape}"
        )
    # Values have heads like keys, and channels of their own.
    if v.shape[:3] != k.shape[:3]:
        expected = f"{[*k.shape[:3], 'V']} for {k_name} of shape {k.shape}"
        raise ValueError(f"{op}: {v_name}: got shape {v.shape}, expected {expected}")
    _check_float(op, "q", q)
    _check_float(op, k_name, k)
    _check_float(op, v_name, v)


def _check_gate_logits(
    op: str,
    gate_logits: Array | None,
    q: Array,
    v: Array,
) -> None:
    if gate_logits is None:
        return
    # A gate a channel of the output, or one a head.
    element_wise = (*q.shape[:-1], v.shape[-1])
    head_wise = (*q.shape[:-1], 1)
    if gate_logits.shape not in (element_wise, head_wise):
        expected = f"{element_wise} or {head_wise}"
        raise ValueError(f"{op}: gate_logits: got shape {gate_logits.shape}, expected {expected}")
    _check_float(op, "gate_logits", gate_logits)


def _check_by_head(
    op: str,
    name: str,
    x: Array | None,
    q: Array,
) -> None:
    """One number a head."""
    if x is None:
        return
    H = q.shape[-2]
    check_shape(op, name, x, (H,))
    _check_float(op, name, x)


def _check_float(op: str, name: str, x: Array) -> None:
    """Float16, bfloat16, float32 or float64: narrower floats are formats of storage."""
    if x.dtype not in _FLOAT_DTYPES:
        expected = ", ".join(dtype.name for dtype in _FLOAT_DTYPES)
        raise ValueError(f"{op}: {name}: got dtype {x.dtype}, expected one of {expected}")


def _checked_window(op: str, window: Any) -> int | None:
    """The window as a Python integer, from any kind of integer."""
    if window is None:
        return None
    expected = "None or an integer from 1 on"
    # To Python a bool is an integer too.
    if isinstance(window, bool | np.bool_):
        raise ValueError(f"{op}: window: got {window}, expected {expected}")
    try:
        number = operator.index(window)
    except TypeError as error:
        raise ValueError(f"{op}: window: got {window}, expected {expected}") from error
    # A window of 1 is a token alone.
    if number < 1:
        raise ValueError(f"{op}: window: got {window}, expected {expected}")
    return number


def _checked_number(
    op: str,
    name: str,
    x: Any,
    expected: str,
) -> float:
    """A finite number as a Python float."""
    message = f"{op}: {name}: got {x!r}, expected {expected}"
    if isinstance(x, bool | np.bool_ | str | bytes):
        raise ValueError(message)
    try:
        number = float(x)
    except TypeError as error:
        raise ValueError(message) from error
    if not math.isfinite(number):
        raise ValueError(message)
    return number


def _checked_soft_cap(op: str, logits_soft_cap: Any) -> float | None:
    if logits_soft_cap is None:
        return None
    expected = "None or a number above 0"
    number = _checked_number(op, "logits_soft_cap", logits_soft_cap, expected)
    if number <= 0:
        got = f"got {logits_soft_cap}"
        raise ValueError(f"{op}: logits_soft_cap: {got}, expected {expected}")
    return number


def _checked_scale(
    op: str,
    scale: Any,
    K: int,
) -> float:
    if scale is not None:
        scale = _checked_number(op, "scale", scale, "None or a number")
    return default_scale(scale, K)
