"""Sparse mixture of gated MLPs: route, sort rows by expert, three grouped matmuls, put the rows back."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.config import GatedMLPConfig, SparseMoEConfig
from gatedjax.layers.mlp import GatedMLP
from gatedjax.layers.moe import state as router_state
from gatedjax.layers.moe.exchange import Assigned, distributed_mixture
from gatedjax.layers.moe.experts import Stacks, constant_experts, mixture, weight_of
from gatedjax.layers.moe.routing import (
    ACTIVATIONS,
    Routing,
    capacities,
    count_places,
    limit_capacity,
    modified_input,
    route,
)
from gatedjax.layers.projection import Projection, parameter
from gatedjax.layers.token_info import TokenInfo
from gatedjax.sharding import manual_axes, per_shard


class SparseMoE(nn.Module):
    """Each token goes to its k experts; a shared expert may see every token, behind its own gate."""

    config: SparseMoEConfig
    std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T M"], info: TokenInfo | None = None, previous: Array | None = None
    ):
        """Returns y, `statistics` below, and the router's logits [B, T, E] (before the temperature).

        Args:
          info: its `tokens` are what selection "hash" goes by.
          previous: the logits of the sparse layer before, for the gating residual; None for none, as in the first.
        """
        c = self.config
        logits = self._logits(x, previous)
        state = RouterState(c, name=router_state.NAME)()
        routing = route(
            c.router,
            logits / state.get("temperature", c.router.temperature),
            c.experts_per_token,
            bias=state.get("bias"),
            importance=state.get("importance", 1.0),
            tokens=None if info is None else info.tokens,
            key=self.make_rng("router")
            if c.router.selection == "gumbel" and self.has_rng("router")
            else None,
        )
        chosen = count_places(routing.experts, c.total_experts)
        if c.capacity_factor:
            routing = limit_capacity(routing, capacities(c, x.shape[1]), c.capacity_order)
        y, lost = self._experts(x, routing)
        if c.total_experts > c.num_experts:
            y = y + self._free_experts(x, routing)
        if c.shared_hidden:
            y = y + self._shared(x)
        # Subtracted row by row: the sums over a large batch are beyond float32's integers.
        dropped = jnp.sum(chosen - count_places(routing.experts, c.total_experts)) + lost
        return y, statistics(logits, routing, chosen, dropped), logits

    def _logits(self, x: Float[Array, "B T M"], previous: Array | None) -> Float[Array, "B T E"]:
        """`activation(M(x) W + W_g previous) + b`. In bfloat16, near-ties would flip and small gradients be lost."""
        c, r = self.config, self.config.router
        experts = {"router": c.total_experts}
        project = Projection({"embed": x.shape[-1]}, experts, self.std, jnp.float32, name="router")
        h = project(modified_input(x, r.modified_input))
        if r.residual:
            carry = Projection(
                {"router_in": c.total_experts},
                experts,
                self.std,
                jnp.float32,
                name="router_residual",
            )
            h = h + carry(jnp.zeros_like(h) if previous is None else previous)
        h = ACTIVATIONS[r.activation](h)
        if not r.affine:
            return h
        return h + parameter(
            self, "router_bias", ["router"], [c.total_experts], nn.initializers.zeros
        )

    def _experts(
        self, x: Float[Array, "B T M"], routing: Routing
    ) -> tuple[Float[Array, "B T M"], Array]:
        """The experts that compute; and how many assignments the exchange between devices dropped."""
        c, width = self.config, x.shape[-1]
        if not c.num_experts:
            return jnp.zeros_like(x), jnp.float32(0.0)
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
        gathered = ("expert", "embed") if c.exchange == "gather_weights" else ("embed",)
        local = per_shard(
            functools.partial(_device_mixture, c),
            (tokens, tokens, tokens, *stacks),
            [tokens, ()],
            gathered,
            summed="mlp",
        )
        # Experts that cost nothing have ids from num_experts on: to these matmuls, all of them are empty places.
        experts = jnp.minimum(routing.experts, c.num_experts)
        return local(x.astype(self.dtype), experts, routing.weights, gate, up, down)

    def _stack(self, name: str, axes: tuple[str, str], shape: tuple[int, int]) -> Array:
        init = nn.initializers.normal(self.std)
        return parameter(self, name, ("expert", *axes), (self.config.num_experts, *shape), init)

    def _free_experts(self, x: Float[Array, "B T M"], routing: Routing) -> Float[Array, "B T M"]:
        """Zero, copy and constant experts: no row moves, and no device needs another's."""
        c, (experts, weights, _) = self.config, routing
        first = c.num_experts + c.zero_experts
        copies = jnp.sum(weight_of(experts, weights, first, c.copy_experts), axis=-1, keepdims=True)
        y = copies * x.astype(jnp.float32)
        if c.constant_experts:
            n, width = c.constant_experts, x.shape[-1]
            init = nn.initializers.normal(self.std)
            mixer = parameter(
                self, "constant_mixer", ["embed", "router", None], [width, n, 2], init
            )
            vectors = parameter(self, "constant", ["router", "embed_act"], [n, width], init)
            y = y + constant_experts(
                x, weight_of(experts, weights, first + c.copy_experts, n), mixer, vectors
            )
        return y.astype(x.dtype)

    def _shared(self, x: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
        mlp = GatedMLPConfig(hidden=self.config.shared_hidden, activation=self.config.activation)
        y, *_ = GatedMLP(mlp, self.std, self.dtype, name="shared")(x)
        if not self.config.shared_gate:
            return y
        score = Projection(
            {"embed": x.shape[-1]}, {"shared_gate": 1}, self.std, self.dtype, name="shared_gate"
        )(x)
        return (y.astype(jnp.float32) * jax.nn.sigmoid(score.astype(jnp.float32))).astype(y.dtype)


class RouterState(nn.Module):
    """The state of one layer's router, by name; nothing that the configuration does not use.

    bias [E], integral [E], error [E]: of the bias rule; the last two of "pid" only
    temperature []: of the logits
    importance []: of the layer, for skipping (MoDES calibrates it; 1 until then)
    """

    config: SparseMoEConfig

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        r, experts = self.config.router, self.config.total_experts
        names = {"none": (), "sign": ("bias",), "pid": ("bias", "integral", "error")}[r.bias_rule]
        state = {
            name: parameter(self, name, ["router"], [experts], nn.initializers.zeros)
            for name in names
        }
        if r.anneal_steps:
            state["temperature"] = parameter(
                self, "temperature", [], [], nn.initializers.constant(r.temperature)
            )
        if r.threshold:
            state["importance"] = parameter(self, "importance", [], [], nn.initializers.ones)
        return state


def _device_mixture(
    c: SparseMoEConfig, x, experts, weights, gate, up, down
) -> tuple[Float[Array, "B T M"], Array]:
    """One device's tokens through all experts; the second result counts what the exchange dropped, on all devices."""
    rows = lambda a: a.reshape(-1, a.shape[-1])
    stacks = Stacks(gate, up, down, c.activation, c.router.weight_input)
    assigned = Assigned(rows(x), rows(experts), rows(weights))
    lost = jnp.float32(0.0)
    if manual_axes("expert") and c.exchange != "gather_weights":
        (axis,) = manual_axes("expert")
        y, lost = distributed_mixture(assigned, stacks, axis, c.exchange, c.exchange_factor)
    else:
        y = mixture(*assigned, stacks)
    return y.reshape(x.shape).astype(x.dtype), lost


def statistics(
    logits: Array, routing: Routing, chosen: Float[Array, "B E"], dropped: Array
) -> dict[str, Array]:
    """What the losses, the bias rules and the log need of a layer, over the whole batch, float32.

    Under jit on a mesh every sum goes over all devices, so no device has statistics of its own.

      counts         [E]  assignments that the router made
      probability    [E]  mean share of the scores; differentiable
      sequence_loss  []   mean over rows of `E sum_i f_i P_i` within the row
      z_loss         []   mean of logsumexp(logits)^2
      entropy        []   mean entropy of a token's shares, nats
      dropped        []   assignments that capacity or exchange dropped
    """
    p, num_experts = routing.probabilities, chosen.shape[-1]
    by_row = jnp.mean(p, axis=1)
    load = jax.lax.stop_gradient(chosen / jnp.maximum(jnp.sum(chosen, axis=-1, keepdims=True), 1.0))
    return {
        "counts": jnp.sum(chosen, axis=0),
        "probability": jnp.mean(by_row, axis=0),
        "sequence_loss": num_experts * jnp.mean(jnp.sum(load * by_row, axis=-1)),
        "z_loss": jnp.mean(jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1) ** 2),
        "entropy": -jnp.mean(jnp.sum(p * jnp.log(jnp.maximum(p, 1e-30)), axis=-1)),
        "dropped": dropped,
    }
