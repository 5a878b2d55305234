"""Checks and defaults of arguments that several ops share.

A failed check is a ValueError that names the op, the argument, what was got and what is expected.
"""

import jax.numpy as jnp
from jax import Array

from kernels_pallas.common.mesh import varying_together


def check_interpret(
    op: str,
    interpret: bool,
    implementation: str | None,
) -> None:
    """Interpret mode is a way to run a kernel, so a kernel must have been named."""
    # With None, what runs would depend on the device, which interpret mode has nothing to do with.
    if interpret and implementation not in ("tpu", "gpu"):
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


def check_float(
    op: str,
    name: str,
    x: Array,
) -> None:
    """Checks that `x` holds floating-point numbers."""
    # bfloat16 is no subtype of numpy's floating, but of jax's.
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{op}: {name}: got dtype {x.dtype}, expected a float dtype")


def check_integer(
    op: str,
    name: str,
    x: Array,
) -> None:
    """Checks that `x` holds integers."""
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{op}: {name}: got dtype {x.dtype}, expected an integer dtype")


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
