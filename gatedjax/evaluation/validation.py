"""Loss over held-out text, with its uncertainty: train.py and eval.py measure it."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, PyTree

from gatedjax.compiler_options import careful_jit
from gatedjax.config import DataConfig
from gatedjax.data import Batch, ImageCorpus, batches, corpora, make_dataset
from gatedjax.evaluation.probes import Probes, measure
from gatedjax.evaluation.rounding import rounded_eval_step
from gatedjax.sharding import global_batch, my_rows
from gatedjax.training.eval_step import eval_step_by_row
from gatedjax.training.run import Run

_eval_step = careful_jit(eval_step_by_row, static_argnums=0)


def tokens_per_byte(config: DataConfig) -> float:
    """Tokens per byte of validation text, over all sources.

    Turns nats per token into bits per byte: every token is predicted, the ends of documents too,
    and every byte is counted.
    """
    texts = [corpus for corpus in corpora(config).values() if not isinstance(corpus, ImageCorpus)]
    splits = [corpus.splits["validation"] for corpus in texts]
    tokens = sum(split.predicted for split in splits)
    return tokens / sum(split.bytes for split in splits)


class Evaluation(NamedTuple):
    """A loss, its uncertainty, and how many tokens it is a mean of.

    loss: nats per token.
    bits_per_byte: of text, comparable across tokenizers.
    Standard errors are over rows, so one batch has them too; infinite for one row.
    """

    loss: float
    loss_error: float
    bits_per_byte: float
    bits_per_byte_error: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


def with_length(run: Run, length: int, num_batches: int) -> tuple[Run, int]:
    """The run in windows of `length`, and how many batches of them have as many tokens.

    Args:
      run: as it is.
      length: tokens of a window.
      num_batches: of the run's own windows; 0 for all of the text.
    """
    data = run.config.data
    changed = dataclasses.replace(
        run.config,
        data=dataclasses.replace(data, seq_len=length),
    )
    of_length = num_batches * data.seq_len // length
    return run._replace(config=changed), max(of_length, min(num_batches, 1))


class Validation:
    """Measures a model on the first `num_batches` batches of validation text (0: all of it)."""

    def __init__(self, run: Run, num_batches: int):
        data = run.config.data
        self._run = run
        self._batch_size = run.config.train.batch_size
        self._tokens_per_byte = tokens_per_byte(data)
        dataset = make_dataset(
            data,
            "validation",
            batch_size=self._batch_size,
            rows=my_rows(run.mesh, self._batch_size),
            seed=data.seed,
        )
        count = min(num_batches or len(dataset), len(dataset))
        self._dataset = dataset[:count]

    def __call__(self, params: PyTree, activation_bits: int | None = None) -> Evaluation:
        """Mean loss per token; call it inside `jax.set_mesh(run.mesh)`.

        Args:
          params: of the model.
          activation_bits: of activations that are rounded (`evaluation.rounding`); None for none.
        """
        losses = []
        counts = []
        model = self._run.config.model
        for local in batches(self._dataset):
            batch = self._global(local)
            if activation_bits is None:
                sums = _eval_step(model, params, batch)
            else:
                sums = rounded_eval_step(activation_bits, model, params, batch)
            losses.append(np.asarray(sums.cross_entropy, np.float64))
            counts.append(np.asarray(sums.count, np.float64))
        return summarize(np.concatenate(losses), np.concatenate(counts), self._tokens_per_byte)

    def probes(self, params: PyTree) -> Probes:
        """What the layers do on the first batch (`gatedjax.evaluation.probes`).

        Call it inside `jax.set_mesh(run.mesh)`.
        """
        first = next(batches(self._dataset))
        return measure(self._run.config.model, params, self._global(first))

    def _global(self, local: Batch) -> Batch:
        return global_batch(self._run.mesh, local, self._batch_size)


def summarize(
    losses: Float[np.ndarray, " rows"],
    counts: Float[np.ndarray, " rows"],
    tokens_per_byte: float,
) -> Evaluation:
    """The mean loss per token, from sums over rows.

    The standard error is that of a ratio estimate. One row tells nothing of it: infinity.

    Args:
      losses: summed over the tokens of each row, nats.
      counts: tokens of each row; rows without any are left out.
      tokens_per_byte: of the validation text.
    """
    is_counted = counts > 0
    mean, error = ratio(losses[is_counted], counts[is_counted])
    bits = tokens_per_byte / math.log(2)
    return Evaluation(
        loss=mean,
        loss_error=error,
        bits_per_byte=mean * bits,
        bits_per_byte_error=error * bits,
        tokens=int(counts.sum()),
    )


def ratio(
    sums: Float[np.ndarray, " rows"],
    counts: Float[np.ndarray, " rows"],
) -> tuple[float, float]:
    """The mean over what is counted, and its standard error; infinite for one row.

    Args:
      sums: over each row.
      counts: of each row, above 0.
    """
    sums = np.asarray(sums, np.float64)
    total = counts.sum()
    mean = sums.sum() / total
    n = len(sums)
    error = math.inf
    if n > 1:
        residuals = sums - mean * counts
        squares = float(residuals @ residuals)
        error = math.sqrt(n / (n - 1) * squares) / total
    return float(mean), float(error)
