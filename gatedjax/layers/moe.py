"""Sparse mixture of gated MLPs: route, sort rows by expert, three grouped matmuls, put the rows back."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from gatedjax.config import GatedMLPConfig, SparseMoEConfig
from gatedjax.layers.mlp import GatedMLP, gated_product
from gatedjax.layers.projection import Projection, parameter
from gatedjax.layers.routing import ROUTERS, Routing, balance_loss, expert_load, router_z_loss
from gatedjax.sharding import per_shard
from kernels_pallas import grouped_matmul, permute_rows, sort_by_group


def sparse_experts(
    x: Float[Array, "B T M"],
    experts: Int[Array, "B T k"],
    weights: Float[Array, "B T k"],
    gate: Float[Array, "E M F"],
    up: Float[Array, "E M F"],
    down: Float[Array, "E F M"],
    activation: str,
) -> Float[Array, "B T M"]:
    """`sum_k weight_k * down_k(activation(gate_k x) * up_k x)` over each token's experts: none dropped, none padded."""
    order, inverse, sizes = sort_by_group(experts.reshape(-1), gate.shape[0])
    rows = permute_rows(x.reshape(-1, x.shape[-1]), order, inverse)
    h = gated_product(grouped_matmul(rows, gate, sizes), grouped_matmul(rows, up, sizes), activation)
    y = permute_rows(grouped_matmul(h, down, sizes), inverse, order)
    y = y.reshape(*experts.shape, x.shape[-1]).astype(jnp.float32)
    return jnp.einsum("btk,btkm->btm", weights, y).astype(x.dtype)


class SparseMoE(nn.Module):
    """Each token goes to its k experts, none is dropped; a shared expert may see every token, behind its own gate."""

    config: SparseMoEConfig
    std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B T M"]) -> tuple[Float[Array, "B T M"], dict[str, Array]]:
        """Returns y, and the router's "aux_loss" (weighted, to be added to the loss), "balance_loss" and "load"."""
        c = self.config
        # The router works in float32: in bfloat16, near-ties flip and the softmax loses small gradients.
        route = Projection({"embed": x.shape[-1]}, {"router": c.num_experts}, self.std, jnp.float32, name="router")
        logits = route(x.astype(jnp.float32))
        routing = ROUTERS[c.router](logits, c.experts_per_token, c.renormalize)
        y = self._experts(x, routing)
        if c.shared_hidden:
            y = y + self._shared(x)
        load = expert_load(routing.experts, c.num_experts)
        balance = balance_loss(load, routing.probabilities)
        aux = c.balance_loss * balance + c.z_loss * router_z_loss(logits)
        return y, {"aux_loss": aux, "balance_loss": balance, "load": load}

    def _experts(self, x: Float[Array, "B T M"], routing: Routing) -> Float[Array, "B T M"]:
        """Every device sorts its own tokens and gathers all experts, each cut along its hidden width."""
        c, width = self.config, x.shape[-1]
        gate, up, down = (
            self._stack(name, axes, shape).astype(self.dtype)
            for name, axes, shape in (
                ("gate", ("embed", "mlp"), (width, c.hidden)),
                ("up", ("embed", "mlp"), (width, c.hidden)),
                ("down", ("mlp", "embed"), (c.hidden, width)),
            )
        )
        tokens = ("batch", "length", None)
        stacks = ("expert", "embed", "mlp"), ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
        local = functools.partial(sparse_experts, activation=c.activation)
        local = per_shard(local, (tokens, tokens, tokens, *stacks), tokens, ("expert", "embed"), summed="mlp")
        return local(x, routing.experts, routing.weights, gate, up, down)

    def _stack(self, name: str, axes: tuple[str, str], shape: tuple[int, int]) -> Array:
        init = nn.initializers.normal(self.std)
        return parameter(self, name, ("expert", *axes), (self.config.num_experts, *shape), init)

    def _shared(self, x: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
        mlp = GatedMLPConfig(hidden=self.config.shared_hidden, activation=self.config.activation)
        y, _ = GatedMLP(mlp, self.std, self.dtype, name="shared")(x)
        if not self.config.shared_gate:
            return y
        score = Projection({"embed": x.shape[-1]}, {"shared_gate": 1}, self.std, self.dtype, name="shared_gate")(x)
        return (y.astype(jnp.float32) * jax.nn.sigmoid(score.astype(jnp.float32))).astype(y.dtype)
