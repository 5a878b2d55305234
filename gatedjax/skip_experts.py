"""Skips experts that a trained model can do without, and says what that costs (MoDES).

    python -m gatedjax.skip_experts --checkpoint=runs/tiny_moe --skip=0.25,0.5 [--second_kind='\\s']

On one batch of validation text it finds how much each sparse layer matters (importances) and, for
each fraction of --skip, thresholds: chosen experts of which importance x score is below do not run.
With --second_kind tokens whose text matches the pattern have a threshold of their own, and the best
pair is searched for along the frontier of pairs that skip enough. What it gives is measured on
other batches: table.md and table.json in --out. With --workdir the last row's thresholds and
importances are a run of their own. docs/layers/sparse_moe.md says more.
"""

import json
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from gatedjax.config import Config
from gatedjax.data import Batch, load_tokenizer
from gatedjax.data.tokenizer import Tokenizer
from gatedjax.errors import InputError, require
from gatedjax.evaluation.expert_skipping import Outcome, Skipping
from gatedjax.evaluation.learning import held_out_text
from gatedjax.evaluation.restore import require_text, restore_params
from gatedjax.evaluation.skipping_model import Thresholds, with_importance, with_thresholds
from gatedjax.layers.tree import flatten_dict
from gatedjax.paths import Place, expand
from gatedjax.reporting.console import say
from gatedjax.runtime import cli, launch
from gatedjax.training import made_run
from gatedjax.training.run_directory import plain_errors

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run directory, as --workdir of train.py.")
_OUT = flags.DEFINE_string("out", None, "Folder of the table; default: CHECKPOINT/skipping.")
_SKIP = flags.DEFINE_list(
    "skip", ["0.25", "0.5", "0.75"], "Fractions of chosen experts to be skipped, each a row."
)
_SECOND_KIND = flags.DEFINE_string(
    "second_kind", None, "A pattern: tokens whose text matches it have a threshold of their own."
)
_LEVELS = flags.DEFINE_integer(
    "levels", 11, "With --second_kind: thresholds of each kind that are tried.", lower_bound=2
)
_BATCHES = flags.DEFINE_integer(
    "batches", 8, "Validation batches to measure on, after the one to calibrate.", lower_bound=1
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run directory for the model with the last row's thresholds."
)
_TRUST = flags.DEFINE_bool(
    "trust_paths", False, "Use the paths in a checkpoint that somebody else wrote."
)


class Row(NamedTuple):
    """A row of the table.

    how: the thresholds are found.
    skip: the fraction wanted.
    tried: pairs of thresholds that were measured for it.
    """

    how: str
    skip: float
    thresholds: Thresholds
    tried: int
    outcome: Outcome


def main(_) -> None:
    """Restore -> calibrate -> search -> measure."""
    checkpoint = expand(cli.required(_CHECKPOINT), "--checkpoint")
    folder = checkpoint / "skipping" if _OUT.value is None else expand(_OUT.value, "--out")
    rates = _fractions()
    workdir = None
    if _WORKDIR.value is not None:
        workdir = expand(_WORKDIR.value, "--workdir").absolute()
        made_run.require_new(workdir)
    launch.start()
    run, params, _ = restore_params(checkpoint, trust_paths=_TRUST.value)
    require_text(run)
    tokenizer = load_tokenizer(run.config.data.tokenizer, run.config.data.end_of_document)
    second_kind = _ids_of(tokenizer, _SECOND_KIND.value)
    with jax.set_mesh(run.mesh):
        skipping = Skipping(run.config.model, params, second_kind, run.config.data.seq_len)
        calibration, *others = held_out_text(run, _BATCHES.value + 1, least=2)
        skipping.calibrate(calibration)
        numbers = ", ".join(f"{x:.4f}" for x in skipping.importances)
        say(f"importances of the sparse layers, nats: {numbers}")
        nothing = Thresholds(0.0, 0.0)
        rows = [Row("whole model", 0.0, nothing, 0, skipping.measure(others, nothing))]
        for rate in rates:
            rows += _rows(skipping, calibration, others, rate)
    _write(folder, rows, skipping.importances, second_kind)
    if workdir is not None:
        _save(workdir, run.config, params, rows[-1], skipping, checkpoint, second_kind)


