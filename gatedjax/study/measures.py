"""What a study takes of a trained model: named plain numbers.

validation   loss (nats per token), loss_error, bits_per_byte; of an encoder loss and accuracy
recall       accuracy: fraction of the asked tokens that are right (the most likely token, over the
             validation rows)
probes       first_token_fraction, effective_rank (means over layers and heads), max_activation
             (over layers), kurtosis (largest of a layer), mixer_max_activation and mixer_kurtosis
             (likewise), gate_mean (mean over attention layers and linear ones)
lengths      loss@T for each of the cell's lengths: validation text in windows of T
routing      load_max_over_mean, balance_loss of the last step
width_probe  largest singular values over sqrt(rate / decay) width^0.75 (`optim_rules.width_probe`)
curvature    hessian@B: the largest eigenvalue of the Hessian of a batch of B rows of training text,
             B = 1, 4 and 16
sinks        of bigram_backcopy, over one batch: copy_accuracy at triggers; excess_loss, nats above
             that of a model that knows the language; dormant_on_first and active_on_first, the
             attention on the first token of the head with the largest sink, from ordinary tokens
             and from triggers; value_norm of the first token there, over that of others, and
             residual_norm, likewise, largest of a layer; max_activation; massive, the largest
             activation over the median one of its layer; gate_active and gate_dormant, the mean
             gate at triggers and at ordinary tokens
spent        loss and accuracy; mflop of a token, forward, with as much of its feed-forwards as it
             had; loops or learners, how much that was, of models that have them; parameters
speed        step_ms: the mean time of a training step, of those after the first metrics were read;
             it depends on what else the machine did

Call those of MEASURES inside `jax.set_mesh(trained.run.mesh)`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gatedjax.compiler_options import careful_jit
from gatedjax.config import FrozenDict, GatedAttentionConfig, ModelConfig
from gatedjax.data import Batch, batches
from gatedjax.data.recall import RecallConfig, recall_dataset
from gatedjax.evaluation.encoder import EncoderValidation
from gatedjax.evaluation.spent import RECORDED, spent
from gatedjax.evaluation.validation import Validation, with_length
from gatedjax.layers.moe import state as router_state
from gatedjax.model import LanguageModel, head_weights
from gatedjax.output import to_logits
from gatedjax.sharding import RULES, global_batch, my_rows
from gatedjax.study.optimizer_measures import curvature, singular_values
from gatedjax.study.sinks import measure_sinks
from gatedjax.study.trained import Trained
from gatedjax.training.run import Run

Values = dict[str, float]


def validation(trained: Trained) -> Values:
    """Loss over the configuration's number of validation batches."""
    config = trained.run.config
    if config.model.task != "lm":
        measured = EncoderValidation(trained.run, config.train.eval_batches)(trained.params)
        return {"loss": measured.loss, "accuracy": measured.accuracy}
    evaluate = Validation(trained.run, config.train.eval_batches)
    result = evaluate(trained.params)
    return {
        "loss": result.loss,
        "loss_error": result.loss_error,
        "bits_per_byte": result.bits_per_byte,
    }


def bits_per_byte(trained: Trained) -> float:
    """Of held-out text; called from anywhere."""
    with jax.set_mesh(trained.run.mesh):
        return validation(trained)["bits_per_byte"]


def recall(trained: Trained) -> Values:
    """Accuracy on the validation rows of the cell's task."""
    assert trained.cell.recall is not None, "the measure 'recall' needs a cell with a task"
    evaluate = RecallValidation(trained.cell.recall, trained.run)
    return {"accuracy": evaluate(trained.params).accuracy}


# probe -> how its values, over all layers, become one number
_SUMMARY_OF_PROBE: dict[str, Callable[[np.ndarray], Any]] = {
    "first_token_fraction": np.mean,
    "effective_rank": np.mean,
    "max_activation": np.max,
    "kurtosis": np.max,
    "mixer_max_activation": np.max,
    "mixer_kurtosis": np.max,
    "gate_mean": np.mean,
}


def probes(trained: Trained) -> Values:
    """The probes that the model's layers have something for, each as one number."""
    # On one batch, as `eval.py --probes`.
    found = Validation(trained.run, 1).probes(trained.params)
    values = {}
    for name, summarize in _SUMMARY_OF_PROBE.items():
        if name in found:
            by_layer = [np.ravel(x) for x in found[name].values()]
            of_all_layers = np.concatenate(by_layer)
            values[name] = float(summarize(of_all_layers))
    return values


