"""Loss and accuracy of an encoder on what was held out, with their uncertainty."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree

from gatedjax.compiler_options import careful_jit
from gatedjax.config import ModelConfig
from gatedjax.data import Batch, batches, image_corpora, make_dataset
from gatedjax.evaluation.probes import Probes, measure
from gatedjax.evaluation.validation import ratio
from gatedjax.model import head_weights, logits
from gatedjax.sharding import RULES, global_batch, my_rows
from gatedjax.training.eval_step import batch_losses_and_correct
from gatedjax.training.losses import TokenLosses
from gatedjax.training.run import Run


class EncoderEvaluation(NamedTuple):
    """What an encoder gets right.

    loss: nats per image, or per masked token.
    accuracy: the fraction whose most likely class, or token, is the right one.
    targets: images or masked tokens, of which these are means.
    confusion: how often images of a class (row) were taken for one (column); None for tokens.
    Standard errors are over rows; infinite for one row.
    """

    loss: float
    loss_error: float
    accuracy: float
    accuracy_error: float
    targets: int
    confusion: Int[np.ndarray, "X X"] | None = None


class EncoderValidation:
    """Measures an encoder on the first `num_batches` held-out batches (0: all of them)."""

    def __init__(self, run: Run, num_batches: int):
        data = run.config.data
        self._run = run
        self._batch_size = run.config.train.batch_size
        dataset = make_dataset(
            data,
            "validation",
            batch_size=self._batch_size,
            rows=my_rows(run.mesh, self._batch_size),
            seed=data.seed,
            model=run.config.model,
        )
        count = min(num_batches or len(dataset), len(dataset))
        self._dataset = dataset[:count]

    def __call__(self, params: PyTree) -> EncoderEvaluation:
        """Loss and accuracy; call it inside `jax.set_mesh(run.mesh)`."""
        model = self._run.config.model
        counted = []
        for local in batches(self._dataset):
            measured = _measured(model, params, self._global(local))
            counted.append(jax.tree.map(np.asarray, measured))
        return _summary(model, jax.tree.map(lambda *rows: np.concatenate(rows), *counted))

    def probes(self, params: PyTree) -> Probes:
        """What the layers do on the first batch (`gatedjax.evaluation.probes`).

        Call it inside `jax.set_mesh(run.mesh)`.
        """
        first = next(batches(self._dataset))
        return measure(self._run.config.model, params, self._global(first))

    def _global(self, local: Batch) -> Batch:
        return global_batch(self._run.mesh, local, self._batch_size)


def class_names(run: Run) -> tuple[str, ...]:
    """The classes of the run's images, in the order of their numbers."""
    corpora = image_corpora(run.config.data)
    return next(iter(corpora.values())).classes


class _Rows(NamedTuple):
    """Of every row: sums over its targets, and the class that it has and that it was taken for."""

    losses: TokenLosses
    correct: Float[Any, " rows"]
    label: Int[Any, " rows"]
    predicted: Int[Any, " rows"]


def _measure_rows(model: ModelConfig, params: PyTree, batch: Batch) -> _Rows:
    losses, correct, hidden = batch_losses_and_correct(model, params, batch)
    predicted = jnp.zeros(hidden.shape[0], jnp.int32)
    if model.task == "classify":
        of_classes = logits(hidden[:, 0], head_weights(params))
        predicted = jnp.argmax(of_classes, axis=-1).astype(jnp.int32)
    rows = _Rows(losses, correct, jnp.asarray(batch.targets)[:, 0], predicted)
    # Of a global batch a process could read its own rows only.
    with nn.logical_axis_rules(RULES):
        return jax.tree.map(lambda x: nn.with_logical_constraint(x, (None,)), rows)


_measured = careful_jit(_measure_rows, static_argnums=0)


def _summary(model: ModelConfig, rows: _Rows) -> EncoderEvaluation:
    counts = np.asarray(rows.losses.count, np.float64)
    is_counted = counts > 0
    counts = counts[is_counted]
    losses = np.asarray(rows.losses.cross_entropy)
    loss, loss_error = ratio(losses[is_counted], counts)
    accuracy, accuracy_error = ratio(rows.correct[is_counted], counts)
    confusion = None
    if model.task == "classify":
        confusion = np.zeros((model.vocab_size, model.vocab_size), np.int64)
        np.add.at(confusion, (rows.label[is_counted], rows.predicted[is_counted]), 1)
    return EncoderEvaluation(
        loss=loss,
        loss_error=loss_error,
        accuracy=accuracy,
        accuracy_error=accuracy_error,
        targets=int(counts.sum()),
        confusion=confusion,
    )
