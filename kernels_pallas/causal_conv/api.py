"""`causal_conv`: the public function. Checks, defaults and the choice of implementation."""

from functools import partial

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas import dispatch
from kernels_pallas.causal_conv import reference, xla
from kernels_pallas.causal_conv.inputs import ConvInputs
from kernels_pallas.causal_conv.tpu import op as tpu
from kernels_pallas.common.checks import (
    as_array,
    check_axes,
    check_float,
    check_integer,
    check_interpret,
    check_shape,
)
from kernels_pallas.common.mesh import by_rows_and_heads
from kernels_pallas.common.tpu import LANES

OP = "causal_conv"


def causal_conv(
    x: Float[Array, "B T F"],
    kernel: Float[Array, "W F"],
    bias: Float[Array, " F"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    is_activated: bool = False,
    implementation: dispatch.Implementation | None = None,
    interpret: bool = False,
) -> Float[Array, "B T F"]:
    """The short convolution of linear mixers (Mamba, arXiv 2312.00752), channel by channel.

    `y_t = bias + sum_w kernel[w] x_{t - (W-1) + w}`, over t's own segment; inputs before the first
    token are zeros. Its gradient keeps x alone: on TPU one kernel each way reads and writes every
    number once.

    Args:
      x: the inputs: float16, bfloat16, float32 (or float64 under x64).
      kernel: the weights of a token's last W inputs, its own last.
      bias: zeros if None.
      segment_ids: inputs of another segment count as zeros.
      is_activated: y is the SiLU of this sum.
      implementation: None, "reference", "xla" or "tpu"; see `kernels_pallas.dispatch`.
      interpret: run the kernel in interpret mode, on CPU.

    Returns:
      y in x's dtype, computed in float32 (or float64).

    Raises:
      ValueError: a shape, dtype or option that does not fit, by name.
      NotImplementedError: the implementation asked for does not cover this call.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    inputs = ConvInputs(x, kernel, as_array(bias), as_array(segment_ids))
    _check(inputs)
    check_interpret(OP, interpret, implementation)
    refusals = {"tpu": partial(tpu.unsupported, inputs)}
    chosen = dispatch.choose(OP, implementation, refusals, inputs)
    inputs = ConvInputs._make(dispatch.for_its_platform(OP, chosen, interpret, inputs))
    if chosen == "reference":
        return reference.causal_conv(inputs, is_activated)
    if chosen == "xla":
        return xla.causal_conv(inputs, is_activated)

    def convolve(*arrays: Array | None) -> tuple[Array]:
        return (tpu.causal_conv(ConvInputs._make(arrays), is_activated, interpret),)

    # Channels are cut as heads are, in whole registers.
    parts = x.shape[2] // LANES
    (y,) = by_rows_and_heads(convolve, inputs, ["b.h", ".h", "h", "b."], ["b.h"], parts)
    assert y is not None
    return y


def _check(inputs: ConvInputs) -> None:
    """ValueError for the first argument that does not fit."""
    x, kernel, bias, segment_ids = inputs
    check_axes(OP, "x", x, "[B, T, F]")
    check_axes(OP, "kernel", kernel, "[W, F]")
    check_shape(OP, "kernel", kernel, (kernel.shape[0], x.shape[2]))
    check_float(OP, "kernel", kernel)
    if bias is not None:
        check_shape(OP, "bias", bias, x.shape[2:])
        check_float(OP, "bias", bias)
    if segment_ids is not None:
        check_shape(OP, "segment_ids", segment_ids, x.shape[:2])
        check_integer(OP, "segment_ids", segment_ids)
