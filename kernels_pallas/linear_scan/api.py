"""`linear_scan` and `linear_scan_step`: the public functions. Checks, defaults and the choice of implementation."""

import math
from functools import partial

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas import dispatch
from kernels_pallas.common.checks import (
    all_varying,
    check_float,
    check_integer,
    check_interpret,
    check_shape,
    default_scale,
)
from kernels_pallas.common.mesh import by_rows_and_heads
from kernels_pallas.linear_scan import reference, tile, xla
from kernels_pallas.linear_scan.gpu import op as gpu
from kernels_pallas.linear_scan.gpu import step as gpu_step
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
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    reverse: bool = False,
    normalize: bool = False,
    return_final_state: bool = False,
    chunk_size: int | None = None,
    implementation: dispatch.Implementation | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H V"] | tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Gated linear attention: a matrix state a head, decayed along its key channels, written and read once a token.

        S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t
        o_t = scale q_t S_t                                  inclusive (linear attention, RetNet, Mamba-2, GLA, HGRN2)
        o_t = scale q_t (S_{t-1} + diag(bonus) k_t^T v_t)    exclusive (RWKV-6): S_{t-1} before step t's decay

    Differentiable in every float input and through the final state. Time and memory are linear in T. On a mesh
    (`jax.set_mesh`) the TPU kernel runs on each device's own rows and heads, see `kernels_pallas.common.mesh`; for T cut
    over devices see `linear_scan_sharded`.

    Args:
      q, k, v: queries, keys and values, float16, bfloat16, float32 (or float64 under x64). Hk and Hv divide H: query
        head h uses key head h // (H / Hk) and value head h // (H / Hv).
      log_decay: g, natural logs of decays, <= 0. Not checked: values are unknown under jit, and a positive one makes
        the state grow. None (linear attention), [H] (RetNet), [B, T, H] (Mamba-2, simple GLA) or [B, T, H, K] (GLA,
        HGRN2, RWKV-6). Any size down to -inf is safe; below -1000 a decay is exactly 0.
      bonus: u of RWKV-6, the weight of a token's own write in its exclusive read; None is 0. Needs inclusive=False.
      inclusive: whether a token reads the state after its own update or before it.
      initial_state: the state before the first token met; zeros if None. With `normalize`, V + 1 columns.
      segment_ids: documents packed in a row. The state is emptied where the id changes, so no token meets another
        segment; `initial_state` belongs to the first segment met and the final state to the last.
      scale: a number, K**-0.5 if None.
      reverse: run from the last token to the first: `initial_state` enters before token T-1, the final state leaves
        after token 0.
      normalize: divide by the sum of a query's weights. A column of ones is appended to v, so states have V + 1
        columns, and o_t = num_t / max(|den_t|, 1e-6) with (num_t, den_t) = q_t S_t, unscaled: `scale` has no effect.
      return_final_state: also return the state after the last token met.
      chunk_size: tokens computed as one matrix, a power of two up to 512 (TPU: 16 to 128). The result does not depend
        on it.
      implementation: None, "reference", "xla", "tpu" or "gpu"; see `kernels_pallas.dispatch`.
      interpret: run a named kernel ("tpu", "gpu") in interpret mode, on CPU.

    Returns:
      o in v's dtype, or (o, final state) with the state in float32 (float64 if an input is float64).

    Raises:
      ValueError: a shape, dtype or option that does not fit, by name.
      NotImplementedError: the implementation asked for does not cover this call.

    Sources: GLA, arXiv 2312.06635, section 4; RetNet 2307.08621; Mamba-2 2405.21060; HGRN2 2404.07904;
    RWKV-6 2404.05892.
    """
    op = "linear_scan"
    _check_inputs(op, q, k, v, log_decay, time=True)
    _check_options(op, q, v, bonus, inclusive, "initial_state", initial_state, normalize)
    _check_segments_and_chunk(op, q, segment_ids, chunk_size)
    check_interpret(op, interpret, implementation)
    asked = (q, k, v, log_decay, initial_state, normalize, chunk_size)
    chosen = dispatch.choose(
        op, implementation, {"tpu": tpu.unsupported(*asked), "gpu": gpu.unsupported(*asked)}
    )
    B, T, H, K = q.shape
    if initial_state is None and chosen not in ("tpu", "gpu"):
        initial_state = jnp.zeros((B, H, K, v.shape[-1] + normalize))
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, (1, T, H))
    arrays = _prepared(q, k, v, log_decay, bonus, initial_state, segment_ids)
    static = {
        "inclusive": inclusive,
        "scale": default_scale(scale, K),
        "reverse": reverse,
        "normalize": normalize,
    }
    if chosen == "reference":
        o, final_state = reference.linear_scan(*arrays, **static)
    elif chosen in ("tpu", "gpu"):
        room = tpu if chosen == "tpu" else gpu
        kept = dict(
            chunk_size=chunk_size, return_final_state=return_final_state, interpret=interpret
        )
        o, final_state = _on_mesh(partial(room.linear_scan, **static, **kept), arrays)
    else:
        o, final_state = xla.linear_scan(*arrays, **static, chunk_size=chunk_size)
    return (o, final_state) if return_final_state else o


def linear_scan_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B Hk K"],
    v: Float[Array, "B Hv V"],
    state: Float[Array, "B H K V"],
    log_decay: Float[Array, "H"] | Float[Array, "B H"] | Float[Array, "B H K"] | None = None,
    *,
    bonus: Float[Array, "H K"] | None = None,
    inclusive: bool = True,
    scale: float | None = None,
    normalize: bool = False,
    implementation: dispatch.Implementation | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token of `linear_scan`, for decoding: the same formulas and arguments without T. Returns (o, new state).

    On TPU and GPU (there through jax-triton, the extra `[gpu]`) a kernel updates the states in place: donate `state` to
    the surrounding jit, or XLA copies it first.
    `state` has V + 1 columns with `normalize`, as `linear_scan` returns it. o has v's dtype, the new state is float32
    (float64 if an input is float64).

    Raises:
      ValueError: a shape, dtype or option that does not fit, by name.
      NotImplementedError: the implementation asked for does not cover this call.
    """
    op = "linear_scan_step"
    _check_inputs(op, q, k, v, log_decay, time=False)
    _check_options(op, q, v, bonus, inclusive, "state", state, normalize)
    check_interpret(op, interpret, implementation)
    asked = (q, k, v, state, log_decay, bonus)
    refusals = {"tpu": tpu_step.unsupported(*asked), "gpu": gpu_step.unsupported(*asked, interpret)}
    chosen = dispatch.choose(op, implementation, refusals)
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = log_decay[None]
    arrays = _prepared(q, k, v, log_decay, bonus, state)
    static = {
        "inclusive": inclusive,
        "scale": default_scale(scale, q.shape[-1]),
        "normalize": normalize,
    }
    if chosen == "tpu":
        return _on_mesh(
            partial(tpu_step.linear_scan_step, **static, interpret=interpret), arrays, time=False
        )
    if chosen == "gpu":
        return _on_mesh(partial(gpu_step.linear_scan_step, **static), arrays, time=False)
    return (reference if chosen == "reference" else xla).linear_scan_step(*arrays, **static)


