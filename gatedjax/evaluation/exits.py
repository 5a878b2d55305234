"""Early exits: predictions of layers before the last, and who decides that one of them will do.

An exit is a norm of its own on the residual stream after a layer, and the model's output matrix.
They are learned in `exit_learning.py`. Three ways decide:

- thresholds on the probability of the likeliest token, calibrated (cascaded inference,
  Berestizshevsky and Even, 2018);
- gates on four numbers of the prediction, learned together with the exits (JEI-DNN, arXiv
  2310.09163);
- a gate on the residual stream after the first exit's layer, which chooses the depth at once
  (ECO-M2F, arXiv 2404.15244).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int

from gatedjax.config import ModelConfig
from gatedjax.errors import require
from gatedjax.layers.block import block_layers
from gatedjax.layers.norm import rms_norm
from gatedjax.model import logits

# Numbers of a prediction that a gate looks at.
FEATURES = 4


@struct.dataclass
class Exits:
    """Parameters of the exits, by exit.

    scale: of the norm in front of the output matrix.
    gate_weights, gate_bias: of the gate on what the exit predicts.
    """

    scale: Float[Array, "E M"]
    gate_weights: Float[Array, "E 4"]
    gate_bias: Float[Array, " E"]


@struct.dataclass
class DepthGate:
    """A linear gate that chooses where a token leaves; the last choice is the end."""

    weights: Float[Array, "M E+1"]
    bias: Float[Array, " E+1"]


def fresh_depth_gate(width: int, exits: int) -> DepthGate:
    """Before its training: all depths alike."""
    return DepthGate(jnp.zeros((width, exits + 1)), jnp.zeros(exits + 1))


def depth_logits(
    gate: DepthGate,
    residual: Float[Array, "... M"],
    eps: float,
) -> Float[Array, "... E+1"]:
    """Of leaving at each exit, and at the end, float32.

    Args:
      gate: the parameters.
      residual: the stream after the first exit's layer.
      eps: of the norm in front of the gate, which has no scale of its own.
    """
    scale = jnp.ones(residual.shape[-1])
    normed = rms_norm(residual.astype(jnp.float32), scale, eps)
    return normed @ gate.weights + gate.bias


def layers_of(values: list[str], model: ModelConfig) -> tuple[int, ...]:
    """The layers after which there is an exit, in order.

    Raises:
      InputError: not numbers of layers before the last.
    """
    most = model.num_layers - 1
    require(most > 0, "--checkpoint", "a model of one layer", "at least two layers")
    if not values:
        return tuple(range(1, model.num_layers))
    given = tuple(int(value) if value.isdecimal() else 0 for value in values)
    is_good = all(1 <= n <= most for n in given) and list(given) == sorted(set(given))
    require(is_good, "--layers", ",".join(values), f"rising numbers from 1 to {most}")
    return given


def fresh_exits(count: int, final_scale: Float[Array, " M"]) -> Exits:
    """Exits before their training: the norm of the last layer, gates at one half."""
    return Exits(
        scale=jnp.tile(final_scale, (count, 1)),
        gate_weights=jnp.zeros((count, FEATURES)),
        gate_bias=jnp.zeros(count),
    )


def exit_logits(
    residual: Float[Array, "... M"],
    scale: Float[Array, " M"],
    weights: Float[Array, "X M"],
    eps: float,
) -> Float[Array, "... X"]:
    """What an exit predicts, float32.

    Args:
      residual: the residual stream after its layer.
      scale: of its norm.
      weights: the model's output matrix.
      eps: of the norm.
    """
    return logits(rms_norm(residual, scale, eps), weights)


def features(predicted: Float[Array, "... X"]) -> Float[Array, "... 4"]:
    """JEI-DNN's numbers of a prediction p: its maximum, its entropy, the margin between its two
    largest, and the entropy of p^2 over its sum.
    """
    log_p = jax.nn.log_softmax(predicted.astype(jnp.float32))
    largest, _ = jax.lax.top_k(jnp.exp(log_p), 2)
    log_squared = jax.nn.log_softmax(2.0 * log_p)
    numbers = (
        largest[..., 0],
        _entropy(log_p),
        largest[..., 0] - largest[..., 1],
        _entropy(log_squared),
    )
    return jnp.stack(numbers, axis=-1)


def _entropy(log_p: Float[Array, "... X"]) -> Float[Array, "..."]:
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def gate_values(exits: Exits, index: int, numbers: Float[Array, "... 4"]) -> Float[Array, "..."]:
    """How much an exit's gate says that this will do, between 0 and 1."""
    return jax.nn.sigmoid(numbers @ exits.gate_weights[index] + exits.gate_bias[index])


def exit_probabilities(gates: Float[Array, "... E"]) -> Float[Array, "... E+1"]:
    """Of leaving at each exit, and at the end: P_l = max(0, min(g_l, 1 - sum of those before)).

    (arXiv 2310.09163, section 4.) They sum to 1.
    """
    left = jnp.ones(gates.shape[:-1], gates.dtype)
    probabilities = []
    for index in range(gates.shape[-1]):
        here = jnp.maximum(0.0, jnp.minimum(gates[..., index], left))
        probabilities.append(here)
        left = left - here
    return jnp.stack([*probabilities, left], axis=-1)


def cheapest(
    losses: Float[Array, "... E+1"],
    costs: Float[Array, " E+1"],
    weight: float,
) -> Int[Array, "..."]:
    """The exit with the least `loss + weight x cost`: what gates are taught."""
    return jnp.argmin(losses + weight * costs, axis=-1)


