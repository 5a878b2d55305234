"""`rotary`: the public function. Checks, defaults and the choice of implementation."""

from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas import dispatch
from kernels_pallas.common.checks import (
    as_array,
    check_axes,
    check_float,
    check_integer,
    check_interpret,
    check_shape,
)
from kernels_pallas.common.mesh import by_rows_and_heads
from kernels_pallas.rotary import reference, xla
from kernels_pallas.rotary.inputs import Pairs, RotaryInputs, RotaryOptions
from kernels_pallas.rotary.tpu import op as tpu

OP = "rotary"


def rotary(
    x: Float[Array, "B T H D"],
    positions: Int[Array, "B T"],
    frequencies: Float[np.ndarray, " J"],
    norm_scale: Float[Array, " D"] | None = None,
    *,
    eps: float = 1e-6,
    magnitude: float = 1.0,
    interleaved: bool = False,
    implementation: dispatch.Implementation | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """Rotary positions (arXiv 2104.09864), after an RMS norm of every head if it has a scale.

    Pair j of a head's channels turns by position x frequency_j radians; channels after the first
    2 J pass unchanged. On TPU the kernel reads and writes every number once, and takes and leaves
    heads as columns [B, T, H D], as matrix products make them and `attention` reads them: norm and
    rotation by XLA keep other layouts, and copy between them.

    Args:
      x: queries or keys: float16, bfloat16, float32 (or float64 under x64). Norm and rotation are
        computed in float32 (or float64); "xla" rounds to x's dtype between them.
      positions: of the tokens, within their documents.
      frequencies: radians per position, J <= D / 2 of them; numbers, no traced array. None of them:
        the norm alone.
      norm_scale: `x / sqrt(mean(x^2) + eps) * norm_scale` over the channels of a head comes first.
        None: no norm.
      eps: of the norm.
      magnitude: what rotated channels are multiplied by (YaRN).
      interleaved: channel 2 j is paired with 2 j + 1 (GPT-J, DeepSeek); otherwise j with j + J (the
        rotate-half layout of Llama and Qwen checkpoints).
      implementation: None, "reference", "xla" or "tpu"; see `kernels_pallas.dispatch`.
      interpret: run the kernel in interpret mode, on CPU.

    Returns:
      The rotated heads, in x's dtype.

    Raises:
      ValueError: a shape, dtype or option that does not fit, by name.
      NotImplementedError: the implementation asked for does not cover this call.
    """
    x, positions = jnp.asarray(x), jnp.asarray(positions)
    norm_scale = as_array(norm_scale)
    _check(x, positions, frequencies, norm_scale)
    check_interpret(OP, interpret, implementation)
    pairs = Pairs(x.shape[3], len(frequencies), interleaved)
    turns = tuple(float(frequency) for frequency in frequencies)
    options = RotaryOptions(pairs, turns, float(magnitude), float(eps))
    inputs = RotaryInputs(x, norm_scale, positions)
    refusals = {"tpu": partial(tpu.unsupported, inputs)}
    chosen = dispatch.choose(OP, implementation, refusals, inputs)
    inputs = RotaryInputs._make(dispatch.for_its_platform(OP, chosen, interpret, inputs))
    if chosen == "reference":
        return reference.rotary(inputs, options)
    if chosen == "xla":
        return xla.rotary(inputs, options)

    def rotate(*arrays: Array | None) -> tuple[Array]:
        return (tpu.rotary(RotaryInputs._make(arrays), options, interpret),)

    heads = x.shape[2]
    (y,) = by_rows_and_heads(rotate, inputs, ["b.h.", ".", "b."], ["b.h."], heads)
    assert y is not None
    return y


def _check(
    x: Array,
    positions: Array,
    frequencies: Float[np.ndarray, " J"],
    norm_scale: Array | None,
) -> None:
    """ValueError for the first argument that does not fit."""
    check_axes(OP, "x", x, "[B, T, H, D]")
    check_shape(OP, "positions", positions, x.shape[:2])
    check_integer(OP, "positions", positions)
    most = x.shape[3] // 2
    least = 1 if norm_scale is None else 0
    if np.ndim(frequencies) != 1 or not least <= len(frequencies) <= most:
        raise ValueError(
            f"{OP}: frequencies: got shape {np.shape(frequencies)}, expected (J,) with J from "
            f"{least} to {most} for heads of {x.shape[3]} channels"
        )
    if norm_scale is not None:
        check_shape(OP, "norm_scale", norm_scale, x.shape[3:])
        check_float(OP, "norm_scale", norm_scale)
