"""Modern Hopfield networks (arXiv 2008.02217): states are drawn to stored patterns.

    xi <- sum_j softmax_j(beta xi p_j) p_j            one step of retrieval
    y = sum_j softmax_j(beta xi p_j) v_j              what is read at the end

One step is a call of `attention` without causality, in which patterns are keys and values, and beta
is the scale. Attention itself is the reading without a step. Patterns may be of another sequence
than the states: an association of two sequences, learned states (pooling) or learned patterns (a
lookup).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from gatedjax.layers.norm import LayerNorm
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection
from kernels_pallas.attention import attention


def retrieve(
    states: Float[Array, "B T H K"],
    patterns: Float[Array, "B S Hk K"],
    *,
    beta: float,
    steps: int,
    tolerance: float = 1e-4,
    **options: Any,
) -> Float[Array, "B T H K"]:
    """The states after at most `steps` steps.

    A head of a row whose states all moved by `tolerance` or less stays where it is, so a large
    number of steps is one to a fixed point. Differentiable through all steps.

    Args:
      states: where retrieval begins.
      patterns: what is stored; Hk divides H.
      beta: the inverse temperature. Small ones end in means of many patterns.
      steps: how many at most.
      tolerance: the length of a step from which on a state counts as moving.
      options: of `attention`: segment_ids, block_mask, implementation.

    Returns:
      The states, in their dtype.
    """

    def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        states, is_moving = carry
        drawn = attention(states, patterns, patterns, scale=beta, causal=False, **options)
        moved = jnp.where(is_moving, drawn.astype(states.dtype), states)
        change = jax.lax.stop_gradient(moved - states).astype(jnp.float32)
        length = jnp.sqrt(jnp.sum(change**2, axis=-1, keepdims=True))
        # Of a row and head together, as in the paper's code.
        farthest = jnp.max(length, axis=1, keepdims=True)
        return (moved, is_moving & (farthest > tolerance)), None

    B, _, H, _ = states.shape
    everything = jnp.ones((B, 1, H, 1), bool)
    (states, _), _ = jax.lax.scan(step, (states, everything), None, length=steps)
    return states


def associate(
    states: Float[Array, "B T H K"],
    patterns: Float[Array, "B S Hk K"],
    values: Float[Array, "B S Hk V"],
    *,
    beta: float,
    steps: int = 0,
    tolerance: float = 1e-4,
    **options: Any,
) -> Float[Array, "B T H V"]:
    """What is read of `values` by the states after some steps of retrieval.

    Args:
      states, patterns, beta, steps, tolerance, options: as of `retrieve`.
      values: of the patterns.

    Returns:
      The values read, in their dtype.
    """
    if steps:
        states = retrieve(states, patterns, beta=beta, steps=steps, tolerance=tolerance, **options)
    return attention(states, patterns, values, scale=beta, causal=False, **options)


class Hopfield(nn.Module):
    """The association of states with stored patterns: `layer(states, patterns)`.

    States, patterns and what values are made from are normed (LayerNorm) and projected to heads.

    Attributes:
      num_heads, head_dim: of the association.
      beta: the inverse temperature; head_dim^-0.5 if None.
      steps: of retrieval before reading; 0 is attention.
      tolerance: a head that moves less stops.
      norm_eps, init_std, dtype: as of `Mixer`.
    """

    num_heads: int
    head_dim: int
    beta: float | None = None
    steps: int = 0
    tolerance: float = 1e-4
    norm_eps: float = 1e-5
    init_std: float = 0.02
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        states: Float[Array, "B T M"],
        patterns: Float[Array, "B S _"],
        **options: Any,
    ) -> Float[Array, "B T M"]:
        """The states' association with the patterns.

        Args:
          states: what is looked up.
          patterns: what is stored; keys and values are made from them.
          options: of `attention`: segment_ids (a pair), block_mask, implementation.
        """
        heads = {"heads": self.num_heads, "head_dim": self.head_dim}

        def projected(name: str, x: Array) -> Array:
            x = LayerNorm(self.norm_eps, name=f"{name}_norm")(x)
            width = {"embed": x.shape[-1]}
            return Projection(width, heads, self.init_std, self.dtype, name=name)(x)

        read = associate(
            projected("state", states),
            projected("pattern", patterns),
            projected("value", patterns),
            beta=self.head_dim**-0.5 if self.beta is None else self.beta,
            steps=self.steps,
            tolerance=self.tolerance,
            **options,
        )
        width = {"embed": states.shape[-1]}
        return Projection(heads, width, self.init_std, self.dtype, name="out")(read)


class HopfieldPooling(nn.Module):
    """A sequence as a few vectors: learned states are associated with its tokens.

    Attributes:
      association: how; an unnamed `Hopfield`.
      num_states: vectors of the result.
      init_std: of the states.
    """

    association: Hopfield
    num_states: int = 1
    init_std: float = 0.02

    @nn.compact
    def __call__(self, x: Float[Array, "B S M"], **options: Any) -> Float[Array, "B _ M"]:
        states = _learned_rows(self, "states", self.num_states, x)
        return self.association(states, x, **options)


class HopfieldLookup(nn.Module):
    """A learned memory: tokens are associated with learned patterns.

    Attributes:
      association: how; an unnamed `Hopfield`.
      num_patterns: how many are stored.
      init_std: of the patterns.
    """

    association: Hopfield
    num_patterns: int
    init_std: float = 0.02

    @nn.compact
    def __call__(self, x: Float[Array, "B T M"], **options: Any) -> Float[Array, "B T M"]:
        patterns = _learned_rows(self, "patterns", self.num_patterns, x)
        return self.association(x, patterns, **options)


def _learned_rows(
    module: HopfieldPooling | HopfieldLookup,
    name: str,
    count: int,
    x: Float[Array, "B _ M"],
) -> Float[Array, "B count M"]:
    """A parameter of `count` vectors, as wide as those of x, for each of its rows."""
    B, _, M = x.shape
    rows = parameter(
        module,
        name,
        axes=[None, "embed_act"],
        shape=[count, M],
        init=nn.initializers.normal(module.init_std),
    )
    return jnp.broadcast_to(rows.astype(x.dtype), (B, count, M))
