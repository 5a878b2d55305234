"""Batches that grow while a model trains (AdAdaGrad's norm test, arXiv 2402.11215).

A step's micro-batches say how far its gradient would be another one on other data: with m of them,
whose mean is g, the variance of g is sum |g_i - g|^2 / (m (m - 1)). Where that is above eta^2 |g|^2
the batch doubles until it would be below. Micro-batches keep their size, there are more of them: at
most a few programs are compiled. Rows come in the order that they would have come in.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax import Array

from gatedjax.config import Config
from gatedjax.data import Batch
from gatedjax.sharding import global_batch
from gatedjax.training.gradients import VARIANCE
from gatedjax.training.optim_growth import doublings, with_doublings
from gatedjax.training.run import Run
from gatedjax.training.state import TrainState
from gatedjax.training.step import jit_train_step
from gatedjax.training.teacher import Teacher


def doublings_needed(variance: float, square: float, eta: float, most: int) -> int:
    """How often the batch must double for the norm test to hold, `most` times at most.

    Args:
      variance: of the gradient.
      square: |g|^2.
      eta: the test's number.
      most: doublings.
    """
    limit = eta**2 * square
    if not math.isfinite(variance) or variance <= limit:
        return 0
    if limit == 0:
        return most
    return min(most, math.ceil(math.log2(variance / limit)))


class Growth:
    """Batches and steps of a run, of the size that they have grown to.

    A run without `grow_batches` has one size.
    """

    def __init__(self, run: Run, config: Config, options: Mapping[str, str] | None = None):
        """
        Args:
          run: what is trained.
          config: as its step is compiled.
          options: as of `jit_train_step`.
        """
        self._run = run
        self._config = config
        self._options = options
        self._steps: dict[int, Any] = {}
        train = config.train
        ratio = train.most_accumulation_steps // train.accumulation_steps
        self._most = int(math.log2(ratio)) if train.grow_batches else 0
        self.doublings = 0

    def begin(self, state: TrainState) -> None:
        """With this state, which says how far a run that goes on has grown."""
        if self._config.train.grow_batches:
            self.doublings = min(doublings(state.opt_state), self._most)

    def compile_first(self, batch: Batch, teacher: Teacher | None) -> None:
        """Compiles the step of a run that has not grown, which `train_step` then finds compiled.

        Args:
          batch: its shapes and placement.
          teacher: as of `train_step`.
        """
        self._step().lower(self._run.abstract, batch, teacher).compile()

    @property
    def rows(self) -> int:
        """Of a step, over all devices and micro-batches."""
        return self._config.train.batch_size * 2**self.doublings

    def next_batch(self, stream: Iterator[Batch]) -> Batch:
        """The next rows of the data, on the devices."""
        parts = [next(stream) for _ in range(2**self.doublings)]
        batch = parts[0]
        if len(parts) > 1:
            batch = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
        return global_batch(self._run.mesh, batch, self.rows)

    def train_step(
        self,
        state: TrainState,
        batch: Batch,
        teacher: Teacher | None = None,
    ) -> tuple[TrainState, dict[str, Array]]:
        """A step over such a batch."""
        return self._step()(state, batch, teacher)

    def _step(self) -> jax.stages.Wrapped:
        """The step over batches of this size."""
        if self.doublings not in self._steps:
            factor = 2**self.doublings
            train = self._config.train
            grown = dataclasses.replace(
                train,
                batch_size=factor * train.batch_size,
                accumulation_steps=factor * train.accumulation_steps,
            )
            config = dataclasses.replace(self._config, train=grown)
            self._steps[self.doublings] = jit_train_step(
                config,
                self._run.tx,
                self._run.shardings,
                self._options,
            )
        return self._steps[self.doublings]

    def grown(self, state: TrainState, metrics: dict[str, Array]) -> TrainState:
        """The state, with the size of the next batches: the norm test of this step's gradient.

        Reading the metrics waits for the step.
        """
        eta = self._config.train.grow_batches
        if self.doublings >= self._most:
            return state
        more = doublings_needed(
            float(metrics[VARIANCE]),
            float(metrics["grad_norm"]) ** 2,
            eta,
            self._most - self.doublings,
        )
        if not more:
            return state
        self.doublings += more
        return dataclasses.replace(state, opt_state=with_doublings(state.opt_state, self.doublings))
