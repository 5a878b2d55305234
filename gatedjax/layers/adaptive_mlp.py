"""Adaptive computation modules (arXiv 2312.10193): of an MLP a token has as much as it needs.

The MLP is cut along its hidden channels into learners f_1 ... f_N. A gate of three linear layers
chooses a number k of them for every token, and the output is

    y = h_k = f_1(x) + ... + f_k(x)

In training the choice is a hard Gumbel softmax: the gradient is that of a soft one. Without noise
(evaluation) it is the likeliest number. Whole rows go through all learners, and those that a token
does not have are multiplied by 0; a single token (decoding a row) runs its own and no others.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.config import AdaptiveMLPConfig
from gatedjax.layers.activations import ACTIVATIONS, gated_product
from gatedjax.layers.added_losses import ADDED_LOSSES
from gatedjax.layers.base import FeedForward
from gatedjax.layers.documents import is_token, without_padding
from gatedjax.layers.gate_values import record
from gatedjax.layers.learner_losses import CHOICES
from gatedjax.layers.projection import Projection, Weights, contract
from gatedjax.layers.stochastic_gate import hard_choice, straight_through
from gatedjax.layers.token_info import TokenInfo


def parts_used(choice: Float[Array, "... K"], least: int) -> Float[Array, "... N"]:
    """1 for every learner that a token has, from the one-hot choice of how many.

    With y = sum_k choice_k h_k, learner i counts sum_{k >= i} choice_k times.

    Args:
      choice: of least, least + 1 ... N learners.
      least: the smallest number.
    """
    at_least = jnp.flip(jnp.cumsum(jnp.flip(choice, -1), axis=-1), -1)
    # Learners that every token has.
    always = jnp.ones((*choice.shape[:-1], least), choice.dtype)
    return jnp.concatenate([always, at_least[..., 1:]], axis=-1)


class LearnerGate(nn.Module):
    """Logits of the number of learners: three linear layers with biases, float32."""

    config: AdaptiveMLPConfig
    init_std: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T M"]) -> Float[Array, "B T K"]:
        c = self.config
        sizes = [
            ({"embed": x.shape[-1]}, {"gates": c.gate_hidden}),
            ({"rank": c.gate_hidden}, {"gates": c.gate_hidden}),
            ({"rank": c.gate_hidden}, {"router": c.choices}),
        ]
        h = x.astype(jnp.float32)
        for number, (inputs, outputs) in enumerate(sizes):
            std = max(self.init_std, math.prod(inputs.values()) ** -0.5)
            h = Projection(
                inputs,
                outputs,
                std,
                jnp.float32,
                has_bias=True,
                name=f"layer_{number}",
            )(h)
        return h


class AdaptiveMLP(FeedForward):
    """An MLP in learners, with the gate that chooses how many a token has."""

    config: AdaptiveMLPConfig

    @nn.compact
    def with_statistics(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo | None = None,
        router_logits: Float[Array, "B T E"] | None = None,
    ) -> tuple[Array, dict[str, Array], Array | None]:
        c = self.config
        mask = is_token(info)
        x = without_padding(x, mask)
        logits = LearnerGate(c, self.init_std, name="learner_gate")(x)
        key = self.make_rng("router") if self.has_rng("router") else None
        choice = hard_choice(key, logits, c.temperature)
        used = parts_used(choice, c.least)
        record(self, "learner_logits", logits)
        record(self, "learners", jnp.sum(used, axis=-1))
        if not self.is_initializing():
            # For `learner_losses`; padding chooses nothing.
            self.sow(ADDED_LOSSES, CHOICES, without_padding(choice, mask))
        width = {"embed": x.shape[-1]}
        hidden = {"mlp": c.hidden}
        names = ("gate", "up") if c.gated else ("up",)
        into = [self._weights(width, hidden, name) for name in names]
        down = self._weights(hidden, width, "down")
        x = x.astype(self.dtype)
        if not self.training and x.shape[:2] == (1, 1):
            y = _needed(c, x, used, into, down)
        else:
            h = _hidden(c, [contract(x, matrix, 1) for matrix in into])
            h = h * jnp.repeat(used, c.hidden // c.learners, axis=-1).astype(h.dtype)
            h = nn.with_logical_constraint(h, ("batch", "length", "mlp"))
            y = contract(h, down, 1)
        return y, {}, router_logits

    def _weights(self, inputs: dict[str, int], outputs: dict[str, int], name: str) -> Array:
        return Weights(inputs, outputs, self.init_std, self.dtype, name=name)()

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        """Of all learners, as in training, and of the gate."""
        return self.flops_with(width, self.config.learners)

    @nn.nowrap
    def flops_with(self, width: int, learners: float) -> float:
        """FLOPs of a token that has this many learners, the gate's among them.

        Args:
          width: M.
          learners: how many, or their mean over tokens.
        """
        c = self.config
        matrices = 3 if c.gated else 2
        of_learner = 2 * matrices * width * c.hidden / c.learners
        gate = width * c.gate_hidden + c.gate_hidden**2 + c.gate_hidden * c.choices
        return learners * of_learner + 2 * gate


def _hidden(c: AdaptiveMLPConfig, inputs: Sequence[Array]) -> Array:
    """What `down` is multiplied with: (gate logits and) up -> hidden channels."""
    if c.gated:
        return gated_product(inputs[0], inputs[1], c.activation)
    (up,) = inputs
    if c.activation == "identity":
        return up
    return ACTIVATIONS[c.activation](up.astype(jnp.float32)).astype(up.dtype)


def _needed(
    c: AdaptiveMLPConfig,
    x: Float[Array, "1 1 M"],
    used: Float[Array, "1 1 N"],
    into: Sequence[Float[Array, "M F"]],
    down: Float[Array, "F M"],
) -> Float[Array, "1 1 M"]:
    """The learners that one token has, one after the other; the others do not run.

    Args:
      c: the layer.
      x: the token.
      used: 1 for each of its learners.
      into: the matrices in front of the hidden channels.
      down: the one behind them.
    """
    size = c.hidden // c.learners
    y = jnp.zeros_like(x)
    for number in range(c.learners):
        part = slice(number * size, (number + 1) * size)

        def with_learner(y: Array, part: slice = part) -> Array:
            h = _hidden(c, [contract(x, matrix[:, part], 1) for matrix in into])
            return y + contract(h, down[part], 1)

        def without(y: Array) -> Array:
            return y

        y = jax.lax.cond(used[0, 0, number] > 0, with_learner, without, y)
    return y


def prefix_outputs(
    params: dict,
    c: AdaptiveMLPConfig,
    x: Float[Array, "... M"],
    *,
    detached: bool = False,
) -> Float[Array, "... N+1 M"]:
    """h_0 ... h_N, the outputs with 0, 1 ... N learners, float32.

    Args:
      params: of the layer.
      c: its configuration.
      x: its input.
      detached: h_k has a gradient by learner k alone, those before it are as they are.
    """
    names = ("gate", "up") if c.gated else ("up",)
    h = _hidden(c, [x @ params[name]["kernel"] for name in names])
    size = c.hidden // c.learners
    h = h.reshape(*h.shape[:-1], c.learners, size)
    down = params["down"]["kernel"].reshape(c.learners, size, -1)
    outputs = jnp.einsum("...nf,nfm->...nm", h, down)
    zero = jnp.zeros_like(outputs[..., :1, :])
    outputs = jnp.concatenate([zero, outputs], axis=-2)
    sums = jnp.cumsum(outputs, axis=-2)
    return straight_through(jax.lax.stop_gradient(sums), outputs) if detached else sums
