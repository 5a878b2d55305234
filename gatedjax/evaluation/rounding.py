"""Activations rounded to few bits: what outliers cost who quantizes a model.

Largest magnitude over 2^(bits - 1) - 1 is the step of a whole tensor, so one outlier takes the
bits of all others (Quantizable Transformers, arXiv 2306.12929).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PyTree

from gatedjax.compiler_options import careful_jit
from gatedjax.config import ModelConfig
from gatedjax.data import Batch
from gatedjax.layers import FeedForward, Mixer
from gatedjax.layers.block import Block
from gatedjax.layers.projection import Projection
from gatedjax.training.eval_step import eval_step_by_row
from gatedjax.training.losses import TokenLosses

# The methods of mixers and feed-forwards that a model calls; the tokens' vectors come first.
_OF_LAYERS = ("with_cache", "with_weights", "with_values", "with_statistics")


def rounded(x: Float[Array, "..."], bits: int) -> Float[Array, "..."]:
    """`x` as integers of so many bits times one step for all of it, and back, in x's dtype."""
    levels = 2 ** (bits - 1) - 1
    x32 = x.astype(jnp.float32)
    step = jnp.max(jnp.abs(x32)) / levels
    # All zeros have no step; they stay what they are.
    step = jnp.where(step == 0.0, 1.0, step)
    return (jnp.round(x32 / step) * step).astype(x.dtype)


@contextlib.contextmanager
def rounded_activations(bits: int) -> Iterator[None]:
    """Inside this block, models round what their layers take and give, and what matrices take.

    That is the input of every projection, the input and output of every mixer and feed-forward,
    and the residual stream after every block, each tensor of a batch with its own step. Weights,
    what is inside of kernels, and the head are as ever.
    """
    with nn.intercept_methods(functools.partial(_rounding, bits)):
        yield


def _rounding(
    bits: int,
    method: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """A call of a module's method, with rounded vectors where the module is one of those."""
    module, name = context.module, context.method_name
    is_layer = isinstance(module, Mixer | FeedForward) and name in _OF_LAYERS
    is_projection = isinstance(module, Projection) and name == "__call__"
    if is_layer or is_projection:
        x, *others = args
        args = (rounded(x, bits), *others)
    result = method(*args, **kwargs)
    if is_layer or (isinstance(module, Block) and name == "__call__"):
        y, *others = result
        return (rounded(y, bits), *others)
    return result


def _losses(
    bits: int,
    model: ModelConfig,
    params: PyTree,
    batch: Batch,
) -> TokenLosses:
    with rounded_activations(bits):
        return eval_step_by_row(model, params, batch)


# `training.eval_step.eval_step_by_row` of a model whose activations are rounded.
rounded_eval_step = careful_jit(_losses, static_argnums=(0, 1))
