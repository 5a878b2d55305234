"""Checks and defaults of arguments that several ops share. A failed check is a ValueError that names op and argument."""

import jax.numpy as jnp
from jax import Array

from kernels_pallas.common.mesh import varying_like


def check_interpret(op: str, interpret: bool, implementation: str | None) -> None:
    if interpret and implementation not in ("tpu", "gpu"):
        raise ValueError(
            f'{op}: interpret: got True with implementation={implementation!r}, expected "tpu" or "gpu"'
        )


def check_shape(op: str, name: str, x, expected: tuple[int, ...]) -> None:
    if x.shape != expected:
        raise ValueError(f"{op}: {name}: got shape {x.shape}, expected {expected}")


def check_float(op: str, name: str, x) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{op}: {name}: got dtype {x.dtype}, expected a float dtype")


def check_integer(op: str, name: str, x) -> None:
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{op}: {name}: got dtype {x.dtype}, expected an integer dtype")


def default_scale(scale: float | None, K: int) -> float:
    """What logits are multiplied by: K^-0.5 unless the caller says otherwise."""
    return K**-0.5 if scale is None else float(scale)


def all_varying(*arrays: Array | None) -> tuple[Array | None, ...]:
    """Inside `shard_map`, every array varying over what any of them varies over.

    A replicated input, such as sinks, must vary before it enters a custom_vjp: the transpose of that cast is the sum of
    its gradient over the mesh axis.
    """
    present = [x for x in arrays if x is not None]
    return tuple(None if x is None else varying_like(x, *present) for x in arrays)


def check_bool(op: str, name: str, x: Array) -> None:
    """Raises ValueError unless `x` is boolean."""
    if x.dtype != jnp.bool_:
        raise ValueError(f"{op}: {name}: got dtype {x.dtype}, expected bool")
