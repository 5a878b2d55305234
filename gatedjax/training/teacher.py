"""A frozen second model that a run learns from: `train.teacher`.

It is an input of the step beside the state: on the same mesh, cut as its own run would cut it. It
has no optimizer state, no gradient, no place in checkpoints, and its memory is not taken over.

Two terms are added to the loss. The divergence of the predictions goes through the whole model. The
distance of activations is layer by layer: each mixer gets the input that the teacher's mixer of
that layer gets, so that no layer has to make up for those before it, and no gradient leaves it.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Float, PyTree

from gatedjax.config import BlockConfig, Config, ModelConfig
from gatedjax.data import Batch
from gatedjax.layers import TokenInfo
from gatedjax.layers.block import block_layers
from gatedjax.layers.gate_values import COLLECTION
from gatedjax.layers.token_info import arranged
from gatedjax.model import LanguageModel, head_weights, logits
from gatedjax.training.output_matrix import gathered
from gatedjax.training.token_chunks import chunks, positions_of_chunk


@struct.dataclass
class Teacher:
    """A model that does not change.

    params: with the state of its routers.
    model: its configuration.
    """

    params: PyTree
    model: ModelConfig = struct.field(pytree_node=False)


def compared_layers(model: ModelConfig, teacher: ModelConfig) -> list[int]:
    """The layers whose activations are compared: those whose mixers differ, or all if none does."""
    layers = list(range(model.num_layers))
    differing = [i for i in layers if model.layer(i)[0] != teacher.layer(i)[0]]
    return differing or layers


# --- the terms of the loss


def teacher_loss(
    config: Config,
    teacher: Teacher,
    params: Mapping[str, Any],
    hidden: Float[Array, "B T M"],
    batch: Batch,
    tokens: Float[Array, ""],
    chunk: int,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """What the teacher adds to the loss of a micro-batch, and its parts for the log.

    Both are parts of the whole batch's: those of micro-batches add up.

    Args:
      config: of the run.
      teacher: it learns from.
      params: of the model, with the state of its routers.
      hidden: the model's last hidden states.
      batch: the micro-batch.
      tokens: the weights of all tokens in the whole batch.
      chunk: tokens whose logits exist at once; 0 for all of them.
    """
    settings = config.train.teacher
    of_teacher, recorded = observed(teacher, batch, with_activations=settings.mse > 0)
    mask = jnp.asarray(batch.loss_mask, jnp.float32)
    total = jnp.float32(0.0)
    metrics = {}
    if settings.kl:
        sums = divergence(
            hidden,
            gathered(head_weights(params), hidden),
            of_teacher,
            gathered(jax.lax.stop_gradient(head_weights(teacher.params)), of_teacher),
            mask,
            settings.temperature,
            chunk,
        )
        metrics["teacher_kl"] = sums / tokens
        total = total + settings.kl * metrics["teacher_kl"]
    if settings.mse:
        info = arranged(
            jnp.asarray(batch.tokens),
            jnp.asarray(batch.positions),
            jnp.asarray(batch.segment_ids),
        ).info
        sums = distance_of_layers(
            config.model,
            teacher.model,
            params,
            recorded,
            info,
            mask,
            settings.activation,
        )
        metrics["teacher_mse"] = sums / tokens
        total = total + settings.mse * metrics["teacher_mse"]
    metrics["teacher_loss"] = total
    return total, metrics


def observed(
    teacher: Teacher,
    batch: Batch,
    with_activations: bool,
) -> tuple[Float[Array, "B T M"], Mapping[str, Any]]:
    """A frozen model's last hidden states, and what its layers record. No gradient enters.

    Args:
      teacher: the model.
      batch: rows of packed documents.
      with_activations: whether its layers record anything.
    """
    params = jax.lax.stop_gradient(teacher.params)
    outputs: Any = LanguageModel(teacher.model).apply(
        {"params": params},
        batch.tokens,
        batch.positions,
        batch.segment_ids,
        mutable=[COLLECTION] if with_activations else False,
    )
    recorded = {}
    if with_activations:
        outputs, state = outputs
        recorded = jax.lax.stop_gradient(state[COLLECTION])
    hidden, _, _ = outputs
    return jax.lax.stop_gradient(hidden), recorded


def divergence(
    hidden: Float[Array, "B T M"],
    weights: Float[Array, "X M"],
    hidden_of_teacher: Float[Array, "B T Mt"],
    weights_of_teacher: Float[Array, "X Mt"],
    mask: Float[Array, "B T"],
    temperature: float,
    chunk: int,
) -> Float[Array, ""]:
    """`t^2 KL(softmax(teacher / t) | softmax(model / t))`, a weighted sum over tokens, nats.

    The square of the temperature keeps the gradient's size (arXiv 1503.02531). The backward pass
    makes the logits of each chunk again.

    Args:
      hidden, weights: the model's last hidden states, its output matrix.
      hidden_of_teacher, weights_of_teacher: the teacher's.
      mask: the weight of each token.
      temperature: what logits are divided by.
      chunk: tokens whose logits exist at once; 0 for all of them.
    """

    @jax.checkpoint
    def of_chunk(pieces: tuple[Array, Array, Array]) -> Float[Array, ""]:
        own, teachers, mask = pieces
        is_counted = (mask != 0)[..., None]
        # Selected before the products: padding may hold anything.
        own = jax.nn.log_softmax(logits(jnp.where(is_counted, own, 0), weights) / temperature)
        teachers = jnp.where(is_counted, teachers, 0)
        expected = jax.nn.log_softmax(logits(teachers, weights_of_teacher) / temperature)
        by_token = jnp.sum(jnp.exp(expected) * (expected - own), axis=-1)
        return temperature**2 * jnp.sum(by_token * mask)

    arrays = (hidden, hidden_of_teacher, mask)
    positions = positions_of_chunk(mask.shape[0], mask.shape[1], chunk)
    if positions == mask.shape[1]:
        return of_chunk(arrays)

    def add(total: Array, pieces: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + of_chunk(pieces), None

    pieces = (
        chunks(hidden, positions),
        chunks(hidden_of_teacher, positions),
        chunks(mask, positions),
    )
    total, _ = jax.lax.scan(add, jnp.float32(0.0), pieces)
    return total


def distance_of_layers(
    model: ModelConfig,
    teacher: ModelConfig,
    params: Mapping[str, Any],
    recorded: Mapping[str, Any],
    info: TokenInfo,
    mask: Float[Array, "B T"],
    activation: str,
) -> Float[Array, ""]:
    """Mean squares of differences, a mean over layers and channels, a weighted sum over tokens.

    Args:
      model: its configuration.
      teacher: the teacher's.
      params: of the model.
      recorded: by the teacher's layers.
      info: about the tokens.
      mask: their weights.
      activation: which one (`TeacherConfig`).
    """
    inputs = by_layer(teacher, recorded, "mixer_input")
    targets = by_layer(teacher, recorded, activation)
    layers = set(compared_layers(model, teacher))
    total = jnp.float32(0.0)
    for block in model.blocks:
        chosen = [i for i in block.layers if i in layers]
        if not chosen:
            continue
        of_block = params["periods"][block.name] if block.is_repeated else params[block.name]
        of_mixer = of_block["mixer"]
        mixer, _ = block_layers(model, block)
        of_layer = functools.partial(_activation, mixer, info=info, activation=activation)
        if model.remat != "none":
            of_layer = jax.checkpoint(of_layer)
        for i in chosen:
            y = of_layer(_of_period(of_mixer, block, i), inputs[i])
            total = total + _distance(y, targets[i], mask)
    return total / len(layers)


def _distance(
    y: Float[Array, "B T ..."],
    target: Float[Array, "B T ..."],
    mask: Float[Array, "B T"],
) -> Float[Array, ""]:
    """The mean square over channels of a difference, a weighted sum over tokens."""
    channels = tuple(range(2, y.ndim))
    is_counted = jnp.expand_dims(mask != 0, channels)
    difference = y.astype(jnp.float32) - target.astype(jnp.float32)
    # Selected, not multiplied: padding may hold anything.
    squares = jnp.square(jnp.where(is_counted, difference, 0.0))
    return jnp.sum(jnp.mean(squares, axis=channels) * mask)


def _of_period(params: PyTree, block: BlockConfig, layer: int) -> PyTree:
    """The parameters of one of a block's layers."""
    if not block.is_repeated:
        return params
    period = list(block.layers).index(layer)
    return jax.tree.map(lambda x: x[period], params)


