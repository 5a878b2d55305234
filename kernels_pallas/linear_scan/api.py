"""`linear_scan` and `linear_scan_step`: the public functions, with checks and defaults."""

import math
from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas import dispatch
from kernels_pallas.common.checks import as_array, as_ids, check_interpret, default_scale
from kernels_pallas.common.derivative import differentiated_as
from kernels_pallas.common.mesh import by_rows_and_heads, on_explicit_axes, varying_together
from kernels_pallas.common.precision import computation_dtype
from kernels_pallas.linear_scan import gpu, reference, xla
from kernels_pallas.linear_scan.checks import (
    check_bonus,
    check_segment_ids,
    check_state,
    check_tokens,
    checked_chunk_size,
)
from kernels_pallas.linear_scan.gpu import step as gpu_step
from kernels_pallas.linear_scan.inputs import ScanInputs, ScanOptions, StepInputs, StepOptions
from kernels_pallas.linear_scan.tpu import op as tpu
from kernels_pallas.linear_scan.tpu import step as tpu_step


def linear_scan(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T Hv V"],
    log_decay: Float[Array, "H"] | Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    *,
    bonus: Float[Array, "H K"] | None = None,
    inclusive: bool = True,
    initial_state: Float[Array, "B H K Vs"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    reverse: bool = False,
    normalize: bool = False,
    return_final_state: bool = False,
    chunk_size: int | None = None,
    implementation: dispatch.Implementation | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H V"] | tuple[Float[Array, "B T H V"], Float[Array, "B H K Vs"]]:
    """Gated linear attention: one matrix state per head, decayed per key channel at every token.

        S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t
        o_t = scale q_t S_t                                  inclusive
        o_t = scale q_t (S_{t-1} + diag(bonus) k_t^T v_t)    exclusive: S_{t-1} before its decay

    Linear attention, RetNet, Mamba-2, GLA and HGRN2 are inclusive, RWKV-6 is exclusive.
    Differentiable in every float input and through the final state: the kernels once, the other two
    any number of times; forward mode is the reference's only. Time and memory are linear in
    T. On a mesh (`jax.set_mesh`) the kernels run on each device's own rows and heads, see
    `kernels_pallas.common.mesh`. If T is split over devices, use `linear_scan_sharded`.

    Args:
      q, k, v: queries, keys and values, float16, bfloat16, float32 (or float64 under x64). Hk and
        Hv divide H: query head h uses key head h // (H / Hk) and value head h // (H / Hv).
      log_decay: g, natural logs of decays, <= 0. None (linear attention), [H] (RetNet), [B, T, H]
        (Mamba-2, simple GLA) or [B, T, H, K] (GLA, HGRN2, RWKV-6). Any size down to -inf is safe;
        below -1000 a decay is exactly 0. The sign is not checked: values are unknown under jit, and
        a positive log makes the state grow.
      bonus: u of RWKV-6, the weight of a token's own write in its exclusive read; None is 0. Needs
        inclusive=False.
      inclusive: whether a token reads the state after its own update or before it.
      initial_state: the state before the first token of the recurrence; zeros if None. With
        `normalize`, V + 1 columns.
      segment_ids: documents packed in a row. The state is reset where the id changes, so no token
        sees another segment; `initial_state` belongs to the first segment of the recurrence and the
        final state to the last.
      scale: a number, K**-0.5 if None.
      reverse: run from the last token to the first: `initial_state` enters before token T-1, the
        final state leaves after token 0.
      normalize: divide by the sum of a query's weights. A column of ones is appended to v, so
        states have V + 1 columns, and o_t = num_t / den_t with (num_t, den_t) = q_t S_t, unscaled:
        `scale` has no effect. The denominator keeps its sign, so features may be signed; one nearer
        to 0 than 1e-6 counts as 1e-6 of its sign.
      return_final_state: also return the state after the last token of the recurrence.
      chunk_size: tokens computed as one matrix, a power of two up to 512 (TPU: 16 to 128). The
        result does not depend on it.
      implementation: None, "reference", "xla", "tpu" or "gpu"; see `kernels_pallas.dispatch`.
      interpret: run a named kernel ("tpu", "gpu") in interpret mode, on CPU.

    Returns:
      o in v's dtype, or (o, final state) with the state in float32, float64 if an input is.

    Raises:
      ValueError: a shape, dtype or option that does not fit, by name.
      NotImplementedError: the implementation asked for does not cover this call.

    Sources: GLA, arXiv 2312.06635, section 4; RetNet 2307.08621; Mamba-2 2405.21060;
    HGRN2 2404.07904; RWKV-6 2404.05892.
    """
    op = "linear_scan"
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    log_decay, bonus, initial_state = map(as_array, (log_decay, bonus, initial_state))
    segment_ids = as_ids(op, "segment_ids", segment_ids)
    check_tokens(op, q, k, v, log_decay, has_time=True)
    check_bonus(op, q, bonus, inclusive)
    check_state(op, "initial_state", q, v, initial_state, normalize)
    check_segment_ids(op, q, segment_ids)
    chunk_size = checked_chunk_size(op, chunk_size)
    check_interpret(op, interpret, implementation)

    B, T, H, K = q.shape
    if log_decay is not None and log_decay.ndim == 1:
        # RetNet: one decay for all rows and tokens. Backends take the axes B and T, B may be 1.
        log_decay = jnp.broadcast_to(log_decay, (1, T, H))
    inputs = ScanInputs(
        q=q,
        k=k,
        v=v,
        log_decay=log_decay,
        bonus=bonus,
        initial_state=initial_state,
        segment_ids=segment_ids,
    )
    options = ScanOptions(
        inclusive=inclusive,
        scale=1.0 if normalize else default_scale(scale, K),
        reverse=reverse,
        normalize=normalize,
        chunk_size=chunk_size,
        return_final_state=return_final_state,
    )

    # A backend that is asked says why it cannot take the call, or None.
    refusals = {
        "tpu": partial(tpu.unsupported, inputs, options),
        "gpu": partial(gpu.unsupported, inputs, options),
    }
    chosen = dispatch.choose(op, implementation, refusals, inputs)
    inputs = dispatch.for_its_platform(op, chosen, interpret, inputs)
    if chosen in ("tpu", "gpu"):
        kernel = tpu if chosen == "tpu" else gpu
        inputs = _prepare_scan(inputs)

        def run(*arrays: Array | None) -> tuple[Array, Array | None]:
            return kernel.linear_scan(
                ScanInputs._make(arrays),
                options,
                interpret=interpret,
            )

        o, final_state = _scan_on_mesh(run, inputs)
    else:
        # The kernels start from zeros in fast memory; the other two take an array.
        if initial_state is None:
            num_columns = v.shape[-1] + normalize
            zeros = jnp.zeros((B, H, K, num_columns), jnp.float32)
            inputs = inputs._replace(initial_state=zeros)
        inputs = _prepare_scan(inputs)
        plain = reference if chosen == "reference" else xla

        def run_plain(*arrays: Array | None) -> tuple[Array, Array]:
            return plain.linear_scan(ScanInputs._make(arrays), options)

        # On Auto axes XLA splits it.
        split = _scan_on_mesh if on_explicit_axes() else _whole
        o, final_state = split(run_plain, inputs)
    if not return_final_state:
        return o
    assert final_state is not None
    return o, final_state


def linear_scan_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B Hk K"],
    v: Float[Array, "B Hv V"],
    state: Float[Array, "B H K Vs"],
    log_decay: Float[Array, "H"] | Float[Array, "B H"] | Float[Array, "B H K"] | None = None,
    *,
    bonus: Float[Array, "H K"] | None = None,
    inclusive: bool = True,
    scale: float | None = None,
    normalize: bool = False,
    implementation: dispatch.Implementation | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K Vs"]]:
    """One token of `linear_scan`, for decoding: the same formulas and arguments without T.

    On TPU and GPU (there through jax-triton, the extra `[gpu-kernels]`) a kernel updates the states
    in place: donate `state` to the surrounding jit, or XLA copies it first. Differentiable
    everywhere: the gradient of a kernel is that of the plain step.

    Args:
      q, k, v: the query, key and value of one token.
      state: as `linear_scan` returns it; with `normalize` it has V + 1 columns.
      log_decay: None, [H], [B, H] or [B, H, K], natural logs <= 0.
      bonus, inclusive, scale, normalize: as in `linear_scan`.
      implementation: None, "reference", "xla", "tpu" or "gpu"; see `kernels_pallas.dispatch`.
      interpret: run the TPU kernel, named, in interpret mode on CPU.

    Returns:
      (o, new state): o in v's dtype, the state in float32 (float64 if an input is float64).

    Raises:
      ValueError: a shape, dtype or option that does not fit, by name.
      NotImplementedError: the implementation asked for does not cover this call.
    """
    op = "linear_scan_step"
    q, k, v, state = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(state)
    log_decay, bonus = map(as_array, (log_decay, bonus))
    check_tokens(op, q, k, v, log_decay, has_time=False)
    check_bonus(op, q, bonus, inclusive)
    check_state(op, "state", q, v, state, normalize)
    check_interpret(op, interpret, implementation)

    if log_decay is not None and log_decay.ndim == 1:
        log_decay = log_decay[None]
    inputs = StepInputs(
        q=q,
        k=k,
        v=v,
        log_decay=log_decay,
        bonus=bonus,
        state=state,
    )
    options = StepOptions(
        inclusive=inclusive,
        scale=1.0 if normalize else default_scale(scale, q.shape[-1]),
        normalize=normalize,
    )

    refusals = {
        "tpu": partial(tpu_step.unsupported, inputs, options),
        "gpu": partial(gpu_step.unsupported, inputs, options, interpret=interpret),
    }
    chosen = dispatch.choose(op, implementation, refusals, inputs)
    inputs = dispatch.for_its_platform(op, chosen, interpret, inputs)
    # From here on the state is in the dtype of the computation.
    inputs = _prepare_step(inputs)

    def run_on_tpu(*arrays: Array | None) -> tuple[Array, Array]:
        return tpu_step.linear_scan_step(
            StepInputs._make(arrays),
            options,
            interpret=interpret,
        )

    def run_on_gpu(*arrays: Array | None) -> tuple[Array, Array]:
        return gpu_step.linear_scan_step(StepInputs._make(arrays), options)

    def run_on_xla(*arrays: Array | None) -> tuple[Array, Array]:
        return xla.linear_scan_step(StepInputs._make(arrays), options)

    def run_reference(*arrays: Array | None) -> tuple[Array, Array]:
        return reference.linear_scan_step(StepInputs._make(arrays), options)

    if chosen in ("tpu", "gpu"):
        kernel = run_on_tpu if chosen == "tpu" else run_on_gpu
        # One token is quickly computed once more.
        return _step_on_mesh(differentiated_as(kernel, run_on_xla), inputs)
    plain = run_reference if chosen == "reference" else run_on_xla
    split = _step_on_mesh if on_explicit_axes() else _whole
    return split(plain, inputs)


def _whole(run: Callable, inputs: ScanInputs | StepInputs) -> tuple[Array, Array]:
    """As `_scan_on_mesh`, where nothing is to be split."""
    return run(*inputs)


# --- from the arguments to the arrays of a backend


def _prepare_scan(inputs: ScanInputs) -> ScanInputs:
    """The state in the dtype of the computation, and all arrays varying over the same mesh axes.

    A replicated input, such as a bonus, must vary inside `shard_map` before it enters a custom_vjp
    or a scan: the transpose of that cast is the sum of its gradient over the mesh axis.
    """
    if inputs.initial_state is not None:
        dtype = computation_dtype(inputs._replace(segment_ids=None))
        inputs = inputs._replace(initial_state=inputs.initial_state.astype(dtype))
    return varying_together(inputs)


def _prepare_step(inputs: StepInputs) -> StepInputs:
    """As `_prepare_scan`, for one token."""
    dtype = computation_dtype(inputs)
    inputs = inputs._replace(state=inputs.state.astype(dtype))
    return varying_together(inputs)


# --- kernels on a mesh: every device computes its own rows ("b") and heads ("h")


def _scan_on_mesh(run: Callable, inputs: ScanInputs) -> tuple[Array, Array | None]:
    log_decay = inputs.log_decay
    is_scalar = log_decay is None or log_decay.ndim == 3
    axes = (
        "b.h.",  # q
        "b.h.",  # k
        "b.h.",  # v
        "b.h" if is_scalar else "b.h.",  # log_decay
        "h.",  # bonus
        "bh..",  # initial_state
        "b.",  # segment_ids
    )
    output_axes = ("b.h.", "bh..")
    o, final_state = by_rows_and_heads(
        run,
        inputs,
        axes,
        output_axes,
        _common_heads(inputs),
    )
    assert o is not None
    return o, final_state


def _step_on_mesh(run: Callable, inputs: StepInputs) -> tuple[Array, Array]:
    log_decay = inputs.log_decay
    is_scalar = log_decay is None or log_decay.ndim == 2
    axes = (
        "bh.",  # q
        "bh.",  # k
        "bh.",  # v
        "bh" if is_scalar else "bh.",  # log_decay
        "h.",  # bonus
        "bh..",  # state
    )
    output_axes = ("bh.", "bh..")
    o, new_state = by_rows_and_heads(
        run,
        inputs,
        axes,
        output_axes,
        _common_heads(inputs),
    )
    assert o is not None
    assert new_state is not None
    return o, new_state


def _common_heads(inputs: ScanInputs | StepInputs) -> int:
    """The greatest number of parts into which query, key and value heads can all be split."""
    return math.gcd(
        inputs.q.shape[-2],
        inputs.k.shape[-2],
        inputs.v.shape[-2],
    )
