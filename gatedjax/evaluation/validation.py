"""Loss over held-out text, with its uncertainty: what train.py does every so often and eval.py does at length."""

import math
from typing import NamedTuple

import numpy as np

from gatedjax.compiler_options import careful_jit
from gatedjax.config import DataConfig
from gatedjax.data import batches, corpora, make_dataset
from gatedjax.evaluation.probes import Probes, measure
from gatedjax.sharding import global_batch, my_rows
from gatedjax.training.run import Run
from gatedjax.training.step import eval_step


def tokens_per_byte(config: DataConfig) -> float:
    """Predicted tokens per byte of validation text, over all sources: turns nats per token into bits per byte."""
    splits = [corpus.splits["validation"] for corpus in corpora(config).values()]
    return sum(s.targets for s in splits) / sum(s.bytes for s in splits)


_eval_step = careful_jit(eval_step, static_argnums=0)


class Evaluation(NamedTuple):
    """loss: nats per token. bits_per_byte: of text, comparable across tokenizers. Standard errors are over batches."""

    loss: float
    loss_error: float
    bits_per_byte: float
    bits_per_byte_error: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


class Validation:
    """The first `num_batches` batches of validation text (0: all of it), the same ones each time it is called."""

    def __init__(self, run: Run, num_batches: int):
        data, self._batch_size = run.config.data, run.config.train.batch_size
        rows = my_rows(run.mesh, self._batch_size)
        dataset = make_dataset(
            data, "validation", batch_size=self._batch_size, rows=rows, seed=data.seed
        )
        self._dataset = dataset[: min(num_batches or len(dataset), len(dataset))]
        self._run, self._tokens_per_byte = run, tokens_per_byte(data)

    def __call__(self, params) -> Evaluation:
        """Mean loss per token; call it inside `jax.set_mesh(run.mesh)`."""
        model, mesh = self._run.config.model, self._run.mesh
        sums = [
            _eval_step(model, params, global_batch(mesh, b, self._batch_size))
            for b in batches(self._dataset)
        ]
        losses, counts = np.array([[float(s.cross_entropy), float(s.count)] for s in sums]).T
        return summarize(losses, counts, self._tokens_per_byte)

    def probes(self, params) -> Probes:
        """What the layers do on the first batch (`gatedjax.evaluation.probes`); call it inside `jax.set_mesh(run.mesh)`."""
        batch = global_batch(self._run.mesh, next(batches(self._dataset)), self._batch_size)
        return measure(self._run.config.model, params, batch)


def summarize(losses: np.ndarray, counts: np.ndarray, tokens_per_byte: float) -> Evaluation:
    """From summed losses (nats) and token counts per batch. The error is that of a ratio estimate, 0 for one batch."""
    counted = counts > 0
    losses, counts = losses[counted], counts[counted]
    tokens = counts.sum()
    mean = losses.sum() / tokens
    n = len(losses)
    residuals = losses - mean * counts
    error = math.sqrt(n / max(n - 1, 1) * float(residuals @ residuals)) / tokens if n > 1 else 0.0
    bits = tokens_per_byte / math.log(2)
    return Evaluation(float(mean), error, float(mean) * bits, error * bits, int(tokens))
