"""Mixture of low-rank experts over frozen dense weights: `y = x W + (alpha / r) sum_a w_a(x) x A_a B_a`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.config import LoRAMixtureConfig
from gatedjax.layers.mlp import gated_product
from gatedjax.layers.projection import contract, parameter
from gatedjax.layers.token_info import TokenInfo
from kernels_pallas.common.opaque import opaque


def lora_experts(
    x: Float[Array, "... I"],
    weights: Float[Array, "... n"],
    a: Float[Array, "n I r"],
    b: Float[Array, "n r O"],
) -> Float[Array, "... O"]:
    """`sum_n weight_n x A_n B_n`, every expert on every token: they are thin. The sum is float32."""
    h = jnp.einsum("...i,nir->...nr", x, a, preferred_element_type=jnp.float32)
    h = (weights[..., None] * h).astype(x.dtype)
    return jnp.einsum("...nr,nro->...o", h, b, preferred_element_type=jnp.float32)


def xlora_weights(
    x: Float[Array, "... M"], classifier: Float[Array, "M n"], temperature: float, k: int
) -> Float[Array, "... n"]:
    """`softmax(x W / temperature)` (X-LoRA, arXiv 2402.07148); all but the k largest set to 0, not renormalized; k = 0:
    all kept. x are the last hidden states of a first pass without experts, as published, or a layer's own input.
    """
    weights = jax.nn.softmax(x.astype(jnp.float32) @ classifier / temperature, axis=-1)
    return weights * _is_largest(weights, k)


def phatgoose_weights(
    x: Float[Array, "... I"], gates: Float[Array, "n I"], k: int
) -> Float[Array, "... n"]:
    """Softmax over the k largest `<x', v'> / sqrt(I)`, x' and v' standardized (PHATGOOSE, arXiv 2402.05859).

    The v were each trained with one expert, behind `sigmoid_weights`: their lengths cannot be compared.
    """
    standard = lambda u: jax.nn.standardize(u.astype(jnp.float32), axis=-1, epsilon=1e-5)
    score = standard(x) @ standard(gates).T / jnp.sqrt(jnp.float32(x.shape[-1]))
    return jax.nn.softmax(jnp.where(_is_largest(score, k), score, -jnp.inf), axis=-1)


def sigmoid_weights(x: Float[Array, "... I"], gates: Float[Array, "n I"]) -> Float[Array, "... n"]:
    """`sigmoid(<x, v>)`: how a PHATGOOSE gate is trained, with its one expert."""
    return jax.nn.sigmoid(x.astype(jnp.float32) @ gates.T)


def _is_largest(scores: Array, k: int) -> Array:
    """The k largest of the last axis, the lower index first among equals; everything for k = 0."""
    if not k:
        return jnp.ones(scores.shape, bool)
    best = jax.lax.top_k(jax.lax.stop_gradient(scores), k)[1]
    return jnp.any(best[..., None] == jnp.arange(scores.shape[-1]), axis=-2)


class LoRAProjection(nn.Module):
    """One frozen matrix and its low-rank experts; B starts at 0, so at first nothing is added."""

    config: LoRAMixtureConfig
    in_axes: tuple[str, int]
    out_axes: tuple[str, int]
    std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "... I"], weights: Float[Array, "... n"] | None
    ) -> Float[Array, "... O"]:
        """`weights`: of the experts; None makes them here, from x and this matrix's own gate vectors."""
        c, (into, I), (out, O) = self.config, self.in_axes, self.out_axes
        normal = nn.initializers.normal
        # By this name the optimizer knows to leave it alone (`optim.py`).
        frozen = parameter(self, "frozen", [into, out], [I, O], normal(self.std))
        a = parameter(
            self, "lora_a", ["router", into, "rank"], [c.num_experts, I, c.rank], normal(I**-0.5)
        )
        b = parameter(
            self,
            "lora_b",
            ["router", "rank", out],
            [c.num_experts, c.rank, O],
            nn.initializers.zeros,
        )
        if weights is None:
            gates = parameter(
                self, "gates", ["router", into], [c.num_experts, I], nn.initializers.zeros
            )
            gates = opaque(gates)
            is_training_form = c.gate == "sigmoid"
            weights = (
                sigmoid_weights(x, gates)
                if is_training_form
                else phatgoose_weights(x, gates, c.experts_per_token)
            )
        # Where parameters are made in the same program, the compiler sees that b and gates are all zeros.
        b = opaque(b)
        x = x.astype(self.dtype)
        dense = contract(x, jax.lax.stop_gradient(frozen).astype(self.dtype), 1)
        experts = lora_experts(x, weights, a.astype(self.dtype), b.astype(self.dtype))
        return dense + (c.alpha / c.rank * experts).astype(self.dtype)


class LoRAMixture(nn.Module):
    """A frozen gated MLP whose three matrices each have their experts."""

    config: LoRAMixtureConfig
    std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo | None = None,
        router_logits: Array | None = None,
    ):
        """Returns y, no statistics, and the router logits as they came."""
        c, width, hidden = self.config, ("embed", x.shape[-1]), ("mlp", self.config.hidden)
        weights = info.lora_weights if c.first_pass else None
        if c.gate == "xlora" and weights is None:
            init = nn.initializers.normal(self.std)
            classifier = parameter(
                self, "classifier", ["embed", "router"], [x.shape[-1], c.num_experts], init
            )
            weights = xlora_weights(x, classifier, c.temperature, c.experts_per_token)
        project = lambda name, *axes: LoRAProjection(c, *axes, self.std, self.dtype, name=name)
        h = gated_product(
            project("gate", width, hidden)(x, weights),
            project("up", width, hidden)(x, weights),
            c.activation,
        )
        h = nn.with_logical_constraint(h, ("batch", "length", "mlp"))
        return project("down", hidden, width)(h, weights), {}, router_logits
