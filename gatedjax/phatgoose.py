"""PHATGOOSE (arXiv 2402.05859) from end to end: an expert for each text, then its gate, then all.

    python -m gatedjax.phatgoose --from=runs/base --texts=a=a/,b=b/ --workdir=runs/phatgoose

The base is a run directory with gated MLPs; a text is a name and a file or folder. Each expert and
each gate is a run of its own (`configs/phatgoose.py`), WORKDIR/expert_a and WORKDIR/gate_a; then
`gatedjax.stack_experts` makes WORKDIR/stacked. The validation losses of the base, of every expert
by itself and of the stack, each on every text and on the base's own, go to WORKDIR/table.md and
table.json. Started again, it goes on where it was.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags

from gatedjax.config import DataConfig
from gatedjax.evaluation.restore import RestoredRun, restore_params
from gatedjax.evaluation.validation import Validation
from gatedjax.paths import expand
from gatedjax.reporting.console import say
from gatedjax.reporting.stages import (
    last_validation,
    of_stages,
    require_pairs,
    run_stage,
    write_tables,
)
from gatedjax.reporting.texts import parsed_texts
from gatedjax.runtime import cli, launch
from gatedjax.training.step_folders import has_steps

PHASES = ("expert", "gate")
OF_BASE = "base"

_FROM = flags.DEFINE_string("from", None, "Run directory of the base.")
_TEXTS = flags.DEFINE_list("texts", [], "NAME=PATH of each expert's text, two or more.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs and of the table.")
_STEPS = flags.DEFINE_list("steps", [], "Steps of expert, gate; default: the configuration's.")
_LR = flags.DEFINE_list("lr", [], "Learning rates of expert, gate; default: the configuration's.")
_TOP = flags.DEFINE_integer("top", 2, "Experts of a token in the stack.", lower_bound=1)
_SET = flags.DEFINE_multi_string(
    "set", [], "A key of all runs: --set=train.batch_size=4; may be given more than once."
)


def main(_) -> None:
    """Expert and gate of each text -> the stack -> everything on every text."""
    source = expand(cli.required(_FROM), "--from")
    workdir = expand(cli.required(_WORKDIR), "--workdir")
    texts = parsed_texts(_TEXTS.value, OF_BASE)
    steps = of_stages("--steps", _STEPS.value, len(PHASES))
    rates = of_stages("--lr", _LR.value, len(PHASES))
    require_pairs("--set", _SET.value)
    for name, path in texts.items():
        before = source
        for i, phase in enumerate(PHASES):
            place = workdir / f"{phase}_{name}"
            arguments = [
                f"--config=phatgoose:{phase}={before}",
                f"--workdir={place}",
                "--config.data.sources.main.kind=text",
                f"--config.data.sources.main.path={path}",
            ]
            if steps:
                arguments.append(f"--config.train.steps={steps[i]}")
            if rates:
                arguments.append(f"--config.optim.lr={rates[i]}")
            arguments += [f"--config.{key}" for key in _SET.value]
            run_stage(f"{phase} of {name}: {place}", "gatedjax.train", *arguments)
            last_validation(place)
            before = place
    gates = [workdir / f"gate_{name}" for name in texts]
    stack = workdir / "stacked"
    if not has_steps(stack):
        runs = ",".join(map(str, gates))
        arguments = [f"--runs={runs}", f"--workdir={stack}", f"--top={_TOP.value}"]
        run_stage(f"the stack: {stack}", "gatedjax.stack_experts", *arguments)
    launch.start()
    places = {OF_BASE: source}
    places |= {f"expert {name}": workdir / f"expert_{name}" for name in texts}
    places["stacked"] = stack
    restored = {name: restore_params(place) for name, place in places.items()}
    data = {name: restored[f"expert {name}"].run.config.data for name in texts}
    data[OF_BASE] = restored[OF_BASE].run.config.data
    rows = losses(restored, data)
    text = table(rows, _TOP.value)
    write_tables(workdir, text, {"top": _TOP.value, "rows": rows})
    say(text)


def losses(
    restored: Mapping[str, RestoredRun],
    data: Mapping[str, DataConfig],
) -> list[dict[str, Any]]:
    """The validation loss of every model on every text, nats per token.

    Args:
      restored: the models by name.
      data: the texts by name.
    """
    rows = []
    for model, (run, params, _) in restored.items():
        row: dict[str, Any] = {"model": model}
        for text, own in data.items():
            config = dataclasses.replace(run.config, data=own)
            with jax.set_mesh(run.mesh):
                validation = Validation(run._replace(config=config), config.train.eval_batches)
                row[text] = validation(params).loss
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], top: int) -> str:
    """What `losses` found, to read; the mean is over the experts' texts.

    Args:
      rows: of `losses`.
      top: experts of a token in the stack.
    """
    texts = [name for name in rows[0] if name not in ("model", OF_BASE)]
    columns = [*texts, "mean", "the base's text"]
    lines = [
        f"Validation loss, nats per token; the stack sends a token to {top} of {len(texts)}.",
        "",
        f"| model | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in rows:
        of_texts = [row[name] for name in texts]
        values = [*of_texts, sum(of_texts) / len(texts), row[OF_BASE]]
        lines.append(f"| {row['model']} | {' | '.join(f'{value:.3f}' for value in values)} |")
    return "\n".join(lines) + "\n"


def run() -> None:
    """The command: parses the flags, then calls `main`."""
    cli.run(main)


if __name__ == "__main__":
    run()
