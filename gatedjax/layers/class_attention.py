"""Gated class-attention (arXiv 2211.12292): masks of each task on queries, keys and values.

    m = sigmoid(s e_task)                                   a mask, soft at first (s small)
    q = (c W_q) * m_q,   k = ([c; x] W_k) * m_k,   v = ([c; x] W_v) * m_v
    y = softmax(q k / sqrt(d)) v W_o                        c: the class token alone asks

The masks are those of hard attention to the task (HAT, arXiv 1801.01423). In every epoch s grows
from 1 / s_max to s_max, and evaluation is at s_max, where masks are 0 or 1. What earlier tasks use
is protected: `kept_fraction` multiplies the gradients of matrices, `mask_penalty` is the price of
channels that no task before has used, and `compensated` undoes what s does to the gradient of e.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from gatedjax.errors import require
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection
from kernels_pallas.attention import attention

# The largest argument of cosh: its value is still far from infinite in float32.
MOST_COSH = 50.0


def annealed_scale(
    batch: Int[Array, ""] | int,
    batches: int,
    largest: float,
) -> Float[Array, ""]:
    """s at a batch of an epoch, from 1 / s_max at the first to s_max at the last.

    Args:
      batch: its number, from 0.
      batches: of an epoch.
      largest: s_max.
    """
    done = jnp.asarray(batch, jnp.float32) / max(batches - 1, 1)
    return 1 / largest + (largest - 1 / largest) * done


def task_mask(embedding: Float[Array, "..."], scale: Float[Array, ""] | float) -> Array:
    """`sigmoid(s e)`."""
    return jax.nn.sigmoid(scale * embedding)


def used_before(masks: Float[Array, "tasks ..."]) -> Float[Array, "..."]:
    """The largest mask of the tasks so far: what is protected. Zeros where there is no task."""
    return jnp.max(masks, axis=0, initial=0.0)


def mask_penalty(
    mask: Float[Array, "..."],
    before: Float[Array, "..."],
) -> Float[Array, ""]:
    """`sum m (1 - m_before) / sum (1 - m_before)`: channels that are free cost, used ones do not.

    Args:
      mask: of the task that is learned, soft.
      before: `used_before` of the earlier ones.
    """
    free = 1 - before
    # With nothing free there is nothing to pay.
    total = jnp.sum(free)
    return jnp.sum(mask * free) / jnp.where(total > 0, total, 1)


def kept_fraction(
    of_inputs: Float[Array, " in"],
    of_outputs: Float[Array, " out"],
) -> Float[Array, "in out"]:
    """`1 - min(m_in, m_out)`, what multiplies the gradient of a matrix between masked channels.

    Args:
      of_inputs: `used_before` of the channels that come in; ones where they have no mask.
      of_outputs: of those that come out.
    """
    return 1 - jnp.minimum(of_inputs[:, None], of_outputs)


def compensated(
    gradient: Float[Array, "..."],
    embedding: Float[Array, "..."],
    scale: Float[Array, ""] | float,
    largest: float,
) -> Float[Array, "..."]:
    """The gradient of e as if s were 1, times s_max.

        s_max (cosh(s e) + 1) / (s (cosh(e) + 1)) gradient

    Args:
      gradient: of the loss by e, through `sigmoid(s e)`.
      embedding: e.
      scale: s.
      largest: s_max.
    """
    numerator = jnp.cosh(jnp.clip(scale * embedding, -MOST_COSH, MOST_COSH)) + 1
    return gradient * largest / scale * numerator / (jnp.cosh(embedding) + 1)


class GatedClassAttention(nn.Module):
    """A class token asks the tokens, through the masks of a task.

    Attributes:
      num_heads: how many; M is a multiple of it.
      num_tasks: each has three masks of M channels.
      init_std: of the matrices.
      dtype: of the activations.
    """

    num_heads: int
    num_tasks: int
    init_std: float = 0.02
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T M"],
        task: Int[Array, ""] | int,
        scale: Float[Array, ""] | float,
    ) -> Float[Array, "B 1 M"]:
        """The class token after attention. Of a task that is not known, call it for every task.

        Args:
          x: the tokens.
          task: its number, from 0.
          scale: s.
        """
        B, _, M = x.shape
        H = self.num_heads
        require(M % H == 0, "num_heads", H, f"a divisor of the width {M}")
        init = nn.initializers.normal(self.init_std)
        token = parameter(self, "class_token", axes=["embed_act"], shape=[M], init=init)
        embeddings = parameter(
            self,
            "tasks",
            axes=[None, None, "embed_act"],
            shape=[self.num_tasks, 3, M],
            init=nn.initializers.normal(1.0),
        )
        masks = task_mask(embeddings[task], scale)
        asking = jnp.broadcast_to(token, (B, 1, M)).astype(x.dtype)
        seen = jnp.concatenate([asking, x], axis=1)
        inputs = {"query": asking, "key": seen, "value": seen}

        def masked(name: str, mask: Float[Array, " M"]) -> Float[Array, "B T H D"]:
            width, heads = {"embed": M}, {"heads": H, "head_dim": M // H}
            y = Projection(width, heads, self.init_std, self.dtype, name=name)(inputs[name])
            return y * mask.reshape(H, M // H).astype(y.dtype)

        q, k, v = (masked(name, masks[n]) for n, name in enumerate(inputs))
        o = attention(q, k, v, causal=False)
        heads, width = {"heads": H, "head_dim": M // H}, {"embed": M}
        return Projection(heads, width, self.init_std, self.dtype, name="out")(o)
