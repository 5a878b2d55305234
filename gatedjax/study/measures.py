"""What a study takes of a trained model: named plain numbers.

validation   loss (nats per token), loss_error, bits_per_byte
recall       accuracy: share of the asked tokens that are right (the most likely token, over the validation rows)
probes       first_token_fraction, effective_rank (means over layers and heads), max_activation (over layers),
             kurtosis (largest of a layer), gate_mean (mean over attention layers and linear ones)
lengths      loss@T for each of the cell's lengths: validation text in windows of T
routing      load_max_over_mean, balance_loss of the last step
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gatedjax.compiler_options import careful_jit
from gatedjax.config import FrozenDict, GatedAttentionConfig, ModelConfig
from gatedjax.data import Batch, batches
from gatedjax.data.recall import RecallConfig, recall_dataset
from gatedjax.evaluation.validation import Validation
from gatedjax.model import LanguageModel, head_weights, logits
from gatedjax.sharding import RULES, global_batch, my_rows
from gatedjax.training.run import Run


def validation(trained) -> dict[str, float]:
    result = Validation(trained.run, trained.run.config.train.eval_batches)(trained.params)
    return {
        "loss": result.loss,
        "loss_error": result.loss_error,
        "bits_per_byte": result.bits_per_byte,
    }


def recall(trained) -> dict[str, float]:
    return {"accuracy": RecallValidation(trained.cell.recall, trained.run)(trained.params).accuracy}


def probes(trained) -> dict[str, float]:
    found = Validation(trained.run, 1).probes(trained.params)
    all_of = lambda name: np.concatenate([np.ravel(x) for x in found[name].values()])
    takes = {
        "first_token_fraction": np.mean,
        "effective_rank": np.mean,
        "max_activation": np.max,
        "kurtosis": np.max,
    }
    return {
        name: float(take(all_of(name)))
        for name, take in (takes | {"gate_mean": np.mean}).items()
        if name in found
    }


def lengths(trained) -> dict[str, float]:
    return {f"loss@{T}": at_length(trained, T) for T in trained.cell.lengths}


def at_length(trained, length: int) -> float:
    """Loss over about as many validation tokens, in windows of `length`; YaRN's factor if the cell
    wants it.
    """
    c = trained.run.config
    factor = max(1.0, length / c.data.seq_len) if trained.cell.yarn else 1.0
    stretch = lambda m: (
        dataclasses.replace(m, yarn_factor=factor, yarn_original_length=c.data.seq_len)
        if isinstance(m, GatedAttentionConfig) and m.rotary_dim
        else m
    )
    mixers = FrozenDict({name: stretch(m) for name, m in c.model.mixers.items()})
    changed = dataclasses.replace(
        c,
        model=dataclasses.replace(c.model, mixers=mixers),
        data=dataclasses.replace(c.data, seq_len=length),
    )
    num_batches = max(1, c.train.eval_batches * c.data.seq_len // length)
    return Validation(trained.run._replace(config=changed), num_batches)(trained.params).loss


def routing(trained) -> dict[str, float]:
    return {name: trained.metrics[name] for name in ("load_max_over_mean", "balance_loss")}


MEASURES = {
    "validation": validation,
    "recall": recall,
    "probes": probes,
    "lengths": lengths,
    "routing": routing,
}


class Recalled(NamedTuple):
    accuracy: float
    asked: int


class RecallValidation:
    """Accuracy over all validation rows of a task."""

    def __init__(self, config: RecallConfig, run: Run):
        self._run, self._size = run, run.config.train.batch_size
        rows = my_rows(run.mesh, self._size)
        self._dataset = recall_dataset(config, "validation", batch_size=self._size, rows=rows)

    def __call__(self, params) -> Recalled:
        """Call it inside `jax.set_mesh(run.mesh)`."""
        model, mesh = self._run.config.model, self._run.mesh
        each = [
            _right(model, params, global_batch(mesh, b, self._size)) for b in batches(self._dataset)
        ]
        right, asked = np.sum(jax.device_get(each), axis=0)
        return Recalled(float(right / asked), int(asked))


@functools.partial(careful_jit, static_argnums=0)
def _right(model: ModelConfig, params, batch: Batch) -> tuple[Array, Array]:
    """Tokens asked for that are predicted, and all that are asked for."""
    with nn.logical_axis_rules(RULES):
        hidden, _, _ = LanguageModel(model).apply(
            {"params": params}, batch.tokens, batch.positions, batch.segment_ids
        )
    best = jnp.argmax(logits(hidden, head_weights(params)), axis=-1)
    return jnp.sum((best == batch.targets) * batch.loss_mask), jnp.sum(batch.loss_mask)
