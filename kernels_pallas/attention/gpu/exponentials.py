"""How the GPU kernels of `attention` take exponentials.

Triton's exp of float32 is a function of CUDA's library: eight instructions for an element, a third
of the inner loop. The chip has one instruction for 2^x, ex2.approx.ftz.f32, with a relative error
of 2^-22. Where the inputs have 16 bits, weights are rounded to 8 or 11 bits anyway, so the kernels
use it; with float32 inputs they use the library's.

Softmax goes further: its logits are multiplied by log2(e) when they are scaled, so that no
exponential multiplies anything. The factor is `Plan.unit`, and whatever is in the unit of logits
has it too: the soft cap, the slopes, the sinks, the maxima, the log-sum-exp. Gradients do not: they
are those of the logits without the factor.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from kernels_pallas.attention.normalizers.base import Elementary, Normalizer, Softmax
from kernels_pallas.common.gpu import LOG2_E, exp2


def _exp(x: Array) -> Array:
    return exp2(x * LOG2_E)


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + _exp(-x))


# In a compiled kernel.
IN_KERNEL = Elementary(exp=_exp, sigmoid=_sigmoid)
IN_KERNEL_BY_TWO = Elementary(exp=exp2, log=jnp.log2)
# The same outside of a kernel, or in one that is interpreted.
BY_TWO = Elementary(exp=jnp.exp2, log=jnp.log2)


class Exponentials(NamedTuple):
    """How a call takes them."""

    # What logits are multiplied by.
    unit: float
    # The normalizer in the kernels, and for what XLA computes of rows around them.
    in_kernel: Normalizer
    around: Normalizer


def exponentials(
    normalizer: Normalizer,
    exact: bool,
    interpret: bool,
) -> Exponentials:
    """How a call takes exponentials.

    Args:
      normalizer: how logits become weights.
      exact: as exactly as float32 allows, for inputs of 32 bits.
      interpret: whether the kernels are interpreted; then there is no instruction to use.

    Returns:
      The unit of logits, and the normalizer with its functions.
    """
    if exact:
        return Exponentials(1.0, normalizer, normalizer)
    if type(normalizer) is Softmax:
        around = dataclasses.replace(normalizer, functions=BY_TWO)
        in_kernel = dataclasses.replace(normalizer, functions=IN_KERNEL_BY_TWO)
        return Exponentials(LOG2_E, around if interpret else in_kernel, around)
    in_kernel = dataclasses.replace(normalizer, functions=IN_KERNEL)
    return Exponentials(1.0, normalizer if interpret else in_kernel, normalizer)


def in_unit(logit: float | None, unit: float) -> float | None:
    """A number that is compared with logits, in their unit; None stays."""
    return None if logit is None else logit * unit
