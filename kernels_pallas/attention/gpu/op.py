"""`attention` on GPU (Pallas, Triton), forward and backward: what the kernels cover, views, padding, derivative.

    forward   `forward.py`: the output gate is its last step
    arrival   here, in XLA: the gate's gradient, do, sum(do o), everything that depends on rows alone
    dq        `backward.py`
    dk, dv    `backward.py`
    decoding  `step.py`

Saved for the backward pass: the inputs, the ungated output in float32 (by the name "attention_out", as is y) and the
few numbers a row that the normalizer wants ("attention_lse"). Head sizes are padded to powers of two, T to whole blocks.

With bfloat16 inputs matmuls are of bfloat16: weights and logits' gradients are rounded, as every flash kernel does.
With float16 ones those keep the bits of TF32; with float32 inputs matmuls keep all bits, in three passes of TF32.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.attention.gpu import backward as gpu_backward
from kernels_pallas.attention.gpu.forward import forward
from kernels_pallas.attention.gpu.plan import Inputs, Plan
from kernels_pallas.attention.gpu.tuning import MAX_D, MIN_BLOCK, largest, schedule
from kernels_pallas.attention.inputs import AttentionInputs, AttentionOptions
from kernels_pallas.attention.normalizers.base import Normalizer
from kernels_pallas.attention.xla import OUT_NAME, STATISTIC_NAME
from kernels_pallas.common.mesh import by_rows_and_heads
from kernels_pallas.common.padding import padded


def unsupported(inputs: AttentionInputs, options: AttentionOptions) -> str | None:
    """Why this backend cannot take a call of `attention`, or None when it can."""
    q, k, v = inputs.q, inputs.k, inputs.v
    refusal = unsupported_arrays(q, k, v, options.normalizer)
    most = largest(matmuls(q, k, v))
    if refusal is None and max(q.shape[-1], v.shape[-1]) > most:
        return f"takes K and V of {q.dtype} up to {most}, not {q.shape[-1]} and {v.shape[-1]}"
    return refusal


def unsupported_arrays(q: Array, k: Array, v: Array, normalizer: Normalizer) -> str | None:
    """What `attention` and `attention_step` refuse alike."""
    if any(x.dtype == jnp.float64 for x in (q, k, v)):
        return "does not compute in float64"
    D = max(q.shape[-1], v.shape[-1])
    if D > MAX_D:
        return f"takes K and V up to {MAX_D}, not {q.shape[-1]} and {v.shape[-1]}"
    if normalizer.walks > 1:
        return f"takes normalizers that walk over the keys once, not {type(normalizer).__name__}"
    elements = max(math.prod(x.shape[:-1]) * power_of_two(D) for x in (q, k))
    if elements >= 2**31:
        return f"takes arrays below 2**31 elements, not {elements}"
    return None


def attention(
    inputs: AttentionInputs,
    options: AttentionOptions,
    *,
    interpret: bool = False,
) -> Array:
    """As `api.attention`, with every default filled in. Any T."""
    static = dict(options._asdict(), interpret=interpret)
    letters = ("b.h.", "b.h.", "b.h.", "b.h.", "h", "h", "b.")
    part = lambda *parts: (_attend(*parts, **static),)
    heads = math.gcd(inputs.q.shape[2], inputs.k.shape[2])
    return by_rows_and_heads(part, inputs, letters, ("b.h.",), heads)[0]


def _attend(
    q, k, v, gate, sinks, slopes, segments, *, interpret: bool, normalizer: Normalizer, **options
) -> Array:
    (_, T, H, K), V = q.shape, v.shape[3]
    kind, wide = matmuls(q, k, v), (power_of_two(K), power_of_two(V))
    operand, precision = operands(interpret, kind)
    cuts = schedule(*wide, kind, normalizer.sums, T)
    step = max(size for cut in cuts if cut for size in cut[:2])
    plan = Plan(
        **options,
        normalizer=normalizer,
        T=T,
        length=-(-T // step) * step,
        H=H,
        Hk=k.shape[2],
        K=wide[0],
        V=wide[1],
        gate="none" if gate is None else "head" if gate.shape[3] == 1 else "element",
        segments=segments is not None,
        slopes=slopes is not None,
        operand=operand,
        precision=precision,
        out_dtype=jnp.dtype(v.dtype),
        schedule=cuts,
        interpret=interpret,
    )
    tokens = lambda x, D: padded(padded(x, 1, plan.length), 3, D)
    if plan.gate == "head":
        gate = padded(jnp.swapaxes(gate[..., 0], 1, 2).astype(jnp.float32), 2, plan.length)
    elif plan.gate == "element":
        gate = tokens(gate, plan.V)
    numbers = lambda x: None if x is None else x.astype(jnp.float32)
    if segments is not None:
        segments = padded(segments.astype(jnp.int32), 1, plan.length, mode="edge")
    x = Inputs(
        tokens(q, plan.K),
        tokens(k, plan.K),
        tokens(v, plan.V),
        gate,
        numbers(sinks),
        numbers(slopes),
        segments,
    )
    return _attention(plan, x)[:, :T, :, :V]


def power_of_two(D: int) -> int:
    """The size of a tile's axis of D."""
    return max(MIN_BLOCK, 1 << (D - 1).bit_length())


