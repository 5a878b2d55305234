"""Checks and defaults of arguments that several ops share.

A failed check is a ValueError that names the op, the argument, what was got and what is expected.
"""

import operator

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from kernels_pallas.common.mesh import varying_together

# Numbers of 8 bits have to be converted by the caller, who knows their scale.
FLOATS = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)


def check_interpret(
    op: str,
    interpret: bool,
    implementation: str | None,
) -> None:
    """Interpret mode is a way to run a kernel, so a kernel must have been named."""
    # With None, what runs would depend on the device, which interpret mode has nothing to do with.
    if interpret and implementation not in ("tpu", "gpu", "mosaic_gpu"):
        raise ValueError(
            f"{op}: interpret: got True with implementation={implementation!r}, "
            'expected "tpu" or "gpu"'
        )


def check_shape(
    op: str,
    name: str,
    x: Array,
    expected: tuple[int, ...],
) -> None:
    """Checks that `x` has this shape."""
    if x.shape != expected:
        raise ValueError(f"{op}: {name}: got shape {x.shape}, expected {expected}")


def check_axes(
    op: str,
    name: str,
    x: Array,
    axes: str,
) -> None:
    """Checks that `x` has these axes, "[B, T, H, K]", none of them empty, and holds floats."""
    if x.ndim != 1 + axes.count(",") or 0 in x.shape:
        raise ValueError(f"{op}: {name}: got shape {x.shape}, expected {axes} with no empty axis")
    check_float(op, name, x)


def check_float(
    op: str,
    name: str,
    x: Array,
) -> None:
    """Checks that `x` holds floating-point numbers of a dtype that the ops compute with."""
    if x.dtype not in FLOATS:
        raise ValueError(
            f"{op}: {name}: got dtype {x.dtype}, "
            "expected a float dtype: float16, bfloat16, float32 or float64"
        )


def check_integer(
    op: str,
    name: str,
    x: Array | np.ndarray,
) -> None:
    """Checks that `x` holds integers."""
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{op}: {name}: got dtype {x.dtype}, expected an integer dtype")


def as_integer(op: str, name: str, value: int) -> int:
    """A static argument as a Python integer, from numpy's integers too.

    Bools and floats are refused, also those that are whole numbers.
    """
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        raise ValueError(f"{op}: {name}: got {value!r}, expected an integer")
    return operator.index(value)


def as_array(x: ArrayLike | None) -> Array | None:
    """An argument as an array of jax, which numpy's arrays are converted to."""
    return None if x is None else jnp.asarray(x)


def as_bounded_int32(
    op: str,
    name: str,
    x: ArrayLike,
    most: int,
) -> Array:
    """Integers of any width and sign as int32: negative ones as 0, those above `most` as `most`.

    Values are unknown under jit, so they are bounded, not refused. Without bounds a sum of them
    would wrap: 8-bit sizes, or "no limit" as the largest number of a dtype.
    """
    # numpy's 64 bits would lose half of theirs on the way to an array of jax.
    xp = jnp if isinstance(x, Array) else np
    x = xp.asarray(x)
    check_integer(op, name, x)
    if x.dtype.itemsize < 4:
        x = x.astype(jnp.int32)
    bounded = xp.minimum(xp.maximum(x, x.dtype.type(0)), x.dtype.type(most))
    return jnp.asarray(bounded.astype(jnp.int32))


def as_ids(op: str, name: str, x: ArrayLike | None) -> Array | None:
    """Ids, of which only equality counts, as integers that jax keeps apart."""
    if x is None or isinstance(x, Array):
        return x
    ids = np.asarray(x)
    if np.issubdtype(ids.dtype, np.integer) and ids.dtype.itemsize > 4:
        # Two ids of 64 bits may be the same in 32.
        _, numbers = np.unique(ids, return_inverse=True)
        ids = numbers.reshape(ids.shape).astype(np.int32)
    return jnp.asarray(ids)


def check_same_dtype(
    op: str,
    name: str,
    x: Array,
    like_name: str,
    like: Array,
) -> None:
    """Checks that `x` has the dtype of another argument."""
    if x.dtype != like.dtype:
        raise ValueError(
            f"{op}: {name}: got dtype {x.dtype}, expected {like.dtype} as in {like_name}"
        )


def default_scale(scale: float | None, K: int) -> float:
    """What logits are multiplied by: K^-0.5 unless the caller says otherwise."""
    if scale is None:
        return K**-0.5
    return float(scale)


def all_varying(*arrays: Array | None) -> tuple[Array | None, ...]:
    """`varying_together` of arrays that are arguments."""
    return varying_together(arrays)


def check_bool(op: str, name: str, x: Array) -> None:
    """Raises ValueError unless `x` is boolean."""
    if x.dtype != jnp.bool_:
        raise ValueError(f"{op}: {name}: got dtype {x.dtype}, expected bool")
