"""Where the heads of a model look that has learned Bigram-Backcopy (`gatedjax.data.backcopy`)."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gatedjax.compiler_options import careful_jit
from gatedjax.config import ModelConfig
from gatedjax.data import Batch, batches
from gatedjax.data.backcopy import best_loss
from gatedjax.data.recall import language_of, recall_dataset
from gatedjax.evaluation import probes
from gatedjax.layers.gate_values import gate_values
from gatedjax.model import LanguageModel, head_weights, logits
from gatedjax.sharding import RULES, global_batch, my_rows
from gatedjax.study.trained import Trained


def measure_sinks(trained: Trained) -> dict[str, float]:
    """Of the first batch of validation rows; see `measures.py` for the values."""
    task = trained.cell.recall
    assert task is not None, "the measure 'sinks' needs a cell with a task"
    run = trained.run
    batch_size = run.config.train.batch_size
    dataset = recall_dataset(
        task,
        "validation",
        batch_size=batch_size,
        rows=my_rows(run.mesh, batch_size),
    )
    rows = next(iter(batches(dataset)))
    batch = global_batch(run.mesh, rows, batch_size)
    language = language_of(task)
    tokens, targets = np.asarray(rows.tokens), np.asarray(rows.targets)
    is_trigger = language.is_trigger(tokens)
    model = run.config.model
    predicted, loss = jax.device_get(predictions(model, trained.params, batch))
    # At a trigger a copying head has something to do, elsewhere it has not.
    active = probes.measure(model, trained.params, batch, is_trigger)
    dormant = probes.measure(model, trained.params, batch, ~is_trigger)
    gates = _gates(model, trained.params, batch)
    by_head = _over_layers(dormant["first_token_fraction"])
    # A model of several heads has some that never copy: the sink is where most attention goes.
    sink = int(np.argmax(by_head))
    largest = [
        channels[0] / dormant["median_activation"][layer]
        for layer, channels in dormant["massive_channels"].items()
    ]
    return {
        "copy_accuracy": float(np.mean((predicted == targets)[is_trigger])),
        "excess_loss": float(loss) - best_loss(tokens, targets, language),
        "dormant_on_first": float(by_head[sink]),
        "active_on_first": float(_over_layers(active["first_token_fraction"])[sink]),
        "value_norm": float(_over_layers(dormant["first_value_norm"])[sink]),
        "residual_norm": float(np.max(_over_layers(dormant["first_residual_norm"]))),
        "max_activation": float(np.max(_over_layers(dormant["max_activation"]))),
        "massive": float(np.max(largest)),
        "gate_active": _mean_at(gates, is_trigger),
        "gate_dormant": _mean_at(gates, ~is_trigger),
    }


def _mean_at(gates: np.ndarray | None, tokens: np.ndarray) -> float:
    """The mean gate at these tokens; NaN where the model has no gates."""
    return float("nan") if gates is None else float(gates[tokens].mean())


def _over_layers(by_layer: dict[int, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in by_layer.values()])


def _gates(model: ModelConfig, params: Any, batch: Batch) -> np.ndarray | None:
    """[B, T]: the mean over all gates of a token; None where there are none."""
    with nn.logical_axis_rules(RULES):
        found = gate_values(LanguageModel(model), params, jnp.asarray(batch.tokens))
    by_layer = [np.asarray(x) for name, x in found.items() if name.endswith("mixer/gates")]
    if not by_layer:
        return None
    # Gates of layers that are scanned have an axis of periods in front.
    tokens = [x.reshape(-1, *batch.tokens.shape, x[0, 0, 0].size) for x in by_layer]
    return np.mean(np.concatenate(tokens), axis=(0, -1))


@functools.partial(careful_jit, static_argnums=0)
def predictions(
    model: ModelConfig, params: Any, batch: Batch
) -> tuple[Float[Array, "B T"], Float[Array, ""]]:
    """The most likely tokens, and the mean loss."""
    with nn.logical_axis_rules(RULES):
        outputs = LanguageModel(model).apply(
            {"params": params},
            batch.tokens,
            batch.positions,
            batch.segment_ids,
        )
    log_probs = jax.nn.log_softmax(logits(outputs[0], head_weights(params)))
    of_targets = jnp.take_along_axis(log_probs, jnp.asarray(batch.targets)[..., None], axis=-1)
    return jnp.argmax(log_probs, axis=-1), -jnp.mean(of_targets)
