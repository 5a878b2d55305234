"""Loss over held-out text, with its uncertainty: what train.py does every so often and eval.py does at length."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

from gatedjax.data import Batch
from gatedjax.setup import Run
from gatedjax.sharding import global_batch
from gatedjax.train_step import eval_step

_eval_step = jax.jit(eval_step, static_argnums=0)


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


def evaluate(run: Run, params, batches: Iterable[Batch], batch_size: int, tokens_per_byte: float) -> Evaluation:
    """Mean loss per token over `batches` (this process's rows of global batches of `batch_size` rows)."""
    model = run.config.model
    sums = [_eval_step(model, params, global_batch(run.mesh, batch, batch_size)) for batch in batches]
    losses, counts = np.array([[float(s.cross_entropy), float(s.count)] for s in sums]).T
    return summarise(losses, counts, tokens_per_byte)


def summarise(losses: np.ndarray, counts: np.ndarray, tokens_per_byte: float) -> Evaluation:
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
