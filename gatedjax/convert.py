"""Converts the attention of a trained model into a recurrence, in stages, and says what each gave.

    python -m gatedjax.convert --from=runs/teacher --to=lizard --workdir=runs/lizard

The model is a run directory with gated attention, also an imported one. Each stage is a run of its
own (`configs/convert_*.py`), WORKDIR/stage_1 and so on; the last one is the converted model. The
losses on validation text, of the teacher and after each stage, go to WORKDIR/table.md and
table.json. Started again, it goes on where it was. docs/conversions.md says what is done.
"""

from pathlib import Path
from typing import Any

import jax
from absl import flags

from gatedjax.config import from_config_dict
from gatedjax.data import load_tokenizer
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
from gatedjax.runtime import cli, launch
from gatedjax.training import given_teacher
from gatedjax.training.checkpoint import read_config
from gatedjax.training.run import prepare

# Stages of a conversion, and which of them learn from the teacher.
STAGES = {
    "lizard": (2, (1,)),
    "rad_rwkv6": (3, (1, 2)),
    "rad_rwkv7": (3, (1, 2)),
}

_FROM = flags.DEFINE_string("from", None, "Run directory of the model to convert.")
_TO = flags.DEFINE_enum("to", None, list(STAGES), "What its attention becomes.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the stages and of the table.")
_STEPS = flags.DEFINE_list("steps", [], "Steps of each stage; default: the configuration's.")
_LR = flags.DEFINE_list("lr", [], "Learning rate of each stage; default: the configuration's.")
_SET = flags.DEFINE_multi_string(
    "set", [], "A key of all stages: --set=train.batch_size=4; may be given more than once."
)
_WITHOUT = flags.DEFINE_bool(
    "without_stage_1",
    False,
    "Also the later stages alone, from the teacher's weights: for the table.",
)


def main(_) -> None:
    """A run for each stage -> the teacher's own loss -> the table."""
    source = expand(cli.required(_FROM), "--from")
    kind = cli.required(_TO)
    workdir = expand(cli.required(_WORKDIR), "--workdir")
    count, with_teacher = STAGES[kind]
    steps = of_stages("--steps", _STEPS.value, count)
    rates = of_stages("--lr", _LR.value, count)
    require_pairs("--set", _SET.value)

    def train_stage(number: int, before: Path, place: Path) -> None:
        teacher = f",{source}" if number in with_teacher and number > 1 else ""
        arguments = [
            f"--config=convert_{kind}:{number}={before}{teacher}",
            f"--workdir={place}",
        ]
        if steps:
            arguments.append(f"--config.train.steps={steps[number - 1]}")
        if rates:
            arguments.append(f"--config.optim.lr={rates[number - 1]}")
        arguments += [f"--config.{key}" for key in _SET.value]
        run_stage(f"stage {number}: {place}", "gatedjax.train", *arguments)

    rows = []
    before = source
    for number in range(1, count + 1):
        place = workdir / f"stage_{number}"
        train_stage(number, before, place)
        rows.append(_row(f"stage {number}", place))
        before = place
    if _WITHOUT.value:
        before = source
        for number in range(2, count + 1):
            place = workdir / f"stage_{number}_without_1"
            train_stage(number, before, place)
            rows.append(_row(f"stage {number} without stage 1", place))
            before = place
    launch.start()
    rows.insert(0, {"model": "teacher", "loss": teachers_loss(workdir / "stage_1")})
    write_table(workdir, kind, rows)
    say(f"the converted model is {workdir / f'stage_{count}'}")


def _row(name: str, place: Path) -> dict[str, Any]:
    """A line of the table."""
    return {"model": name, **last_validation(place)}


def teachers_loss(first_stage: Path) -> float:
    """The teacher's loss on the validation text of the first stage, nats per token."""
    config = from_config_dict(read_config(first_stage))
    run = prepare(config)
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.end_of_document)
    teacher = given_teacher.load(run, tokenizer, say)
    assert teacher is not None
    as_teacher = run._replace(config=given_teacher.with_model(config, teacher.model))
    with jax.set_mesh(run.mesh):
        validation = Validation(as_teacher, config.train.eval_batches)
        return validation(teacher.params).loss


def write_table(workdir: Path, kind: str, rows: list[dict[str, Any]]) -> None:
    """table.json, and the same to read."""
    lines = [
        f"Validation loss, nats per token; conversion into {kind}.",
        "",
        "| model | loss | above the teacher | steps | rows |",
        "|---|---|---|---|---|",
    ]
    teacher = rows[0]["loss"]
    for row in rows:
        above = "" if row is rows[0] else f"{row['loss'] - teacher:+.3f}"
        cells = [row["model"], f"{row['loss']:.3f}", above]
        cells += [str(row.get(name, "")) for name in ("steps", "rows")]
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    write_tables(workdir, text, {"to": kind, "rows": rows})
    say(text)


def run() -> None:
    """The command: parses the flags, then calls `main`."""
    cli.run(main)


if __name__ == "__main__":
    run()
