"""Makes the MLPs of a trained model adaptive: every token has as many learners as it needs.

    python -m gatedjax.make_adaptive --checkpoint=runs/base --workdir=runs/adaptive --budget=0.5

The three stages of adaptive computation modules (arXiv 2312.10193): learners are distilled, gates
are taught how many of them are enough, and the whole model learns, once for each --budget, the
fraction of the learners that it is to use. WORKDIR/budget_0.5 and so on are runs; quality against
FLOPs spent is in WORKDIR/table.md and table.json. docs/layers/on_demand.md says what is done.
"""

import dataclasses
import json
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from gatedjax.config import Config, ModelConfig
from gatedjax.errors import require
from gatedjax.evaluation import learner_stages as stages
from gatedjax.evaluation.learning import followed, training_text
from gatedjax.evaluation.restore import require_text, restore_params
from gatedjax.evaluation.spent import Spent, spent
from gatedjax.layers.tree import flatten_dict, unflatten_dict
from gatedjax.paths import Place, expand
from gatedjax.reporting.console import say
from gatedjax.runtime import cli, launch
from gatedjax.training import made_run
from gatedjax.training.run_directory import plain_errors

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run directory, as --workdir of train.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs and of the table.")
_LEARNERS = flags.DEFINE_integer("learners", 4, "Of each MLP.", lower_bound=1)
_BUDGET = flags.DEFINE_list(
    "budget", ["0.25", "0.5", "0.75"], "Fractions of the learners to be used, each a run."
)
_BUDGET_LOSS = flags.DEFINE_float(
    "budget_loss", 0.1, "Weight of the distance from the budget, in stage 3.", lower_bound=0.0
)
_STEPS = flags.DEFINE_list("steps", ["200", "100", "200"], "Of each of the three stages.")
_LR = flags.DEFINE_list("lr", ["0.001", "0.01", "0.001"], "Learning rate of each stage.")
_BATCHES = flags.DEFINE_integer("batches", 8, "Validation batches to measure on.", lower_bound=1)
_TRUST = flags.DEFINE_bool(
    "trust_paths", False, "Use the paths in a checkpoint that somebody else wrote."
)


class Row(NamedTuple):
    """A row of the table."""

    model: str
    spent: Spent


def main(_) -> None:
    """Restore -> distill -> teach the gates -> train for each budget -> measure."""
    checkpoint = expand(cli.required(_CHECKPOINT), "--checkpoint")
    workdir = expand(cli.required(_WORKDIR), "--workdir").absolute()
    budgets = _numbers("--budget", _BUDGET.value, None)
    steps = [int(number) for number in _numbers("--steps", _STEPS.value, 3)]
    rates = _numbers("--lr", _LR.value, 3)
    places = {budget: workdir / f"budget_{budget:g}" for budget in budgets}
    for place in places.values():
        made_run.require_new(place)
    launch.start()
    run, params, _ = restore_params(checkpoint, trust_paths=_TRUST.value)
    require_text(run)
    dense = run.config.model
    models = {
        b: stages.adaptive_model(dense, _LEARNERS.value, b, _BUDGET_LOSS.value) for b in budgets
    }
    adaptive = models[budgets[0]]
    with jax.set_mesh(run.mesh):
        rows = [Row("dense", spent(run, dense, params, _BATCHES.value))]
        stream = training_text(run)
        start = stages.from_dense(adaptive, params, run.config.train.seed)

        def learners_loss(learning: Any, params: Any, batch: Any) -> Any:
            return stages.learners_loss(learning, params, batch, dense, adaptive)

        learners, loss = followed(learners_loss, start, stream, steps[0], rates[0], params)
        say(f"stage 1, learners: loss {loss:.4f} of their outputs' mean squares")

        def gates_loss(gates: Any, learners: Any, params: Any, batch: Any) -> Any:
            return stages.gates_loss(gates, learners, params, batch, dense, adaptive)

        gates = {layer: own["learner_gate"] for layer, own in learners.items()}
        gates, loss = followed(gates_loss, gates, stream, steps[1], rates[1], learners, params)
        say(f"stage 2, gates: loss {loss:.4f}")
        for layer, gate in gates.items():
            learners[layer]["learner_gate"] = gate
        given = stages.whole(adaptive, params, learners)
        rows.append(
            Row("gates taught", spent(run, adaptive, unflatten_dict(given), _BATCHES.value))
        )
    tuned = stages.trained(_run_config(run.config, dense, steps[2], rates[2]), flatten_dict(params))
    with jax.set_mesh(run.mesh):
        rows.append(
            Row("dense, stage 3's steps", spent(run, dense, unflatten_dict(tuned), _BATCHES.value))
        )
    for budget, model in models.items():
        config = _run_config(run.config, model, steps[2], rates[2])
        found = stages.trained(config, given)
        made_run.save(places[budget], config, found, checkpoint)
        with jax.set_mesh(run.mesh):
            of_budget = spent(run, model, unflatten_dict(found), _BATCHES.value)
        rows.append(Row(f"budget {budget:g}", of_budget))
        say(f"stage 3, budget {budget:g}: {places[budget]}")
    _write(workdir, rows)


def _numbers(flag: str, values: list[str], count: int | None) -> list[float]:
    """Numbers of a flag: three, one for each stage, or fractions."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        numbers = []
    if count is None:
        is_good = bool(numbers) and all(0 < number <= 1 for number in numbers)
        expected = "fractions above 0 and at most 1, such as 0.25,0.5"
    else:
        is_good = len(numbers) == count and all(number > 0 for number in numbers)
        expected = f"{count} numbers above 0, one for each stage"
    require(is_good, flag, ",".join(values), expected)
    return numbers


def _run_config(config: Config, model: ModelConfig, steps: int, rate: float) -> Config:
    """Of stage 3.

    Args:
      config: of the trained run.
      model: that learns.
      steps: of the stage.
      rate: its learning rate.
    """
    config = made_run.with_model(config, model)
    warmup = min(config.optim.warmup_steps, steps // 10)
    return dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, lr=rate, warmup_steps=warmup),
        train=dataclasses.replace(config.train, steps=steps),
    )


def _write(workdir: Place, rows: list[Row]) -> None:
    """table.md and table.json."""
    lines = [
        "| model | loss | accuracy | learners a token | MFLOP a token | of the dense one |",
        "|---|---|---|---|---|---|",
    ]
    dense = rows[0].spent
    for row in rows:
        m = row.spent
        learners = "" if np.isnan(m.had) else f"{m.had:.2f}"
        cells = [row.model, f"{m.loss:.4f}", f"{m.accuracy:.4f}", learners]
        cells += [f"{m.flops / 1e6:.3f}", f"{m.flops / dense.flops:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    records = [{"model": row.model, **row.spent._asdict()} for row in rows]
    for record in records:
        had = record.pop("had")
        record["learners"] = None if np.isnan(had) else had
    text = "\n".join(lines) + "\n"
    with plain_errors(f"could not write to {workdir}"):
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "table.md").write_text(text)
        (workdir / "table.json").write_text(json.dumps({"rows": records}, indent=2) + "\n")
    say(text)


def run() -> None:
    """The command: parses the flags, then calls `main`."""
    cli.run(main)


if __name__ == "__main__":
    run()