def _activation(
    mixer: Any,
    params: PyTree,
    x: Float[Array, "B T M"],
    info: TokenInfo,
    activation: str,
) -> Array:
    """What a mixer by itself makes of an input.

    Args:
      mixer: the module.
      params: its parameters.
      x: the input.
      info: about the tokens.
      activation: which of its outputs.
    """
    variables = {"params": params}
    if activation == "mixer_output":
        y, _ = mixer.apply(variables, x, info, None, method="with_cache")
        return y
    _, state = mixer.apply(
        variables,
        x,
        info,
        None,
        method="with_cache",
        mutable=[COLLECTION],
    )
    return state[COLLECTION][activation][0]


def by_layer(model: ModelConfig, recorded: Mapping[str, Any], name: str) -> dict[int, Array]:
    """What each layer has recorded under a name."""
    found = {}
    for block in model.blocks:
        of_block = recorded["periods"][block.name] if block.is_repeated else recorded[block.name]
        # Of the block itself, or of the mixer or the feed-forward inside it.
        inside = (of_block, of_block.get("mixer", {}), of_block.get("ffn", {}))
        of_name = next((part for part in inside if name in part), None)
        if of_name is None:
            continue
        values = of_name[name][0]
        for place, layer in enumerate(block.layers):
            found[layer] = values[place] if block.is_repeated else values
    return found
