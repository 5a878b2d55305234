"""How exactly the kernels multiply: what `jax.default_matmul_precision` asks for."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

# Values of `jax_default_matmul_precision` that allow one pass of a matrix unit for 16-bit numbers.
_ONE_PASS = (None, "default", "fastest", "bfloat16", "BF16_BF16_F32")


def accumulator_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """float32, or float64 where any of `dtypes` is: in what numbers of these dtypes are summed."""
    # Not `jnp.promote_types`, which asks for casts where the caller's mode is strict.
    has_float64 = any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes)
    return jnp.dtype(jnp.float64 if has_float64 else jnp.float32)


def computation_dtype(arrays: Iterable[Array | None]) -> jnp.dtype:
    """`accumulator_dtype` of the floats of a call; None where an argument was left out."""
    return accumulator_dtype(*(x.dtype for x in arrays if x is not None))


def one_pass_allowed() -> bool:
    """Whether 16-bit operands may be multiplied in one pass of the matrix unit."""
    return jax.config.jax_default_matmul_precision in _ONE_PASS


def not_in_one_pass(q: Array, k: Array, v: Array) -> str | None:
    """Why a kernel for 16-bit numbers in one pass cannot take q, k and v, or None when it can."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes q, k and v all bfloat16 or all float16, not {q.dtype}, {k.dtype}, {v.dtype}"
    if not one_pass_allowed():
        precision = jax.config.jax_default_matmul_precision
        return f"multiplies 16 bits in one pass, not with matmul precision {precision!r}"
    return None


def one_bfloat16_pass(*arrays: Array) -> bool:
    """Whether matmuls of these arrays are one pass of bfloat16."""
    return one_pass_allowed() and all(x.dtype == jnp.bfloat16 for x in arrays)