OPERANDS = {
    "bfloat16": (jnp.dtype(jnp.bfloat16), None),
    "tf32": (jnp.dtype(jnp.float32), lax.DotAlgorithmPreset.TF32_TF32_F32),
    "tf32_x3": (jnp.dtype(jnp.float32), lax.DotAlgorithmPreset.TF32_TF32_F32_X3),
}


def matmuls(*arrays: Array) -> str:
    """How a call with these inputs multiplies: a name of `OPERANDS`."""
    one_pass = jax.config.jax_default_matmul_precision in (
        None,
        "default",
        "fastest",
        "bfloat16",
        "BF16_BF16_F32",
    )
    if one_pass and all(x.dtype == jnp.bfloat16 for x in arrays):
        return "bfloat16"
    return "tf32" if one_pass and all(x.dtype.itemsize == 2 for x in arrays) else "tf32_x3"


def operands(interpret: bool, matmuls: str) -> tuple[jnp.dtype, object]:
    """What is multiplied, and how exactly. Interpreted matmuls round nothing."""
    return (jnp.dtype(jnp.float32), lax.Precision.HIGHEST) if interpret else OPERANDS[matmuls]


# --- the derivative


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, x: Inputs) -> Array:
    """y [B, T, H, V]."""
    return forward(plan, x, save=False)["y"]


def _forward(plan: Plan, x: Inputs):
    out = forward(plan, x, save=True)
    y = checkpoint_name(
        out["y"], OUT_NAME
    )  # who multiplies it by a matrix wants it again for that matrix's gradient
    outputs = {n: checkpoint_name(out[f"o{n}"], OUT_NAME) for n in plan.kept_outputs}
    saved = [
        checkpoint_name(out[f"saved{n}"], STATISTIC_NAME)
        for n in range(sum("saved" in name for name in out))
    ]
    return y, (x, y if plan.y_is_o else None, outputs, saved)


def _backward(plan: Plan, residuals, dy: Array):
    x, y, outputs, saved = residuals
    do, deltas, dgate = _arrival(plan, x.gate, outputs if y is None else {0: y} | outputs, dy)
    through_q = gpu_backward.dq(plan, x, do, saved, deltas)
    through_k = gpu_backward.dkv(plan, x, do, saved, deltas)
    dsinks = None
    if x.sinks is not None:
        dsinks = plan.normalizer.sink_gradient(x.sinks[None, :, None], deltas, tuple(saved)).sum(
            (0, 2)
        )
    dslopes = through_q["dslopes"].sum((0, 2)) if plan.slopes else None
    return (
        Inputs(through_q["dq"], through_k["dk"], through_k["dv"], dgate, dsinks, dslopes, None),
    )


_attention.defvjp(_forward, _backward)


def _arrival(plan: Plan, gate: Array | None, outputs: dict[int, Array], dy: Array):
    """(do, deltas [B, H, T] each, dgate): what the kernels want to know of rows.

    With y = o sigmoid(gate) nothing is divided by a gate that may be 0.
    """
    do, dy, dgate = dy, dy.astype(jnp.float32), None
    seen = dy
    if gate is not None:
        opened = jax.nn.sigmoid(gate.astype(jnp.float32))
        slope = opened * (1 - opened)
        if plan.gate == "head":
            dgate = jnp.swapaxes(jnp.sum(dy * outputs[0], axis=3), 1, 2) * slope
            opened = jnp.swapaxes(opened, 1, 2)[..., None]
        else:
            dgate = (dy * outputs[0] * slope).astype(gate.dtype)
        seen = dy * opened
        do = seen.astype(plan.operand)
    # Of do as the tensor core will see it, or dp - delta has an error that does not cancel. XLA keeps this rounding.
    if do.dtype == jnp.bfloat16:
        seen = lax.reduce_precision(seen, exponent_bits=8, mantissa_bits=7)
    of_rows = lambda n: jnp.swapaxes(jnp.sum(seen * outputs[n], axis=3), 1, 2)
    return do, [of_rows(n) for n in plan.normalizer.deltas], dgate