def _on_mesh(kernel, arrays, time: bool = True) -> tuple[Array, Array | None]:
    """A kernel of every device's own rows and heads: XLA cannot cut it. `arrays` as `_prepared` orders them."""
    q, k, v, log_decay, *_ = arrays
    tokens, state = "b.h." if time else "bh.", "bh.."
    decay = tokens if log_decay is None else tokens[: log_decay.ndim]
    axes = (tokens, tokens, tokens, decay, "h.", state, "b.")[: len(arrays)]
    heads = math.gcd(*(x.shape[-2] for x in (q, k, v)))
    return by_rows_and_heads(kernel, arrays, axes, (tokens, state), heads)


def _prepared(q, k, v, log_decay, bonus, state, *others) -> tuple[Array | None, ...]:
    """The state in the dtype of computation; inside `shard_map`, everything varying over what any of them varies over.

    A replicated input, such as a bonus, must vary before it enters a custom_vjp or a scan: the transpose of that cast
    is the sum of its gradient over the mesh axis.
    """
    floats = [x for x in (q, k, v, log_decay, bonus, state) if x is not None]
    if state is not None:
        state = state.astype(jnp.promote_types(jnp.float32, jnp.result_type(*floats)))
    return all_varying(q, k, v, log_decay, bonus, state, *others)


def _check_inputs(op: str, q, k, v, log_decay, time: bool) -> None:
    axes = "[B, T, {}, {}]" if time else "[B, {}, {}]"
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.ndim != 3 + time or 0 in x.shape:
            expected = axes.format(
                {"q": "H", "k": "Hk", "v": "Hv"}[name], "V" if name == "v" else "K"
            )
            raise ValueError(
                f"{op}: {name}: got shape {x.shape}, expected {expected} with no empty axis"
            )
        check_float(op, name, x)
    *rows, H, K = q.shape
    for name, x in {"k": k, "v": v}.items():
        if [*x.shape[:-2]] != rows or H % x.shape[-2] or (name == "k" and x.shape[-1] != K):
            expected = [*rows, f"a divisor of {H}", K if name == "k" else "V"]
            raise ValueError(
                f"{op}: {name}: got shape {x.shape}, expected {expected} for q of shape {q.shape}"
            )
    if log_decay is not None:
        shapes = ((H,), (*rows, H), (*rows, H, K))
        if log_decay.shape not in shapes:
            raise ValueError(
                f"{op}: log_decay: got shape {log_decay.shape}, expected one of {shapes}"
            )
        check_float(op, "log_decay", log_decay)


def _check_options(
    op: str, q, v, bonus, inclusive: bool, state_name: str, state, normalize: bool
) -> None:
    B, H, K = q.shape[0], *q.shape[-2:]
    if bonus is not None:
        if inclusive:
            raise ValueError(
                f"{op}: bonus: got shape {bonus.shape} with inclusive=True, expected inclusive=False or no bonus"
            )
        check_shape(op, "bonus", bonus, (H, K))
        check_float(op, "bonus", bonus)
    if state is not None:
        check_shape(op, state_name, state, (B, H, K, v.shape[-1] + normalize))
        check_float(op, state_name, state)


def _check_segments_and_chunk(op: str, q, segment_ids, chunk_size: int | None) -> None:
    if segment_ids is not None:
        check_shape(op, "segment_ids", segment_ids, q.shape[:2])
        check_integer(op, "segment_ids", segment_ids)
    if chunk_size is not None and not (
        1 <= chunk_size <= tile.MAX_CHUNK and chunk_size & (chunk_size - 1) == 0
    ):
        raise ValueError(
            f"{op}: chunk_size: got {chunk_size}, expected a power of two from 1 to {tile.MAX_CHUNK}"
        )