def gate_loss(gates: Float[Array, "... E"], best: Int[Array, "..."]) -> Float[Array, "..."]:
    """Cross-entropy of each gate that is reached with whether its exit is the best one.

    An exit before the best one should not be taken, the best one should; those after it are not
    reached.
    """
    index = jnp.arange(gates.shape[-1])
    is_reached = index <= best[..., None]
    is_best = index == best[..., None]
    gates = jnp.clip(gates, 1e-6, 1.0 - 1e-6)
    by_gate = -jnp.where(is_best, jnp.log(gates), jnp.log1p(-gates))
    return jnp.sum(jnp.where(is_reached, by_gate, 0.0), axis=-1)


# --- calibration


def calibrated(
    confidence: Float[np.ndarray, "N E"],
    is_right: Bool[np.ndarray, "N E"],
    epsilon: float,
) -> Float[np.ndarray, " E"]:
    """For each exit the least threshold that costs no more than `epsilon` of its best accuracy.

    With gamma(d) the accuracy where the confidence is at least d, it is the least d with gamma(d)
    >= max gamma - epsilon. (Cascaded inference based on softmax confidence.)

    Args:
      confidence: of each exit, for tokens that were not trained on.
      is_right: whether the likeliest token was the next one.
      epsilon: what accuracy may be lost.

    Raises:
      InputError: no tokens.
    """
    require(len(confidence) > 0, "calibration", "no tokens", "some")
    thresholds = []
    for own, right in zip(confidence.T, is_right.T):
        order = np.argsort(-own, kind="stable")
        own, right = own[order], right[order]
        accuracy = np.cumsum(right) / np.arange(1, len(own) + 1)
        # Tokens of the same confidence are taken together.
        is_last = np.append(own[:-1] != own[1:], True)
        accuracy, own = accuracy[is_last], own[is_last]
        thresholds.append(own[accuracy >= accuracy.max() - epsilon].min())
    return np.asarray(thresholds)


def chosen_exit(
    values: Float[np.ndarray, "N E"],
    thresholds: Float[np.ndarray, " E"],
) -> Int[np.ndarray, " N"]:
    """The first exit whose value reaches its threshold; E, the end, where none does."""
    reaches = values >= thresholds
    return np.where(reaches.any(axis=1), reaches.argmax(axis=1), values.shape[1])


def require_selecting(chosen: Int[np.ndarray, " N"], count: int, key: str) -> None:
    """InputError if thresholds let no token leave before the end.

    Args:
      chosen: the exit of each token.
      count: how many exits there are before the end.
      key: what the thresholds come from, for the message.
    """
    early = int(np.sum(chosen < count))
    require(early > 0, key, "thresholds that no token reaches", "lower ones")


# --- what it costs


def layer_flops(config: ModelConfig, seq_len: int) -> Float[np.ndarray, " L"]:
    """FLOPs of a token in each layer, forward."""
    flops = np.zeros(config.num_layers)
    for block in config.blocks:
        of_block = 0.0
        for layer in block_layers(config, block):
            of_block += layer.forward_flops_per_token(config.width, seq_len)
        flops[list(block.layers)] = of_block
    return flops


def exit_costs(config: ModelConfig, seq_len: int, layers: tuple[int, ...]) -> np.ndarray:
    """FLOPs of a token that leaves at each exit, and at the end.

    Layers up to there, and the predictions of all exits on the way.

    Args:
      config: of the model.
      seq_len: of the rows.
      layers: after how many layers each exit is.
    """
    so_far = np.cumsum(layer_flops(config, seq_len))
    prediction = 2.0 * config.width * config.vocab_size
    places = [*layers, config.num_layers]
    return np.asarray([so_far[n - 1] + (i + 1) * prediction for i, n in enumerate(places)])


def depth_costs(config: ModelConfig, seq_len: int, layers: tuple[int, ...]) -> np.ndarray:
    """FLOPs of a token whose depth is chosen by a gate: its layers, the gate, one prediction.

    Args:
      config: of the model.
      seq_len: of the rows.
      layers: after how many layers each exit is.
    """
    so_far = np.cumsum(layer_flops(config, seq_len))
    prediction = 2.0 * config.width * config.vocab_size
    gate = 2.0 * config.width * (len(layers) + 1)
    return np.asarray([so_far[n - 1] + prediction + gate for n in (*layers, config.num_layers)])


class Outcome(NamedTuple):
    """What leaving early gave on some tokens.

    loss: nats per token. accuracy: of the likeliest token. flops: of a token, forward.
    fractions: of tokens by exit, the end last.
    """

    loss: float
    accuracy: float
    flops: float
    fractions: tuple[float, ...]


def outcome(
    chosen: Int[np.ndarray, " N"],
    losses: Float[np.ndarray, "N E+1"],
    is_right: Bool[np.ndarray, "N E+1"],
    costs: Float[np.ndarray, " E+1"],
) -> Outcome:
    """The means over tokens, each at its own exit.

    Args:
      chosen: the exit of each token.
      losses: of each token at each exit.
      is_right: whether its likeliest token was the next one.
      costs: of each exit.
    """
    rows = np.arange(len(chosen))
    counts = np.bincount(chosen, minlength=len(costs))
    return Outcome(
        loss=float(losses[rows, chosen].mean()),
        accuracy=float(is_right[rows, chosen].mean()),
        flops=float(costs[chosen].mean()),
        fractions=tuple(float(x) for x in counts / len(chosen)),
    )
