"""One run of a study: a cell and a seed -> a trained model and the values measured of it."""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gatedjax.data import BatchIterator, batches, load_tokenizer, make_dataset
from gatedjax.data.recall import recall_dataset
from gatedjax.data.tokenizer import Tokenizer
from gatedjax.errors import require
from gatedjax.layers.tree import Path
from gatedjax.reporting.console import say
from gatedjax.sharding import global_batch, my_rows
from gatedjax.study.grid import Cell, Study
from gatedjax.study.measures import MEASURES, RecallValidation
from gatedjax.study.trained import Trained
from gatedjax.training import given_teacher, given_weights
from gatedjax.training.memory import require_memory
from gatedjax.training.run import Run, fresh_state, prepare, with_vocab
from gatedjax.training.state import params_for_evaluation
from gatedjax.training.step import jit_train_step

READ_EVERY = 25  # steps: reading the metrics waits for the device


def run_cell(cell: Cell, seed: int, study: Study) -> dict[str, float]:
    """Trains and measures: {"steps", "seconds", "diverged", ...}.

    A run that diverges has no value for any measure.
    """
    start = time.monotonic()
    if cell.experiment is not None:
        values = {"diverged": 0.0, **cell.experiment(seed)}
        return {**values, "seconds": time.monotonic() - start}
    trained = train(seeded(cell, seed), study.stop_at)
    diverged = _diverged(trained)
    values = {"steps": float(trained.steps), "diverged": float(diverged)}
    if not diverged:
        with jax.set_mesh(trained.run.mesh):
            for name in study.measures:
                measure = MEASURES[name]
                values.update(measure(trained))
    values["seconds"] = time.monotonic() - start
    return values


def seeded(cell: Cell, seed: int) -> Cell:
    """The cell with every random choice drawn from `seed`.

    These are the parameters, the order of the text and the task's examples. The vocabulary is
    settled too.
    """
    config = dataclasses.replace(
        cell.config,
        train=dataclasses.replace(cell.config.train, seed=seed),
        data=dataclasses.replace(cell.config.data, seed=seed),
    )
    if config.model.task == "classify":
        # Its classes are the configuration's.
        return dataclasses.replace(cell, config=config)
    if cell.recall is None:
        config = with_vocab(
            config, load_tokenizer(config.data.tokenizer, config.data.end_of_document)
        )
        return dataclasses.replace(cell, config=config)
    # A task's tokens are numbers: there is no tokenizer.
    model = dataclasses.replace(config.model, vocab_size=cell.recall.vocab_size)
    return dataclasses.replace(
        cell,
        config=dataclasses.replace(config, model=model),
        recall=dataclasses.replace(cell.recall, seed=seed),
    )


def train(
    cell: Cell,
    stop_at: float | None = None,
    read_every: int = READ_EVERY,
    given: Mapping[Path, Array] | None = None,
) -> Trained:
    """The training loop without checkpoints.

    Ends early when no step is good any more, or at validation accuracy `stop_at` of a task.

    Args:
      cell: what is trained.
      stop_at: an accuracy.
      read_every: steps; each reading waits for the device.
      given: the parameters to begin with, by path, in place of those of the configuration.
    """
    growing = cell.config.train.grow_batches
    require(growing == 0, "train.grow_batches", growing, "0 in a study, whose batches do not grow")
    run = prepare(cell.config)
    require_memory(run)
    config = run.config.train
    with jax.set_mesh(run.mesh):
        teaching = given_teacher.load(run, _tokenizer(cell), say)
        if given is None:
            weights = given_weights.find(run, _tokenizer(cell), say)
            given = given_weights.read(run, weights)
        else:
            # The state takes their memory over, and whoever gave them may still need them.
            given = {path: jnp.array(value) for path, value in given.items()}
        state = fresh_state(run, given)
        train_step = jit_train_step(run.config, run.tx, run.shardings)
        # Nothing is validated during training unless it may end early.
        recall = None
        if cell.recall is not None and stop_at is not None:
            recall = RecallValidation(cell.recall, run)
        stream = _stream(cell, run)
        metrics: dict[str, float] = {}
        # Steps and seconds at every reading.
        readings: list[tuple[int, float]] = []
        history: list[tuple[int, dict[str, float]]] = []
        step = 0
        while step < config.steps:
            step += 1
            batch = global_batch(run.mesh, next(stream), config.batch_size)
            state, on_device = train_step(state, batch, teaching)
            if step % read_every == 0 or step == config.steps:
                metrics = _scalars(on_device)
                history.append((step, metrics))
                readings.append((step, time.monotonic()))
                # A loss that is no number, or only skipped steps: the run has diverged.
                if _is_stuck(run, metrics) or not math.isfinite(metrics["loss"]):
                    break
            if recall is None or stop_at is None or step == config.steps:
                continue
            if step % config.eval_every == 0:
                accuracy = recall(params_for_evaluation(state)).accuracy
                if accuracy >= stop_at:
                    break
        return Trained(
            cell=cell,
            run=run,
            params=params_for_evaluation(state),
            steps=step,
            metrics=metrics,
            history=history,
            step_ms=_step_ms(readings),
        )


def _step_ms(readings: Sequence[tuple[int, float]]) -> float:
    """The mean time of the steps between the first reading and the last; NaN where it is one."""
    if len(readings) < 2:
        return math.nan
    (first_step, first_time), *_, (last_step, last_time) = readings
    return 1e3 * (last_time - first_time) / (last_step - first_step)


def _tokenizer(cell: Cell) -> Tokenizer | None:
    """Of the cell's text; a task and images have none."""
    if cell.recall is not None or cell.config.model.task == "classify":
        return None
    return load_tokenizer(cell.config.data.tokenizer, cell.config.data.end_of_document)


def _stream(cell: Cell, run: Run) -> BatchIterator:
    """This process's rows of the training batches, without end."""
    data = run.config.data
    batch_size = run.config.train.batch_size
    rows = my_rows(run.mesh, batch_size)
    if cell.recall is not None:
        dataset = recall_dataset(
            cell.recall,
            "train",
            batch_size=batch_size,
            rows=rows,
        )
    else:
        dataset = make_dataset(
            data,
            "train",
            batch_size=batch_size,
            rows=rows,
            seed=data.seed,
            model=run.config.model,
        )
    return batches(dataset)


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(x) for name, x in metrics.items() if x.ndim == 0}


def _diverged(trained: Trained) -> bool:
    """Worse than guessing, no number at all, or no step that could be taken any more."""
    if _is_stuck(trained.run, trained.metrics):
        return True
    model = trained.run.config.model
    # Of other losses than cross-entropy no value is too much.
    if model.output.kind in ("spherical", "sphereface2", "fourier"):
        return not math.isfinite(trained.metrics.get("loss", 0.0))
    guessing = math.log(model.vocab_size)
    loss = trained.metrics.get("loss", 0.0)
    # Not `loss > ...`: NaN has diverged.
    return not loss <= guessing + 1.0


def _is_stuck(run: Run, metrics: Mapping[str, float]) -> bool:
    return metrics.get("skipped_in_a_row", 0.0) > run.config.optim.max_skips
