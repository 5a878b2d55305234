"""`delta_scan` and `delta_scan_step`: the public functions, with checks and defaults."""

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
from kernels_pallas.delta_scan import gpu, reference, xla
from kernels_pallas.delta_scan.checks import check_state, check_tokens, check_weights
from kernels_pallas.delta_scan.gpu import step as gpu_step
from kernels_pallas.delta_scan.inputs import (
    DeltaInputs,
    DeltaOptions,
    DeltaStepInputs,
    DeltaStepOptions,
)
from kernels_pallas.delta_scan.tpu import op as tpu
from kernels_pallas.delta_scan.tpu import step as tpu_step
from kernels_pallas.linear_scan.checks import check_segment_ids, checked_chunk_size


def delta_scan(
    q: Float[Array, "B T Hq K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"] | None = None,
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    *,
    erase: Float[Array, "B T H K"] | None = None,
    write: Float[Array, "B T H V"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    l2_norm: bool = False,
    return_final_state: bool = False,
    chunk_size: int | None = None,
    implementation: dispatch.Implementation | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H V"] | tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The delta rule: one matrix state per head, of which every token first erases, then writes.

        S_t = D_t S_{t-1} + k_t^T (u_t - e_t D_t S_{t-1})         D_t = diag(exp(g_t))
        o_t = scale q_t S_t

    with e_t = beta_t k_t, the key that reads and erases, and u_t = beta_t v_t, what is written:

        DeltaNet                log_decay None
        Gated DeltaNet          log_decay [B, T, H]
        Kimi Delta Attention    log_decay [B, T, H, K]
        Comba                   erase = beta p exp(-g), p another key: it reads S_{t-1} itself
        Gated DeltaNet-2        erase = b k and write = w, one weight per channel

    RWKV-7 and DeltaProduct are several such steps a token: `kernels_pallas.delta_scan.sub_steps`.
    Exact for any decay and any keys: no exponent is positive, and the triangular system of a chunk
    is solved by inverses of its blocks, never by powers. Differentiable in every float input and
    through the final state. Time and memory are linear in T.

    Args:
      q, k: queries and keys, float16, bfloat16, float32 (or float64 under x64). Hq and Hk divide H:
        state h is read by query head h // (H / Hq) and written by key head h // (H / Hk).
      v: values, one head for each state.
      beta: how much of what is found under a key is replaced, usually in [0, 1], up to 2 for states
        with negative eigenvalues. Keys should have length one (`l2_norm`), or the state grows.
      log_decay: g, natural logs of decays, <= 0. None, one decay per head, or one per key channel.
        Any size down to -inf is safe; below -1000 a decay is exactly 0. The sign is not checked.
      erase: e_t itself, in place of beta k. `l2_norm` does not touch it.
      write: u_t = write_t v_t, in place of beta v. With both `erase` and `write`, beta is None.
      initial_state: the state before the first token; zeros if None.
      segment_ids: documents packed in a row. The state is reset where the id changes, so no token
        sees another segment; `initial_state` belongs to the first segment and the final state to
        the last.
      scale: a number, K**-0.5 if None.
      l2_norm: divide q and k by their length first: x / sqrt(x.x + 1e-6).
      return_final_state: also return the state after the last token.
      chunk_size: tokens computed as one matrix, a power of two up to 512. The result does not
        depend on it.
      implementation: None, "reference", "xla", "tpu" or "gpu"; see `kernels_pallas.dispatch`.
      interpret: run a named kernel ("tpu", "gpu") in interpret mode, on CPU.

    Returns:
      o in v's dtype, or (o, final state) with the state in float32, float64 if an input is.

    Raises:
      ValueError: a shape, dtype or option that does not fit, by name.
      NotImplementedError: the implementation asked for does not cover this call.

    Sources: DeltaNet, arXiv 2406.06484; Gated DeltaNet 2412.06464; Kimi Delta Attention 2510.26692;
    Comba 2506.02475; Gated DeltaNet-2 2605.22791.
    """
    op = "delta_scan"
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    beta, log_decay, erase, write = map(as_array, (beta, log_decay, erase, write))
    initial_state = as_array(initial_state)
    segment_ids = as_ids(op, "segment_ids", segment_ids)
    check_tokens(op, q, k, v, has_time=True)
    check_weights(op, q, v, beta, log_decay, erase, write)
    check_state(op, "initial_state", q, v, initial_state)
    check_segment_ids(op, q, segment_ids)
    chunk_size = checked_chunk_size(op, chunk_size)
    check_interpret(op, interpret, implementation)

    if initial_state is not None:
        floats = (q, k, v, beta, log_decay, erase, write, initial_state)
        initial_state = initial_state.astype(computation_dtype(floats))
    inputs = DeltaInputs(
        q=q,
        k=k,
        v=v,
        beta=beta,
        log_decay=log_decay,
        erase=erase,
        write=write,
        initial_state=initial_state,
        segment_ids=segment_ids,
    )
    options = DeltaOptions(
        scale=default_scale(scale, q.shape[-1]),
        l2_norm=l2_norm,
        chunk_size=chunk_size,
        return_final_state=return_final_state,
    )
    # A backend says why it cannot take the call, or None.
    refusals = {
        "tpu": partial(tpu.unsupported, inputs, options),
        "gpu": partial(gpu.unsupported, inputs, options),
    }
    chosen = dispatch.choose(op, implementation, refusals, inputs)
    inputs = dispatch.for_its_platform(op, chosen, interpret, inputs)
    if chosen in ("tpu", "gpu"):
        kernel = tpu if chosen == "tpu" else gpu
        inputs = varying_together(inputs)

        def run(*arrays: Array | None) -> tuple[Array, Array | None]:
            return kernel.delta_scan(
                DeltaInputs._make(arrays),
                options,
                interpret=interpret,
            )

        o, final_state = _scan_on_mesh(run, inputs)
    else:
        # The kernels start from zeros in fast memory; the other two take an array.
        if initial_state is None:
            floats = (q, k, v, beta, log_decay, erase, write)
            B, _, H, V = v.shape
            zeros = jnp.zeros((B, H, q.shape[-1], V), computation_dtype(floats))
            inputs = inputs._replace(initial_state=zeros)
        # Inside `shard_map`, every array varies over the same mesh axes.
        inputs = varying_together(inputs)
        plain = reference if chosen == "reference" else xla

        def run_plain(*arrays: Array | None) -> tuple[Array, Array]:
            return plain.delta_scan(DeltaInputs._make(arrays), options)

        # On Auto axes XLA splits it.
        split = _scan_on_mesh if on_explicit_axes() else _whole
        o, final_state = split(run_plain, inputs)
    if not return_final_state:
        return o
    assert final_state is not None
    return o, final_state


def delta_scan_step(
    q: Float[Array, "B Hq K"],
    k: Float[Array, "B Hk K"],
    v: Float[Array, "B H V"],
    state: Float[Array, "B H K V"],
    beta: Float[Array, "B H"] | None = None,
    log_decay: Float[Array, "B H"] | Float[Array, "B H K"] | None = None,
    *,
    erase: Float[Array, "B H K"] | None = None,
    write: Float[Array, "B H V"] | None = None,
    scale: float | None = None,
    l2_norm: bool = False,
    implementation: dispatch.Implementation | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token of `delta_scan`, for decoding: the same formulas and arguments without T.

    On TPU and GPU (there through jax-triton, the extra `[gpu]`) a kernel reads and writes every
    state once, in place: donate `state` to the surrounding jit, or XLA copies it first.

    Args:
      q, k, v: the query, key and value of one token.
      state: as `delta_scan` returns it.
      beta, log_decay, erase, write, scale, l2_norm: as in `delta_scan`.
      implementation: None, "reference", "xla", "tpu" or "gpu"; see `kernels_pallas.dispatch`.
      interpret: run the TPU kernel, named, in interpret mode on CPU.

    Returns:
      (o, new state): o in v's dtype, the state in float32 (float64 if an input is float64).

    Raises:
      ValueError: a shape, dtype or option that does not fit, by name.
      NotImplementedError: the implementation asked for does not cover this call.
    """
    op = "delta_scan_step"
    q, k, v, state = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(state)
    beta, log_decay, erase, write = map(as_array, (beta, log_decay, erase, write))
    check_tokens(op, q, k, v, has_time=False)
    check_weights(op, q, v, beta, log_decay, erase, write)
    check_state(op, "state", q, v, state)
    check_interpret(op, interpret, implementation)

    floats = (q, k, v, beta, log_decay, erase, write, state)
    inputs = DeltaStepInputs(
        q=q,
        k=k,
        v=v,
        beta=beta,
        log_decay=log_decay,
        erase=erase,
        write=write,
        state=state.astype(computation_dtype(floats)),
    )
    options = DeltaStepOptions(
        scale=default_scale(scale, q.shape[-1]),
        l2_norm=l2_norm,
    )
    refusals = {
        "tpu": partial(tpu_step.unsupported, inputs),
        "gpu": partial(gpu_step.unsupported, inputs, interpret=interpret),
    }
    chosen = dispatch.choose(op, implementation, refusals, inputs)
    inputs = dispatch.for_its_platform(op, chosen, interpret, inputs)
    inputs = varying_together(inputs)

    def run_on_tpu(*arrays: Array | None) -> tuple[Array, Array]:
        return tpu_step.delta_scan_step(
            DeltaStepInputs._make(arrays),
            options,
            interpret=interpret,
        )

    def run_on_gpu(*arrays: Array | None) -> tuple[Array, Array]:
        return gpu_step.delta_scan_step(DeltaStepInputs._make(arrays), options)

    def run_on_xla(*arrays: Array | None) -> tuple[Array, Array]:
        return xla.delta_scan_step(DeltaStepInputs._make(arrays), options)

    def run_reference(*arrays: Array | None) -> tuple[Array, Array]:
        return reference.delta_scan_step(DeltaStepInputs._make(arrays), options)

    if chosen in ("tpu", "gpu"):
        kernel = run_on_tpu if chosen == "tpu" else run_on_gpu
        # One token is quickly computed once more.
        return _step_on_mesh(differentiated_as(kernel, run_on_xla), inputs)
    plain = run_reference if chosen == "reference" else run_on_xla
    split = _step_on_mesh if on_explicit_axes() else _whole
    return split(plain, inputs)


def _whole(run: Callable, inputs: DeltaInputs | DeltaStepInputs) -> tuple[Array, Array]:
    """As `_scan_on_mesh`, where nothing is to be split."""
    return run(*inputs)


# --- kernels on a mesh: every device computes its own rows ("b") and heads ("h")


def _scan_on_mesh(run: Callable, inputs: DeltaInputs) -> tuple[Array, Array | None]:
    log_decay = inputs.log_decay
    is_scalar = log_decay is None or log_decay.ndim == 3
    axes = (
        "b.h.",  # q
        "b.h.",  # k
        "b.h.",  # v
        "b.h",  # beta
        "b.h" if is_scalar else "b.h.",  # log_decay
        "b.h.",  # erase
        "b.h.",  # write
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


def _step_on_mesh(run: Callable, inputs: DeltaStepInputs) -> tuple[Array, Array]:
    log_decay = inputs.log_decay
    is_scalar = log_decay is None or log_decay.ndim == 2
    axes = (
        "bh.",  # q
        "bh.",  # k
        "bh.",  # v
        "bh",  # beta
        "bh" if is_scalar else "bh.",  # log_decay
        "bh.",  # erase
        "bh.",  # write
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


def _common_heads(inputs: DeltaInputs | DeltaStepInputs) -> int:
    """The greatest number of parts into which states, query and key heads can all be split."""
    return math.gcd(
        inputs.q.shape[-2],
        inputs.k.shape[-2],
        inputs.v.shape[-2],
    )
