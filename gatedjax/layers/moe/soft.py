"""Soft mixture of experts (arXiv 2308.00951).

No token is routed; experts work on mixtures of all of them.

Not causal: for encoders; a causal model refuses it (`config/run.py`). Slots are means over a
document, not over the row that it is packed in, and padding is in none of them.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from gatedjax.config import SoftMoEConfig
from gatedjax.layers.activations import gated_product
from gatedjax.layers.base import FeedForward
from gatedjax.layers.documents import Documents, documents_of, without_padding
from gatedjax.layers.gate_values import record
from gatedjax.layers.norm import unit_length
from gatedjax.layers.parameters import parameter
from gatedjax.layers.token_info import TokenInfo

EPS = 1e-6


def slot_logits(
    x: Float[Array, "B T M"],
    phi: Float[Array, "M E s"],
    scale: Float[Array, ""],
) -> Float[Array, "B T E s"]:
    """Cosines of tokens and slots, times a learned scale (section 2.3).

    Otherwise they would grow with the width.
    """
    x = unit_length(x.astype(jnp.float32), EPS)
    phi = phi.astype(jnp.float32)
    phi = phi * jax.lax.rsqrt(jnp.sum(phi * phi, axis=0, keepdims=True) + EPS)
    return scale * jnp.einsum("btm,mes->btes", x, phi)


def dispatch_weights(
    logits: Float[Array, "B T E s"],
    documents: Documents | None = None,
) -> Float[Array, "B T E s"]:
    """What each slot takes of each token: a softmax over the tokens of a document.

    Args:
      logits: of tokens and slots.
      documents: of the rows; None where every row is one.
    """
    if documents is None:
        return jax.nn.softmax(logits, axis=1)
    num_tokens = logits.shape[1]

    def softmax_of_row(logits: Float[Array, "T E s"], index: Int[Array, " T"]) -> Array:
        largest = jax.ops.segment_max(jax.lax.stop_gradient(logits), index, num_tokens)
        exps = jnp.exp(logits - largest[index])
        return exps / jax.ops.segment_sum(exps, index, num_tokens)[index]

    dispatch = jax.vmap(softmax_of_row)(logits, documents.index)
    return without_padding(dispatch, documents.is_token)


def combine_weights(logits: Float[Array, "B T E s"]) -> Float[Array, "B T E s"]:
    """What each token takes of each slot: a softmax over the slots of all experts."""
    flat = logits.reshape(*logits.shape[:2], -1)
    return jax.nn.softmax(flat, axis=-1).reshape(logits.shape)


# Every expert's outputs of its slots.
Experts = Callable[[Float[Array, "B E s M"]], Float[Array, "B E s M"]]


def gated_experts(
    slots: Float[Array, "B E s M"],
    gate: Float[Array, "E M F"],
    up: Float[Array, "E M F"],
    down: Float[Array, "E F M"],
    activation: str,
) -> Float[Array, "B E s M"]:
    """A gated MLP of each expert.

    Args:
      slots: what they work on.
      gate, up, down: their matrices.
      activation: of the gate.
    """
    gate_logits = jnp.einsum("besm,emf->besf", slots, gate)
    hidden = gated_product(gate_logits, jnp.einsum("besm,emf->besf", slots, up), activation)
    return jnp.einsum("besf,efm->besm", hidden, down)


def soft_experts(
    x: Float[Array, "B T M"],
    dispatch: Float[Array, "B T E s"],
    combine: Float[Array, "B T E s"],
    experts: Experts,
) -> Float[Array, "B T M"]:
    """Slots are means of tokens, outputs are means of slots; both in float32. One document a row.

    Args:
      x: the tokens.
      dispatch: `dispatch_weights`.
      combine: `combine_weights`.
      experts: what is done with the slots.

    Returns:
      The outputs, in x's dtype.
    """
    # Dispatch, in float32: means over all tokens of a row.
    slots = jnp.einsum("btes,btm->besm", dispatch, x.astype(jnp.float32)).astype(x.dtype)
    y = experts(slots)
    return jnp.einsum("btes,besm->btm", combine, y.astype(jnp.float32)).astype(x.dtype)


def soft_experts_of_documents(
    x: Float[Array, "B T M"],
    dispatch: Float[Array, "B T E s"],
    combine: Float[Array, "B T E s"],
    documents: Documents,
    experts: Experts,
) -> Float[Array, "B T M"]:
    """`soft_experts` of every document of packed rows, by itself: the first of every row, then the
    second, and so on. Other documents are selected away, not multiplied by 0.

    Args:
      x: the tokens.
      dispatch: `dispatch_weights`.
      combine: `combine_weights`.
      documents: of the rows.
      experts: what is done with the slots.

    Returns:
      The outputs, 0 for padding.
    """

    # What lies between is computed again in the backward pass, and not kept for each document.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_document(number: Array, arrays: tuple[Array, Array, Array]) -> Array:
        mask = documents.is_token & (documents.index == number)
        own_x, own_dispatch, own_combine = (without_padding(array, mask) for array in arrays)
        return without_padding(soft_experts(own_x, own_dispatch, own_combine, experts), mask)

    def add(y: Array, number: Array) -> tuple[Array, None]:
        arrays = (x, dispatch, combine)
        # The loop is as long as a row; the documents mostly are fewer.
        is_there = jnp.any(documents.is_token & (documents.index == number))
        nothing = jnp.zeros_like(y)
        return y + jax.lax.cond(
            is_there, lambda: of_document(number, arrays), lambda: nothing
        ), None

    y, _ = jax.lax.scan(add, jnp.zeros_like(x), jnp.arange(x.shape[1]))
    return y


def mixed_softly(
    x: Float[Array, "B T M"],
    logits: Float[Array, "B T E s"],
    documents: Documents | None,
    experts: Experts,
) -> tuple[Float[Array, "B T M"], Float[Array, "B T E s"], Float[Array, "B T E s"]]:
    """The outputs, what went into the slots, and what came out of them.

    Args:
      x: the tokens, zeros for padding.
      logits: of tokens and slots.
      documents: of the rows; None where every row is one.
      experts: what is done with the slots.
    """
    dispatch = dispatch_weights(logits, documents)
    combine = combine_weights(logits)
    if documents is None:
        y = soft_experts(x, dispatch, combine, experts)
    else:
        y = soft_experts_of_documents(x, dispatch, combine, documents, experts)
    return y, dispatch, combine


class SoftMoE(FeedForward):
    """E gated MLPs with s slots each.

    Cost does not depend on how many experts there are, only on E s (and on the number of documents,
    each of which has its own slots).
    """

    config: SoftMoEConfig

    @nn.compact
    def with_statistics(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo | None = None,
        router_logits: Float[Array, "B T _"] | None = None,
    ) -> tuple[Array, dict[str, Array], Array | None]:
        """No statistics: loads are even by construction."""
        c = self.config
        width = x.shape[-1]
        phi = parameter(
            self,
            "phi",
            axes=["embed", "router", None],
            shape=[width, c.num_experts, c.slots_per_expert],
            init=nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2)),
        )
        scale = parameter(
            self,
            "scale",
            axes=[],
            shape=[],
            init=nn.initializers.ones,
        )
        gate = self._stack("gate", ("embed", "mlp"), (width, c.hidden))
        up = self._stack("up", ("embed", "mlp"), (width, c.hidden))
        down = self._stack("down", ("mlp", "embed"), (c.hidden, width))
        documents = documents_of(info)
        if documents is not None:
            x = without_padding(x, documents.is_token)
        logits = slot_logits(x, phi, scale)
        experts = functools.partial(
            gated_experts,
            gate=gate,
            up=up,
            down=down,
            activation=c.activation,
        )
        y, dispatch, combine = mixed_softly(x.astype(self.dtype), logits, documents, experts)
        record(self, "dispatch", dispatch)
        record(self, "combine", combine)
        return y, {}, router_logits

    def _stack(
        self,
        name: str,
        axes: tuple[str, str],
        shape: tuple[int, int],
    ) -> Array:
        """A matrix of every expert, in the dtype of the activations."""
        stack = parameter(
            self,
            name,
            axes=["expert", *axes],
            shape=[self.config.num_experts, *shape],
            init=nn.initializers.normal(self.init_std),
        )
        return stack.astype(self.dtype)

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        c = self.config
        slots = c.num_experts * c.slots_per_expert
        # Three products of tokens and slots: the logits, the slots' means, the outputs' means.
        mixing = 3 * 2 * width * slots
        # The experts' work does not depend on the number of tokens, which share it.
        return mixing + 6 * width * c.hidden * slots / seq_len
