"""A trained model's MLPs become adaptive ones, in the three stages of arXiv 2312.10193.

1. Every MLP is cut into learners; they learn that each number of them gives what the MLP gives.
2. Gates learn the number behind which one more learner gains little.
3. The whole model learns, with the losses of what the gates choose (`training.step`).

The first two are layer by layer, on what the layers of the trained model see and give.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, PyTree

from gatedjax.config import (
    AdaptiveMLPConfig,
    Config,
    FeedForwardConfig,
    FrozenDict,
    GatedMLPConfig,
    MLPConfig,
    ModelConfig,
)
from gatedjax.data import Batch
from gatedjax.errors import require
from gatedjax.evaluation.learning import training_text
from gatedjax.layers.adaptive_mlp import LearnerGate, prefix_outputs
from gatedjax.layers.gate_values import COLLECTION
from gatedjax.layers.learner_losses import distance, gate_labels
from gatedjax.layers.tree import Path, flatten_dict
from gatedjax.model import LanguageModel
from gatedjax.sharding import global_batch
from gatedjax.training import given_weights
from gatedjax.training.run import fresh_state, prepare
from gatedjax.training.step import jit_train_step
from gatedjax.training.teacher import by_layer

# By layer, the parameters of its adaptive MLP.
OfLayers = dict[str, Any]
# Of stage 2, as published.
ERROR_FACTOR = 1.2


def adaptive_model(
    model: ModelConfig,
    learners: int,
    budget: float,
    budget_loss: float = 0.1,
) -> ModelConfig:
    """The model with adaptive MLPs in place of its MLPs.

    Args:
      model: of a trained run.
      learners: of each.
      budget: the fraction of them that is to be used.
      budget_loss: weight of the distance from it.

    Raises:
      InputError: no MLP that can become one, or too many learners.
    """
    used = {id(block.feed_forward) for block in model.blocks}
    ffns: dict[str, FeedForwardConfig] = {}
    changed = 0
    for name, ffn in model.ffns.items():
        ffns[name] = ffn
        if id(ffn) in used and _can_be_cut(ffn):
            assert isinstance(ffn, GatedMLPConfig | MLPConfig)
            changed += 1
            activation: Any = ffn.activation
            ffns[name] = AdaptiveMLPConfig(
                hidden=ffn.hidden,
                learners=learners,
                gated=isinstance(ffn, GatedMLPConfig),
                activation=activation,
                budget=budget,
                budget_loss=budget_loss,
            )
    expected = "feed-forwards of kind mlp or gated_mlp, without biases, norms or neuron gates"
    require(changed > 0, "--checkpoint", "a model without MLPs to cut", expected)
    return dataclasses.replace(model, ffns=FrozenDict(ffns))


def _can_be_cut(ffn: FeedForwardConfig) -> bool:
    if isinstance(ffn, GatedMLPConfig):
        return not ffn.bias and not ffn.norm and ffn.activation != "clamped_swiglu"
    return isinstance(ffn, MLPConfig) and not ffn.bias and ffn.neuron_gate == "none"


def adaptive_layers(model: ModelConfig) -> dict[int, AdaptiveMLPConfig]:
    """The adaptive MLPs of a model, by the number of the layer."""
    layers = ((i, model.layer(i)[1]) for i in range(model.num_layers))
    return {i: ffn for i, ffn in layers if isinstance(ffn, AdaptiveMLPConfig)}


def from_dense(
    model: ModelConfig,
    params: Mapping[str, Any],
    seed: int,
) -> OfLayers:
    """The adaptive MLPs before stage 1: the matrices of the MLPs, gates at random.

    Args:
      model: with adaptive MLPs.
      params: of the trained model.
      seed: of the gates.
    """
    found = {}
    for block in model.blocks:
        c = block.feed_forward
        if not isinstance(c, AdaptiveMLPConfig):
            continue
        of_block: Any = params
        for name in (*block.path, "ffn"):
            of_block = of_block[name]
        for period, layer in enumerate(block.layers):
            own = of_block
            if block.is_repeated:
                own = jax.tree.map(lambda x, period=period: x[period], of_block)
            key = jax.random.fold_in(jax.random.key(seed), layer)
            gate = LearnerGate(c, model.init_std).init(key, jnp.zeros((1, 1, model.width)))
            found[str(layer)] = {**own, "learner_gate": gate["params"]}
    return found


def whole(
    model: ModelConfig,
    params: Mapping[str, Any],
    of_layers: OfLayers,
) -> dict[Path, Any]:
    """The parameters of the model with these adaptive MLPs, by path.

    Args:
      model: with adaptive MLPs.
      params: of the trained model.
      of_layers: the adaptive MLPs.
    """
    flat = dict(flatten_dict(params))
    for block in model.blocks:
        if not isinstance(block.feed_forward, AdaptiveMLPConfig):
            continue
        layers = [of_layers[str(layer)] for layer in block.layers]
        own = layers[0]
        if block.is_repeated:
            own = jax.tree.map(lambda *x: jnp.stack(x), *layers)
        flat |= {(*block.path, "ffn", *path): x for path, x in flatten_dict(own).items()}
    return flat


# --- the first two stages


def _seen(
    model: ModelConfig, params: PyTree, batch: Batch
) -> tuple[dict[int, Array], dict[int, Array]]:
    """What the MLPs of the trained model get and give."""
    _, state = LanguageModel(model).apply(
        {"params": params},
        batch.tokens,
        batch.positions,
        batch.segment_ids,
        mutable=[COLLECTION],
    )
    recorded: Any = jax.lax.stop_gradient(state[COLLECTION])
    inputs = by_layer(model, recorded, "ffn_input")
    return inputs, by_layer(model, recorded, "ffn_output")


def _mean(by_token: Float[Array, "B T"], batch: Batch) -> Float[Array, ""]:
    mask = jnp.asarray(batch.segment_ids) != 0
    total = jnp.sum(jnp.where(mask, by_token, 0.0))
    return total / jnp.maximum(jnp.sum(mask), 1)


def learners_loss(
    of_layers: OfLayers,
    params: PyTree,
    batch: Batch,
    dense: ModelConfig,
    adaptive: ModelConfig,
) -> Float[Array, ""]:
    """Of stage 1, a mean over layers, over what their outputs' mean squares are.

    Args:
      of_layers: the adaptive MLPs; they learn.
      params: of the trained model.
      batch: rows of text.
      dense: the trained model.
      adaptive: the same with adaptive MLPs.
    """

    def of_layer(name: str, c: AdaptiveMLPConfig, x: Array, target: Array) -> Array:
        outputs = prefix_outputs(of_layers[name], c, x, detached=True)
        # A layer of large outputs is not to drown the others.
        size = _mean(jnp.mean(jnp.square(target), axis=-1), batch)
        return _mean(distance(outputs, target), batch) / jnp.maximum(size, 1e-12)

    return _mean_of_layers(of_layer, params, batch, dense, adaptive)


def gates_loss(
    gates: OfLayers,
    of_layers: OfLayers,
    params: PyTree,
    batch: Batch,
    dense: ModelConfig,
    adaptive: ModelConfig,
) -> Float[Array, ""]:
    """Of stage 2: cross-entropy with the number of learners that is enough, a mean over layers.

    Args:
      gates: of the adaptive MLPs, by layer; they learn.
      of_layers: the adaptive MLPs after stage 1.
      params: of the trained model.
      batch: rows of text.
      dense: the trained model.
      adaptive: the same with adaptive MLPs.
    """

    def of_layer(name: str, c: AdaptiveMLPConfig, x: Array, target: Array) -> Array:
        outputs = prefix_outputs(of_layers[name], c, x)
        labels = gate_labels(outputs, target, ERROR_FACTOR, c.least)
        gate = LearnerGate(c, adaptive.init_std)
        found: Any = gate.apply({"params": gates[name]}, x)
        log_p = jax.nn.log_softmax(found)
        return -_mean(jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0], batch)

    return _mean_of_layers(of_layer, params, batch, dense, adaptive)


def _mean_of_layers(
    loss: Callable[[str, AdaptiveMLPConfig, Array, Array], Array],
    params: PyTree,
    batch: Batch,
    dense: ModelConfig,
    adaptive: ModelConfig,
) -> Float[Array, ""]:
    """The mean over adaptive MLPs of a loss of what the trained MLP in their place gets and gives.

    Args:
      loss: of a layer's name and configuration, and the trained MLP's input and output, float32.
      params: of the trained model.
      batch: rows of text.
      dense: the trained model.
      adaptive: the same with adaptive MLPs.
    """
    inputs, targets = _seen(dense, params, batch)
    layers = adaptive_layers(adaptive)
    total = jnp.float32(0.0)
    for layer, c in layers.items():
        x, target = (y[layer].astype(jnp.float32) for y in (inputs, targets))
        total = total + loss(str(layer), c, x, target)
    return total / len(layers)


# --- the third


def trained(config: Config, given: Mapping[Path, Any]) -> dict[Path, Any]:
    """The parameters, and state of routers, after the steps of a run, by path.

    Args:
      config: of the run.
      given: what it starts from.
    """
    run = prepare(config)
    wanted = given_weights.parameters(run)
    with jax.set_mesh(run.mesh):
        placed = {
            path: jax.device_put(np.asarray(x), wanted[path].sharding) for path, x in given.items()
        }
        state = fresh_state(run, placed)
        step = jit_train_step(config, run.tx, run.shardings)
        stream = training_text(run)
        for _ in range(config.train.steps):
            batch = global_batch(run.mesh, next(stream), config.train.batch_size)
            state, _ = step(state, batch)
    return flatten_dict(state.params) | flatten_dict(state.routers)