def _fractions() -> list[float]:
    """Of --skip."""
    try:
        numbers = [float(value) for value in _SKIP.value]
    except ValueError:
        numbers = []
    is_good = bool(numbers) and all(0 < number <= 1 for number in numbers)
    expected = "fractions above 0 and at most 1, such as 0.25,0.5"
    require(is_good, "--skip", ",".join(_SKIP.value), expected)
    return numbers


def _ids_of(tokenizer: Tokenizer, pattern: str | None) -> tuple[int, ...]:
    """The tokens whose text matches a pattern; none without one."""
    if pattern is None:
        return ()
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"--second_kind: got {pattern!r}, expected a pattern: {error}") from None
    ids = range(tokenizer.vocab_size)
    found = tuple(i for i in ids if compiled.search(tokenizer.decode([i])))
    require(
        0 < len(found) < tokenizer.vocab_size,
        "--second_kind",
        pattern,
        f"a pattern that some tokens match and others do not, here {len(found)} do",
    )
    return found


def _rows(
    skipping: Skipping,
    calibration: Batch,
    others: list[Batch],
    rate: float,
) -> list[Row]:
    """For one fraction: layers alike, one threshold for importances, and one for either kind.

    Args:
      skipping: the model.
      calibration: the text to search on.
      others: the text to measure on.
      rate: the fraction.
    """
    alike = np.ones_like(skipping.importances)
    rows = []
    for how, importances in [("layers alike", alike), ("importances", None)]:
        found = skipping.one_threshold(calibration, rate, importances)
        outcome = skipping.measure(others, found, importances)
        rows.append(Row(how, rate, found, 1, outcome))
    if skipping.kinds == 2:
        best = skipping.search(calibration, rate, _LEVELS.value)
        outcome = skipping.measure(others, best.thresholds)
        rows.append(Row("two thresholds", rate, best.thresholds, best.tried, outcome))
    return rows


def _write(
    folder: Place,
    rows: list[Row],
    importances: np.ndarray,
    second_kind: tuple[int, ...],
) -> None:
    """table.md and table.json.

    Args:
      folder: where to.
      rows: of the table.
      importances: of the sparse layers.
      second_kind: token ids.
    """
    columns = ["thresholds", "to skip", "loss", "accuracy", "KL", "experts a token", "MFLOP"]
    columns += ["skipped, first kind", "second kind", "pairs tried"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    records = []
    for row in rows:
        o = row.outcome
        cells = [row.how, f"{row.skip:g}", f"{o.loss:.4f}", f"{o.accuracy:.4f}"]
        cells += [f"{o.divergence:.4f}", f"{o.experts:.2f}", f"{o.flops / 1e6:.3f}"]
        cells += [f"{o.skipped[0]:.2f}", f"{o.skipped[1]:.2f}" if second_kind else ""]
        lines.append(f"| {' | '.join([*cells, str(row.tried or '')])} |")
        records.append(
            {
                "how": row.how,
                "skip": row.skip,
                "thresholds": row.thresholds,
                "tried": row.tried,
                **o._asdict(),
            }
        )
    body: dict[str, Any] = {
        "importances": [float(x) for x in importances],
        "second_kind": second_kind,
        "rows": records,
    }
    text = "\n".join(lines) + "\n"
    with plain_errors(f"could not write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(text)
        (folder / "table.json").write_text(json.dumps(body, indent=2) + "\n")
    say(text)


def _save(
    workdir: Place,
    config: Config,
    params: Any,
    row: Row,
    skipping: Skipping,
    checkpoint: Place,
    second_kind: tuple[int, ...],
) -> None:
    """A run of the model that skips as a row says.

    Args:
      workdir: where to.
      config: of the trained run.
      params: of it.
      row: with the thresholds.
      skipping: with the importances.
      checkpoint: the trained run.
      second_kind: token ids.
    """
    model = with_thresholds(config.model, second_kind, row.thresholds)
    # Importances over thresholds of 1 are importances.
    state = skipping.state(Thresholds(1.0, 1.0))
    given = flatten_dict(with_importance(model, params)) | flatten_dict(state)
    made_run.save(workdir, made_run.with_model(config, model), given, checkpoint)
    say(f"the model that skips experts is {workdir}")


def run() -> None:
    """The command: parses the flags, then calls `main`."""
    cli.run(main)


if __name__ == "__main__":
    run()
