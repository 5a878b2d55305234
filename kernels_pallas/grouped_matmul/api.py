"""`grouped_matmul`: the public function. Checks, defaults and the choice of implementation."""

from functools import partial

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from kernels_pallas import dispatch
from kernels_pallas.common.checks import (
    FLOATS,
    as_bounded_int32,
    check_float,
    check_integer,
    check_interpret,
    check_same_dtype,
)
from kernels_pallas.common.mesh import by_sorted_rows, on_explicit_axes, varying_together
from kernels_pallas.grouped_matmul import gpu, reference, xla
from kernels_pallas.grouped_matmul.tpu import op as tpu

OP = "grouped_matmul"


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "G K N"],
    group_sizes: Int[Array, "G"],
    *,
    preferred_element_type: DTypeLike | None = None,
    implementation: dispatch.Implementation | None = None,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """Rows sorted by group, each times the matrix of its group.

    The first group_sizes[0] rows are multiplied by rhs[0], the next group_sizes[1] by rhs[1], and
    so on. M, K, N, G are rows, inner width, outer width and groups. Group sizes are values of the
    run: none is padded to another, no row is dropped. The forward pass and each of the two
    gradients cost about 2 M K N FLOPs, not G times that. Reverse mode works to any order (on GPU:
    once), forward mode with the reference only.

    Args:
      lhs: float16, bfloat16, float32 (or float64 under x64). Sums are float32.
      rhs: one matrix for each group, of lhs's dtype.
      group_sizes: integers >= 0, of any width and sign. Rows beyond their sum give zeros and get
        zero gradient; an empty group gets zero gradient. Not checked: values are unknown under jit.
        A negative size is one of 0, and rows counted beyond M do not exist. What is in rows beyond
        the sum does not matter, NaN neither.
      preferred_element_type: dtype of the result; lhs's if None.
      implementation: None, "reference", "xla", "tpu" or "gpu"; see `kernels_pallas.dispatch`.
      interpret: run a named kernel ("tpu", "gpu") in interpret mode, on CPU.

    Returns:
      One row for each row of lhs.

    Raises:
      ValueError: a shape, dtype or option that does not fit, by name.
      NotImplementedError: the implementation asked for does not cover this call.

    Source: MegaBlocks, arXiv 2211.15841.
    """
    lhs = jnp.asarray(lhs)
    rhs = jnp.asarray(rhs)
    _check(lhs, rhs, group_sizes)
    group_sizes = as_bounded_int32(OP, "group_sizes", group_sizes, most=lhs.shape[0])
    check_interpret(OP, interpret, implementation)
    out_dtype = jnp.dtype(lhs.dtype if preferred_element_type is None else preferred_element_type)
    if out_dtype not in FLOATS:
        raise ValueError(
            f"{OP}: preferred_element_type: got {out_dtype}, expected None or a float dtype"
        )
    # "reference" and "xla" take every call.
    refusals = {
        "tpu": partial(tpu.unsupported, lhs, rhs),
        "gpu": partial(gpu.unsupported, lhs),
    }
    inputs = (lhs, rhs, group_sizes)
    chosen = dispatch.choose(OP, implementation, refusals, inputs)
    inputs = dispatch.for_its_platform(OP, chosen, interpret, inputs)
    # Before any custom_vjp, so that gradients of replicated arrays are summed over the mesh.
    arrays = varying_together(inputs)
    if chosen == "tpu":
        return tpu.grouped_matmul(*arrays, out_dtype=out_dtype, interpret=interpret)
    if chosen == "gpu":
        return gpu.grouped_matmul(*arrays, out_dtype=out_dtype, interpret=interpret)
    plain = partial(
        xla.grouped_matmul if chosen == "xla" else reference.grouped_matmul,
        out_dtype=out_dtype,
    )
    if not on_explicit_axes():
        # On Auto axes XLA splits it.
        return plain(*arrays)
    lhs, rhs, group_sizes = arrays
    return by_sorted_rows(plain, [lhs], [rhs], group_sizes)


def _check(
    lhs: Array,
    rhs: Array,
    group_sizes: Array,
) -> None:
    """Raises ValueError for the first argument that does not fit."""
    if lhs.ndim != 2 or 0 in lhs.shape:
        raise ValueError(f"{OP}: lhs: got shape {lhs.shape}, expected [M, K] with no empty axis")
    if rhs.ndim != 3 or 0 in rhs.shape or rhs.shape[1] != lhs.shape[1]:
        raise ValueError(
            f"{OP}: rhs: got shape {rhs.shape}, "
            f"expected [G, {lhs.shape[1]}, N] for lhs of shape {lhs.shape}"
        )
    if group_sizes.shape != rhs.shape[:1]:
        raise ValueError(
            f"{OP}: group_sizes: got shape {group_sizes.shape}, expected {rhs.shape[:1]}"
        )
    check_integer(OP, "group_sizes", group_sizes)
    check_float(OP, "lhs", lhs)
    check_same_dtype(OP, "rhs", rhs, "lhs", lhs)
