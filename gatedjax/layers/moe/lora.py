"""Mixture of low-rank experts over frozen dense weights.

`y = x W + (alpha / r) sum_a w_a(x) x A_a B_a`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from gatedjax.config import LoRAMixtureConfig
from gatedjax.layers.activations import gated_product
from gatedjax.layers.base import FeedForward
from gatedjax.layers.documents import is_token, without_padding
from gatedjax.layers.gate_values import record
from gatedjax.layers.low_rank import lora_experts
from gatedjax.layers.moe.routing import check_places
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import contract
from gatedjax.layers.token_info import TokenInfo
from kernels_pallas.common.opaque import opaque


def xlora_weights(
    x: Float[Array, "... M"],
    classifier: Float[Array, "M E"],
    temperature: float,
    k: int,
) -> Float[Array, "... E"]:
    """`softmax(x W / temperature)` (X-LoRA, arXiv 2402.07148).

    Args:
      x: the last hidden states of a first pass without experts, as published (where every layer
        has a classifier of its own), or a layer's own input.
      classifier: W.
      temperature: of the softmax.
      k: all but the k largest are set to 0, not renormalized; 0 keeps all.

    Returns:
      The weights, float32.
    """
    logits = x.astype(jnp.float32) @ classifier / temperature
    weights = jax.nn.softmax(logits, axis=-1)
    # By logits: several weights may have rounded to 0.
    return jnp.where(_is_largest(logits, k), weights, 0.0)


def phatgoose_weights(
    x: Float[Array, "... I"],
    gates: Float[Array, "E I"],
    k: int,
) -> Float[Array, "... E"]:
    """Softmax over the k largest `<x', v'> / sqrt(I)`, x' and v' standardized.

    PHATGOOSE, arXiv 2402.05859. The v were each trained with one expert, behind `sigmoid_weights`:
    their lengths cannot be compared.
    """
    logits = _standardized(x) @ _standardized(gates).T / jnp.sqrt(jnp.float32(x.shape[-1]))
    return jax.nn.softmax(jnp.where(_is_largest(logits, k), logits, -jnp.inf), axis=-1)


def sigmoid_weights(x: Float[Array, "... I"], gates: Float[Array, "E I"]) -> Float[Array, "... E"]:
    """`sigmoid(<x, v>)`: how a PHATGOOSE gate is trained, with its one expert."""
    return jax.nn.sigmoid(x.astype(jnp.float32) @ gates.T)


def _standardized(x: Float[Array, "... I"]) -> Float[Array, "... I"]:
    """Mean 0 and variance 1 over the last axis, in float32."""
    return jax.nn.standardize(x.astype(jnp.float32), axis=-1, epsilon=1e-5)


def _is_largest(values: Float[Array, "... E"], k: int) -> Bool[Array, "... E"]:
    """The k largest of the last axis, the lower index first among equals; everything for k = 0."""
    check_places("experts_per_token", k or values.shape[-1], values.shape[-1])
    if not k:
        return jnp.ones(values.shape, bool)
    _, best = jax.lax.top_k(jax.lax.stop_gradient(values), k)
    return jnp.any(best[..., None] == jnp.arange(values.shape[-1]), axis=-2)


class LoRAProjection(nn.Module):
    """One frozen matrix and its low-rank experts; B starts at 0, so at first nothing is added."""

    config: LoRAMixtureConfig
    in_axis: tuple[str, int]
    out_axis: tuple[str, int]
    init_std: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "... I"],
        weights: Float[Array, "... E"] | None,
    ) -> Float[Array, "... O"]:
        """`weights`: of the experts.

        None makes them here, from x and this matrix's own gate vectors.
        """
        c = self.config
        in_name, in_size = self.in_axis
        out_name, out_size = self.out_axis
        # By this name it is known that it never trains (`training/trainable.py`).
        frozen = parameter(
            self,
            "frozen",
            axes=[in_name, out_name],
            shape=[in_size, out_size],
            init=nn.initializers.normal(self.init_std),
        )
        a = parameter(
            self,
            "lora_a",
            axes=["router", in_name, "rank"],
            shape=[c.num_experts, in_size, c.rank],
            init=nn.initializers.normal(in_size**-0.5),
        )
        b = parameter(
            self,
            "lora_b",
            axes=["router", "rank", out_name],
            shape=[c.num_experts, c.rank, out_size],
            init=nn.initializers.zeros,
        )
        if weights is None:
            weights = self._own_weights(x)
        # Where parameters are made in the same program, the compiler sees that b is all zeros.
        b = opaque(b)
        x = x.astype(self.dtype)
        dense = contract(x, jax.lax.stop_gradient(frozen).astype(self.dtype), 1)
        experts = lora_experts(
            x,
            weights,
            a.astype(self.dtype),
            b.astype(self.dtype),
        )
        return dense + (c.alpha / c.rank * experts).astype(self.dtype)

    def _own_weights(self, x: Float[Array, "... I"]) -> Float[Array, "... E"]:
        c = self.config
        in_name, in_size = self.in_axis
        gates = parameter(
            self,
            "gates",
            axes=["router", in_name],
            shape=[c.num_experts, in_size],
            init=nn.initializers.zeros,
        )
        # As b below: zeros that the compiler must not see.
        gates = opaque(gates)
        if c.gate == "sigmoid":
            weights = sigmoid_weights(x, gates)
        else:
            weights = phatgoose_weights(x, gates, c.experts_per_token)
        record(self, "expert_weights", weights)
        return weights


class LoRAMixture(FeedForward):
    """A frozen gated MLP whose three matrices each have their experts."""

    config: LoRAMixtureConfig

    @nn.compact
    def with_statistics(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo | None = None,
        router_logits: Float[Array, "B T _"] | None = None,
    ) -> tuple[Array, dict[str, Array], Array | None]:
        c = self.config
        x = without_padding(x, is_token(info))
        width = ("embed", x.shape[-1])
        hidden = ("mlp", c.hidden)
        weights = self._shared_weights(x, info)
        # All three matrices are frozen; what is trained are their experts.
        gate_logits = self._project("gate", width, hidden)(x, weights)
        up = self._project("up", width, hidden)(x, weights)
        h = gated_product(gate_logits, up, c.activation)
        h = nn.with_logical_constraint(h, ("batch", "length", "mlp"))
        y = self._project("down", hidden, width)(h, weights)
        return y, {}, router_logits

    def _project(
        self,
        name: str,
        in_axis: tuple[str, int],
        out_axis: tuple[str, int],
    ) -> LoRAProjection:
        return LoRAProjection(
            self.config,
            in_axis,
            out_axis,
            self.init_std,
            self.dtype,
            name=name,
        )

    def _shared_weights(
        self,
        x: Array,
        info: TokenInfo | None,
    ) -> Float[Array, "B T E"] | None:
        """Weights that all three matrices use; None where each makes its own."""
        c = self.config
        if c.gate != "xlora":
            return None
        weights = None
        if c.first_pass and info is not None:
            weights = info.lora_weights
        if weights is None:
            classifier = parameter(
                self,
                "classifier",
                axes=["embed", "router"],
                shape=[x.shape[-1], c.num_experts],
                init=nn.initializers.normal(self.init_std),
            )
            weights = xlora_weights(
                x,
                classifier,
                c.temperature,
                c.experts_per_token,
            )
        record(self, "expert_weights", weights)
        return weights

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        c = self.config
        dense = 6 * width * c.hidden
        experts = 6 * c.num_experts * c.rank * (width + c.hidden)
        return dense + experts
