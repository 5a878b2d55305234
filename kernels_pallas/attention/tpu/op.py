"""`attention` on TPU (Pallas, Mosaic), forward and backward: what the kernels cover, views, derivative.

One kernel each way, each tile visited once (`forward.py`, `backward.py`); the mathematics is in `normalizers/base.py` and
`tile.py`, block sizes in `tuning.py`. The output gate is the forward kernel's last step and the backward
kernel's first. Saved for the backward pass: the inputs, the ungated output in float32 (by the name "attention_out", as
is y: a policy that keeps both runs no kernel again) and the few numbers a row that the normalizer wants ("attention_lse").

Matrix units multiply bfloat16. With float16 or float32 inputs every operand keeps all its bits, in several passes. With
bfloat16 inputs a matmul is one pass and rounds weights and logits' gradients, as every flash kernel does. Under
`jax.default_matmul_precision("highest")` they too keep their bits; and in interpret mode, which rounds nothing.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.inputs import AttentionInputs, AttentionOptions
from kernels_pallas.attention.tpu.backward import backward
from kernels_pallas.attention.tpu.forward import forward, kept_outputs
from kernels_pallas.attention.tpu.plan import LANES, Inputs, Plan
from kernels_pallas.attention.tpu.tile import on_tpu
from kernels_pallas.attention.tpu.tuning import MAX_D, schedules
from kernels_pallas.attention.xla import OUT_NAME, STATISTIC_NAME
from kernels_pallas.common.mesh import by_rows_and_heads, varying_axes


def unsupported(inputs: AttentionInputs, options: AttentionOptions) -> str | None:
    """Why this backend cannot take a call, or None when it can."""
    q, k, v = inputs.q, inputs.k, inputs.v
    if any(x.dtype == jnp.float64 for x in (q, k, v)):
        return "does not compute in float64"
    if max(q.shape[-1], v.shape[-1]) > MAX_D:
        return f"takes K and V up to {MAX_D}, not {q.shape[-1]} and {v.shape[-1]}"
    if options.normalizer.walks > 1:
        name = type(options.normalizer).__name__
        return f"takes normalizers that walk over the keys once, not {name}"
    return None


def unsupported_step() -> str:
    """Why this room does not take `attention_step`."""
    return (
        "has no kernel for one token against a cache: XLA reads the cache once, as a kernel would"
    )


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


def _attend(q, k, v, gate, sinks, slopes, segments, *, interpret, **options) -> Array:
    (B, T, H, K), Hk, V, out_dtype = q.shape, k.shape[2], v.shape[3], v.dtype
    # Mosaic does not convert to or from float16.
    known = lambda x: x.astype(jnp.float32) if x is not None and x.dtype == jnp.float16 else x
    q, k, v, gate = map(known, (q, k, v, gate))
    wide = [-(-D // LANES) * LANES for D in (K, V)]
    kind = "none" if gate is None else "head" if gate.shape[-1] == 1 else "element"
    options["normalizer"] = on_tpu(options["normalizer"])
    plan = Plan(
        **options,
        T=T,
        H=H,
        Hk=Hk,
        K=wide[0],
        V=wide[1],
        gate=kind,
        segments=segments is not None,
        slopes=slopes is not None,
        rounds=_rounds(interpret, q, k, v),
        out_dtype=jnp.dtype(v.dtype),
        interpret=_interpret(interpret, q),
        **schedules(T, *wide, options["window"]),
    )
    numbers = lambda x: None if x is None else x.astype(jnp.float32)
    if kind == "head":
        gate = numbers(jnp.swapaxes(gate, 1, 2).reshape(B, H, 1, T))
    elif kind == "element":
        gate = _flat(gate, plan.V)
    segments = None if segments is None else segments[:, None].astype(jnp.int32)
    x = Inputs(
        _flat(q, plan.K),
        _flat(k, plan.K),
        _flat(v, plan.V),
        gate,
        numbers(sinks),
        numbers(slopes),
        segments,
    )
    return _attention(plan, x).reshape(B, T, H, plan.V)[..., :V].astype(out_dtype)


def _rounds(interpret, *arrays: Array) -> bool:
    """Whether matmuls are one pass of bfloat16."""
    one_pass = jax.config.jax_default_matmul_precision in (
        None,
        "default",
        "fastest",
        "bfloat16",
        "BF16_BF16_F32",
    )
    return not interpret and one_pass and all(x.dtype == jnp.bfloat16 for x in arrays)


def _interpret(interpret: bool, x: Array):
    """The plain interpreter is the quicker one, but knows nothing of varying axes."""
    return pltpu.InterpretParams() if interpret is True and varying_axes(x) else interpret


def _flat(x: Array, D: int) -> Array:
    """[B, T, heads, d] -> [B, T, heads * D]."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, D - x.shape[3]))) if x.shape[3] < D else x
    return x.reshape(*x.shape[:2], -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, x: Inputs) -> Array:
    """y [B, T, H*V]."""
    return forward(plan, x, save=False)["y"]


def _forward(plan: Plan, x: Inputs):
    out = forward(plan, x, save=True)
    y = checkpoint_name(
        out["y"], OUT_NAME
    )  # who multiplies it by a matrix wants it again for that matrix's gradient
    outputs = {n: checkpoint_name(out[f"o{n}"], OUT_NAME) for n in kept_outputs(plan)}
    saved = [
        checkpoint_name(out[f"saved{n}"], STATISTIC_NAME)
        for n in range(sum("saved" in name for name in out))
    ]
    return y, (x, y if _y_is_o(plan) else None, outputs, saved)


def _backward(plan: Plan, residuals, dy: Array):
    x, y, outputs, saved = residuals
    d = backward(plan, x, outputs if y is None else {0: y} | outputs, saved, dy)
    by_head = lambda name: d[name].sum((0, 2, 3)) if name in d else None
    return (
        Inputs(
            d["dq"], d["dk"], d["dv"], d.get("dgate"), by_head("dsinks"), by_head("dslopes"), None
        ),
    )


_attention.defvjp(_forward, _backward)


def _y_is_o(plan: Plan) -> bool:
    """Whether the output itself, unrounded and without a gate, is what the backward pass needs."""
    return plan.keeps_o and 0 not in kept_outputs(plan)
