"""One run of a study: a cell and a seed -> a trained model and the values measured of it."""

import dataclasses
import math
import time
from collections.abc import Iterator

import jax

from gatedjax.data import batches, load_tokenizer, make_dataset
from gatedjax.data.recall import recall_dataset
from gatedjax.sharding import global_batch, my_rows
from gatedjax.study.grid import Cell, Study
from gatedjax.study.measures import MEASURES, RecallValidation
from gatedjax.training.run import Run, fresh_state, prepare, with_vocab
from gatedjax.training.step import TrainState, jit_train_step, params_for_evaluation

LOOK_EVERY = 25  # steps between looks at the loss


@dataclasses.dataclass
class Trained:
    """A model at the end of its run. `metrics`: of the last step looked at, as plain numbers."""

    cell: Cell
    run: Run
    params: dict
    steps: int
    metrics: dict[str, float]


def run_cell(cell: Cell, seed: int, study: Study) -> dict[str, float]:
    """Trains and measures: {"steps", "seconds", "diverged", ...}. A run that diverges has NaN for
    all measures.
    """
    start = time.monotonic()
    trained = train(seeded(cell, seed), study.stop_at)
    values: dict[str, float] = {"steps": trained.steps, "diverged": float(_diverged(trained))}
    with jax.set_mesh(trained.run.mesh):
        for name in () if _diverged(trained) else study.measures:
            values |= MEASURES[name](trained)
    return values | {"seconds": time.monotonic() - start}


def seeded(cell: Cell, seed: int) -> Cell:
    """The cell with every random choice drawn from `seed`: parameters, order of the text, the
    task's examples.
    """
    c, change = cell.config, dataclasses.replace
    c = change(c, train=change(c.train, seed=seed), data=change(c.data, seed=seed))
    if cell.recall is not None:  # its tokens are numbers
        c = change(c, model=change(c.model, vocab_size=cell.recall.vocab_size))
        return change(cell, config=c, recall=change(cell.recall, seed=seed))
    return change(cell, config=with_vocab(c, load_tokenizer(c.data.tokenizer)))


def train(cell: Cell, stop_at: float | None = None) -> Trained:
    """The training loop without checkpoints. Ends early when no step is good any more, or at
    accuracy `stop_at`.
    """
    run = prepare(cell.config)
    c = run.config.train
    with jax.set_mesh(run.mesh):
        state, step_fn = fresh_state(run), jit_train_step(run.config, run.tx, run.shardings)
        recall = (
            RecallValidation(cell.recall, run)
            if cell.recall is not None and stop_at is not None
            else None
        )
        metrics: dict[str, float] = {}
        for step, batch in enumerate(_stream(cell, run), start=1):
            state, on_device = step_fn(state, global_batch(run.mesh, batch, c.batch_size))
            if step % LOOK_EVERY == 0 or step == c.steps:
                metrics = {name: float(x) for name, x in on_device.items() if x.ndim == 0}
                if _stuck(run, metrics) or not math.isfinite(metrics["loss"]) or step == c.steps:
                    break
            if (
                recall is not None
                and step % c.eval_every == 0
                and recall(_params(state)).accuracy >= stop_at
            ):
                break
        return Trained(cell, run, _params(state), step, metrics)


def _stream(cell: Cell, run: Run) -> Iterator:
    data, size = run.config.data, run.config.train.batch_size
    rows = my_rows(run.mesh, size)
    if cell.recall is not None:
        return batches(recall_dataset(cell.recall, "train", batch_size=size, rows=rows))
    return batches(make_dataset(data, "train", batch_size=size, rows=rows, seed=data.seed))


def _params(state: TrainState) -> dict:
    return params_for_evaluation(state)


def _diverged(trained: Trained) -> bool:
    """Worse than guessing, no number at all, or no step that could be taken any more."""
    guessing = math.log(trained.run.config.model.vocab_size)
    return (
        _stuck(trained.run, trained.metrics)
        or not trained.metrics.get("loss", 0.0) <= guessing + 1.0
    )


def _stuck(run: Run, metrics: dict[str, float]) -> bool:
    return metrics.get("skipped_in_a_row", 0.0) > run.config.optim.max_skips