def lengths(trained: Trained) -> Values:
    """Loss in windows of each of the cell's lengths."""
    return {f"loss@{T}": at_length(trained, T) for T in trained.cell.lengths}


def at_length(trained: Trained, length: int) -> float:
    """Loss over about as many validation tokens, in windows of `length`.

    With the cell's `yarn`, rotary positions are scaled to that length.
    """
    config = trained.run.config
    seq_len = config.data.seq_len
    factor = 1.0
    if trained.cell.yarn:
        # Windows shorter than those of training need no scaling.
        factor = max(1.0, length / seq_len)
    mixers = {}
    for name, mixer in config.model.mixers.items():
        if isinstance(mixer, GatedAttentionConfig) and mixer.rotary_dim:
            mixer = dataclasses.replace(mixer, yarn_factor=factor, yarn_original_length=seq_len)
        mixers[name] = mixer
    model = dataclasses.replace(config.model, mixers=FrozenDict(mixers))
    scaled = trained.run._replace(config=dataclasses.replace(config, model=model))
    run, num_batches = with_length(scaled, length, config.train.eval_batches)
    return Validation(run, num_batches)(trained.params).loss


def routing(trained: Trained) -> Values:
    """The balance of the experts at the last step of training."""
    names = ("load_max_over_mean", "balance_loss")
    return {name: trained.metrics[name] for name in names}


def speed(trained: Trained) -> Values:
    """The time of a step; NaN where training ended before there were two readings."""
    return {"step_ms": trained.step_ms}


def what_is_spent(trained: Trained) -> Values:
    """Quality against the FLOPs of models that do not spend the same on every token."""
    run = trained.run
    model = run.config.model
    found = spent(run, model, trained.params, run.config.train.eval_batches)
    stored, _ = router_state.split(trained.params)
    values = {
        "loss": found.loss,
        "accuracy": found.accuracy,
        "mflop": found.flops / 1e6,
        "parameters": float(sum(x.size for x in jax.tree.leaves(stored))),
    }
    for ffn in model.ffns.values():
        if ffn.kind in RECORDED:
            values[RECORDED[ffn.kind]] = found.had
    return values


MEASURES: dict[str, Callable[[Trained], Values]] = {
    "validation": validation,
    "recall": recall,
    "probes": probes,
    "lengths": lengths,
    "routing": routing,
    "sinks": measure_sinks,
    "speed": speed,
    "spent": what_is_spent,
    "width_probe": singular_values,
    "curvature": curvature,
}


class Recalled(NamedTuple):
    """accuracy: the fraction of the `asked` tokens that are right."""

    accuracy: float
    asked: int


class RecallValidation:
    """Accuracy over all validation rows of a task."""

    def __init__(self, config: RecallConfig, run: Run):
        self._run = run
        self._batch_size = run.config.train.batch_size
        self._dataset = recall_dataset(
            config,
            "validation",
            batch_size=self._batch_size,
            rows=my_rows(run.mesh, self._batch_size),
        )

    def __call__(self, params: Any) -> Recalled:
        """Call it inside `jax.set_mesh(run.mesh)`."""
        mesh = self._run.mesh
        model = self._run.config.model
        counts = []
        for rows in batches(self._dataset):
            batch = global_batch(mesh, rows, self._batch_size)
            counts.append(_count_right(model, params, batch))
        # One transfer at the end: the device is never waited for in between.
        right, asked = np.sum(jax.device_get(counts), axis=0)
        return Recalled(float(right / asked), int(asked))


@functools.partial(careful_jit, static_argnums=0)
def _count_right(
    model: ModelConfig, params: Any, batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Tokens asked for that are predicted, and all that are asked for."""
    with nn.logical_axis_rules(RULES):
        outputs = LanguageModel(model).apply(
            {"params": params},
            batch.tokens,
            batch.positions,
            batch.segment_ids,
        )
    hidden = outputs[0]
    weights = head_weights(params)
    best = jnp.argmax(to_logits(model, params)(hidden, weights), axis=-1)
    is_right = best == batch.targets
    right = jnp.sum(is_right * batch.loss_mask)
    asked = jnp.sum(batch.loss_mask)
    return right, asked
