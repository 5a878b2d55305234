"""Sparse mixture of MLPs.

Route, sort rows by expert, three grouped matmuls (two without a gate), put the rows back.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from gatedjax.config import GatedMLPConfig, MLPConfig, SparseMoEConfig
from gatedjax.layers.base import FeedForward
from gatedjax.layers.documents import Documents, documents_of, without_padding
from gatedjax.layers.gate_values import record
from gatedjax.layers.mlp import MLP, GatedMLP
from gatedjax.layers.moe import state as router_state
from gatedjax.layers.moe.capacity import capacity_of_places, limit_capacity
from gatedjax.layers.moe.exchange import device_mixture
from gatedjax.layers.moe.experts import constant_experts, output_bias, weight_of
from gatedjax.layers.moe.noisy import importance_loss, load_loss, with_noise
from gatedjax.layers.moe.routing import ACTIVATIONS, Routing, count_places, modified_input, route
from gatedjax.layers.moe.selection import across_tokens
from gatedjax.layers.moe.statistics import router_statistics
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection
from gatedjax.layers.token_info import TokenInfo
from gatedjax.per_shard import per_shard


class SparseMoE(FeedForward):
    """Each token goes to its k experts. Padding goes to none, and its output is 0.

    A shared expert may see every token, behind its own gate.
    """

    config: SparseMoEConfig

    @nn.compact
    def with_statistics(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo | None = None,
        router_logits: Float[Array, "B T E"] | None = None,
    ) -> tuple[Array, dict[str, Array], Array]:
        """y, the statistics of `statistics.py`, and the router's logits (before the temperature).

        Args:
          x: the tokens.
          info: its `segment_ids` say what is padding and what is a document, its `tokens` are what
            selection "hash" goes by.
          router_logits: of the sparse layer before, for the gating residual; None in the first.
        """
        c = self.config
        documents = documents_of(info)
        mask = None if documents is None else documents.is_token
        x = without_padding(x, mask)
        if router_logits is not None:
            router_logits = without_padding(router_logits, mask)
        logits = self._logits(x, router_logits)
        state = router_state.RouterState(c, name=router_state.NAME)()
        noisy = self._noisy(logits)
        routing = self._routing(noisy, state, info, documents)
        # Counted before any limit: the losses are about what the router wanted.
        chosen = count_places(routing.experts, c.total_experts)
        if c.capacity_factor and self.training:
            routing = limit_capacity(
                routing,
                capacity_of_places(c, routing.experts, documents),
                c.capacity_order,
                documents=documents,
                priority=self._priority(noisy, routing),
            )
        record(self, "router_logits", logits)
        record(self, "router_probs", routing.router_probs)
        record(self, "experts", routing.experts)
        record(self, "expert_weights", routing.weights)
        y, lost = self._experts(x, routing)
        if c.total_experts > c.num_experts:
            y = y + self._free_experts(x, routing)
        if c.shared_hidden:
            y = y + without_padding(self._shared_expert(x), mask if c.bias else None)
        # Subtracted row by row: the sums over a large batch are beyond float32's integers.
        dropped = jnp.sum(chosen - count_places(routing.experts, c.total_experts)) + lost
        statistics = router_statistics(logits, routing, chosen, dropped, mask)
        return y, statistics | self._noisy_losses(logits, noisy, mask), logits

    def _noisy(self, logits: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """What chooses in training: logits with noise. In evaluation the logits."""
        noise = self.config.router.noise
        if not noise or not self.has_rng("router"):
            return logits
        return with_noise(self.make_rng("router"), logits, noise)

    def _noisy_losses(
        self,
        logits: Float[Array, "B T E"],
        noisy: Float[Array, "B T E"],
        is_token: Bool[Array, "B T"] | None,
    ) -> dict[str, Float[Array, ""]]:
        """V-MoE's losses, those that have a weight.

        Args:
          logits: of the router.
          noisy: with noise.
          is_token: False for padding; None where there is none.
        """
        c = self.config
        if is_token is None:
            is_token = jnp.ones(logits.shape[:2], bool)
        losses = {}
        if c.importance_loss:
            losses["importance_loss"] = importance_loss(logits, is_token)
        if c.load_loss:
            losses["load_loss"] = load_loss(
                logits,
                noisy,
                c.experts_per_token,
                c.router.noise,
                is_token,
            )
        return losses

    def _logits(
        self,
        x: Float[Array, "B T M"],
        previous: Float[Array, "B T E"] | None,
    ) -> Float[Array, "B T E"]:
        """`activation(M(x) W + W_g previous) + b`.

        In bfloat16, near-ties would flip and small gradients be lost.
        """
        c = self.config
        router = c.router
        width = {"embed": x.shape[-1]}
        experts = {"router": c.total_experts}
        project = Projection(
            width,
            experts,
            self.init_std,
            jnp.float32,
            name="router",
        )
        h = project(modified_input(x, router.modified_input))
        if router.residual:
            carry = Projection(
                {"router_in": c.total_experts},
                experts,
                self.init_std,
                jnp.float32,
                name="router_residual",
            )
            h = h + carry(jnp.zeros_like(h) if previous is None else previous)
        h = ACTIVATIONS[router.activation](h)
        if not router.affine:
            return h
        bias = parameter(
            self,
            "router_bias",
            axes=["router"],
            shape=[c.total_experts],
            init=nn.initializers.zeros,
        )
        return h + bias

    def _routing(
        self,
        logits: Float[Array, "B T E"],
        state: dict[str, Array],
        info: TokenInfo | None,
        documents: Documents | None,
    ) -> Routing:
        router = self.config.router
        # Without a random stream (evaluation) the choice is the most likely one.
        key = None
        if router.selection == "gumbel" and self.has_rng("router"):
            key = self.make_rng("router")
        temperature = state.get("temperature", router.temperature)
        return route(
            router,
            logits / temperature,
            self.config.experts_per_token,
            temperature=temperature,
            bias=state.get("bias"),
            importance=state.get("importance", 1.0),
            tokens=None if info is None else info.tokens,
            key=key,
            documents=documents,
        )

    def _priority(
        self,
        logits: Float[Array, "B T E"],
        routing: Routing,
    ) -> Float[Array, "B T"] | None:
        """Which tokens come first where experts have a capacity: those most sure of their best."""
        c = self.config
        if c.capacity_order != "priority":
            return None
        ordered_by = across_tokens(c.router.scoring, logits)
        of_places = jnp.take_along_axis(
            ordered_by,
            jnp.minimum(routing.experts, c.total_experts - 1),
            axis=-1,
        )
        is_filled = routing.experts < c.total_experts
        return jnp.max(jnp.where(is_filled, of_places, -jnp.inf), axis=-1)

    def _experts(
        self,
        x: Float[Array, "B T M"],
        routing: Routing,
    ) -> tuple[Float[Array, "B T M"], Float[Array, ""]]:
        """The output of the experts that compute, and the assignments that the exchange dropped."""
        c = self.config
        if not c.num_experts:
            return jnp.zeros_like(x), jnp.float32(0.0)
        width = {"embed": x.shape[-1]}
        latent = {"rank": c.latent}
        x = x.astype(self.dtype)
        if c.latent:
            x = Projection(width, latent, self.init_std, self.dtype, name="latent_down")(x)
        y, lost = self._mixed(x, routing)
        if c.latent:
            y = Projection(latent, width, self.init_std, self.dtype, name="latent_up")(y)
        return y, lost

    def _mixed(
        self,
        x: Float[Array, "B T M"],
        routing: Routing,
    ) -> tuple[Float[Array, "B T M"], Float[Array, ""]]:
        """As `_experts`, in the channels that the experts work on."""
        c = self.config
        width = x.shape[-1]
        gate = None
        if c.gated:
            gate = self._stack("gate", ("embed", "mlp"), (width, c.hidden))
        up = self._stack("up", ("embed", "mlp"), (width, c.hidden))
        down = self._stack("down", ("mlp", "embed"), (c.hidden, width))
        gate_bias = None
        up_bias = None
        if c.bias and c.gated:
            gate_bias = self._stack("gate_bias", ("mlp_bias",), (c.hidden,), nn.initializers.zeros)
        if c.bias:
            up_bias = self._stack("up_bias", ("mlp_bias",), (c.hidden,), nn.initializers.zeros)
        tokens = ("batch", "length", None)
        into_experts = ("expert", "embed", "mlp")
        out_of_experts = ("expert", "mlp", "embed")
        of_hidden = ("expert", "mlp")
        # Every device sorts its own tokens by expert; a global sort would move all of them.
        on_device = per_shard(
            functools.partial(device_mixture, c),
            in_axes=(
                tokens,  # x
                tokens,  # experts
                tokens,  # weights
                into_experts,  # gate
                into_experts,  # up
                out_of_experts,  # down
                of_hidden,  # gate_bias
                of_hidden,  # up_bias
            ),
            out_axes=[tokens, ()],
            gathered=("expert", "embed") if c.exchange == "gather_weights" else ("embed",),
            summed="mlp",
        )
        # Experts that cost nothing have ids from num_experts on: to these matmuls, all of them are
        # empty places.
        experts = jnp.minimum(routing.experts, c.num_experts)
        y, lost = on_device(
            x,
            experts,
            routing.weights,
            gate,
            up,
            down,
            gate_bias,
            up_bias,
        )
        if c.bias:
            bias = self._stack("down_bias", ("embed_act",), (width,), nn.initializers.zeros)
            weights = routing.weights
            if c.router.weight_input:
                # What comes out is not weighted.
                weights = jnp.ones_like(weights)
            y = (y.astype(jnp.float32) + output_bias(experts, weights, bias)).astype(y.dtype)
        return y, lost

    def _stack(
        self,
        name: str,
        axes: tuple[str, ...],
        shape: tuple[int, ...],
        init: Callable[..., Array] | None = None,
    ) -> Array:
        """A matrix or bias of every expert, in the dtype of the activations."""
        stack = parameter(
            self,
            name,
            axes=["expert", *axes],
            shape=[self.config.num_experts, *shape],
            init=init or nn.initializers.normal(self.init_std),
        )
        return stack.astype(self.dtype)

    def _free_experts(
        self,
        x: Float[Array, "B T M"],
        routing: Routing,
    ) -> Float[Array, "B T M"]:
        """Zero, copy and constant experts: no row moves, and no device needs another's."""
        c = self.config
        # Ids count experts that compute, then zero, copy and constant ones.
        first_copy = c.num_experts + c.zero_experts
        first_constant = first_copy + c.copy_experts
        copied = weight_of(routing.experts, routing.weights, first_copy, c.copy_experts)
        # The zero experts add nothing, so they are not here at all.
        y = jnp.sum(copied, axis=-1, keepdims=True) * x.astype(jnp.float32)
        if c.constant_experts:
            width = x.shape[-1]
            init = nn.initializers.normal(self.init_std)
            mixer = parameter(
                self,
                "constant_mixer",
                axes=["embed", "constant_expert", None],
                shape=[width, c.constant_experts, 2],
                init=init,
            )
            vectors = parameter(
                self,
                "constant",
                axes=["router", "embed_act"],
                shape=[c.constant_experts, width],
                init=init,
            )
            weights = weight_of(
                routing.experts,
                routing.weights,
                first_constant,
                c.constant_experts,
            )
            y = y + constant_experts(
                x,
                weights,
                mixer,
                vectors,
            )
        return y.astype(x.dtype)

    def _shared_expert(self, x: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
        """An MLP that every token goes through, times `sigmoid(x w)` if it has a gate."""
        c = self.config
        if c.gated:
            assert c.activation != "relu_squared"
            gated_mlp = GatedMLPConfig(
                hidden=c.shared_hidden,
                activation=c.activation,
                swiglu_limit=c.swiglu_limit,
                bias=c.bias,
            )
            y = GatedMLP(gated_mlp, self.init_std, self.dtype, name="shared")(x)
        else:
            assert c.activation != "clamped_swiglu"
            mlp = MLPConfig(hidden=c.shared_hidden, activation=c.activation, bias=c.bias)
            y = MLP(mlp, self.init_std, self.dtype, name="shared")(x)
        if not c.shared_gate:
            return y
        width = {"embed": x.shape[-1]}
        one = {"shared_gate": 1}
        gate_logits = Projection(
            width,
            one,
            self.init_std,
            self.dtype,
            name="shared_gate",
        )(x)
        gates = jax.nn.sigmoid(gate_logits.astype(jnp.float32))
        return (y.astype(jnp.float32) * gates).astype(y.dtype)

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        c = self.config
        # At balance, where experts that compute get their fraction of the assignments.
        computing = c.router.ffn_fraction or c.num_experts / c.total_experts
        matrices = 3 if c.gated else 2
        hidden = c.experts_per_token * computing * c.hidden
        of_experts = 2 * matrices * (c.latent or width) * hidden
        of_latent = 4 * width * c.latent
        # The shared expert sees every token.
        of_shared = 2 * matrices * width * c.shared_hidden
        return of_experts + of_latent + of_shared + 2 * width * c.total_experts
