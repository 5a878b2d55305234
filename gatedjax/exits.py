"""Early exits for a trained model: learned, calibrated, measured, and used to generate.

    python -m gatedjax.exits --checkpoint=runs/tiny --out=runs/tiny/exits [--prompt="def "]

Exits are learned on its training text; thresholds are found on one half of its validation batches,
and quality against FLOPs is measured on the other. In the folder: exits.npz (parameters and
thresholds), table.md and table.json. The model stays as it is, but for --decide=depth, which trains
it further together with its exits (OUT/model is that run). docs/exits.md says what is done.
"""

import json
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jaxtyping import PyTree

from gatedjax.data import load_tokenizer
from gatedjax.errors import require
from gatedjax.evaluation import exits as early
from gatedjax.evaluation.early_exit import EarlyExit, Generated, require_simple
from gatedjax.evaluation.exit_learning import Learning, learned, learned_depth, trained_parent
from gatedjax.evaluation.exit_measuring import Said, halves_of
from gatedjax.evaluation.exits import DepthGate, Exits
from gatedjax.evaluation.restore import require_text, restore_params
from gatedjax.layers.tree import flatten_dict
from gatedjax.paths import expand
from gatedjax.reporting.console import say
from gatedjax.runtime import cli, launch
from gatedjax.training import made_run
from gatedjax.training.run import Run
from gatedjax.training.run_directory import plain_errors

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run directory, as --workdir of train.py.")
_OUT = flags.DEFINE_string("out", None, "Folder of exits and table; default: CHECKPOINT/exits.")
_LAYERS = flags.DEFINE_list(
    "layers", [], "After how many layers an exit is: 2,4; default: after each but the last."
)
_DECIDE = flags.DEFINE_enum(
    "decide",
    "confidence",
    ["confidence", "gates", "depth"],
    "Thresholds on the likeliest token's probability, gates learned with the exits (JEI-DNN), or "
    "one gate that chooses the depth after the first exit's layer (ECO-M2F).",
)
_EPSILON = flags.DEFINE_list(
    "epsilon", ["0", "0.01", "0.02", "0.05"], "What an exit's best accuracy may lose, each a row."
)
_COST = flags.DEFINE_list(
    "cost",
    ["0.5", "1", "2"],
    "With gates, depth: nats that a whole forward pass is worth, each a row.",
)
_STEPS = flags.DEFINE_integer("steps", 200, "Steps of learning.", lower_bound=1)
_PHASE = flags.DEFINE_integer(
    "phase", 200, "With gates: batches between exits and gates.", lower_bound=1
)
_PARENT_STEPS = flags.DEFINE_integer(
    "parent_steps", 200, "With depth: steps of the model and its exits together.", lower_bound=1
)
_PARENT_LR = flags.DEFINE_float(
    "parent_lr", 1e-3, "With depth: learning rate of the model (Adam).", lower_bound=0.0
)
_LR = flags.DEFINE_float("lr", 1e-2, "Learning rate (Adam).", lower_bound=0.0)
_BATCHES = flags.DEFINE_integer(
    "batches", 8, "Validation batches to calibrate on, and as many to measure on.", lower_bound=1
)
_PROMPT = flags.DEFINE_string(
    "prompt", None, "Generate from it as each row says, and measure the CPU time."
)
_TOKENS = flags.DEFINE_integer("tokens", 64, "How many tokens to generate.", lower_bound=2)
_TRUST = flags.DEFINE_bool(
    "trust_paths", False, "Use the paths in a checkpoint that somebody else wrote."
)


class Row(NamedTuple):
    """A row of the table, with the exits and thresholds that it is of.

    depth: the gate that decides, where one does.
    generated: a continuation of the prompt, if there is one.
    """

    setting: float
    exits: Exits
    thresholds: np.ndarray
    outcome: early.Outcome
    depth: DepthGate | None = None
    generated: Generated | None = None


class Table(NamedTuple):
    """All that is measured.

    layers: after how many layers each exit is.
    full: what no exit taken gives.
    whole: the continuation of the prompt by the model as it is, if there is a prompt.
    """

    layers: tuple[int, ...]
    full: early.Outcome
    rows: list[Row]
    whole: Generated | None


def main(_) -> None:
    """Restore -> learn -> calibrate -> measure -> generate."""
    checkpoint = expand(cli.required(_CHECKPOINT), "--checkpoint")
    folder = checkpoint / "exits" if _OUT.value is None else expand(_OUT.value, "--out")
    by_cost = _DECIDE.value != "confidence"
    settings = _numbers(
        "--cost" if by_cost else "--epsilon", (_COST if by_cost else _EPSILON).value
    )
    by_depth = _DECIDE.value == "depth"
    if by_depth:
        made_run.require_new(folder / "model", "--out")
    launch.start()
    run, params, _ = restore_params(checkpoint, trust_paths=_TRUST.value)
    require_text(run)
    require_simple(run.config.model)
    layers = early.layers_of(_LAYERS.value, run.config.model)
    with jax.set_mesh(run.mesh):
        if by_depth:
            exits, params = trained_parent(
                run, params, layers, _PARENT_STEPS.value, _PARENT_LR.value, say
            )
            table = _by_depth(run, params, exits, layers, settings)
        else:
            table = _by_exit(run, params, layers, settings)
    if by_depth:
        made_run.save(folder / "model", run.config, flatten_dict(params), checkpoint)
    _write(folder, table)


def _numbers(flag: str, values: list[str]) -> list[float]:
    """Numbers of a flag, 0 or more, at least one."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        numbers = []
    is_good = bool(numbers) and all(0 <= number < np.inf for number in numbers)
    require(is_good, flag, ",".join(values), "numbers of 0 or more, such as 0,0.01")
    return numbers


def _learning() -> Learning:
    return Learning(_STEPS.value, _PHASE.value, _LR.value)


# --- the rows


def _by_exit(
    run: Run,
    params: PyTree,
    layers: tuple[int, ...],
    settings: list[float],
) -> Table:
    """Every exit decides for itself, by its confidence or by its gate.

    Args:
      run: of the model.
      params: of it.
      layers: after how many layers each exit is.
      settings: of the rows.
    """
    by_gate = _DECIDE.value == "gates"
    costs = early.exit_costs(run.config.model, run.config.data.seq_len, layers)
    rows = []
    exits = learned(run, params, layers, costs, settings[0] if by_gate else None, _learning(), say)
    halves = halves_of(run, params, exits, layers, _BATCHES.value)
    for setting in settings:
        # Thresholds are found for the same exits; gates are learned for each cost.
        if by_gate and rows:
            exits = learned(run, params, layers, costs, setting, _learning(), say)
            halves = halves_of(run, params, exits, layers, _BATCHES.value)
        thresholds, chosen = _thresholds(setting, halves, by_gate)
        rows.append(Row(setting, exits, thresholds, _outcome(chosen, halves[1], costs)))
    return _table(run, params, layers, rows, _at_the_end(halves[1], costs))


def _by_depth(
    run: Run,
    params: PyTree,
    exits: Exits,
    layers: tuple[int, ...],
    settings: list[float],
) -> Table:
    """A gate chooses the depth, learned for each cost.

    Args:
      run: of the model.
      params: of it.
      exits: trained with it.
      layers: after how many layers each exit is.
      settings: of the rows.
    """
    costs = early.depth_costs(run.config.model, run.config.data.seq_len, layers)
    never = np.full(len(layers), np.inf)
    rows = []
    measured = None
    for setting in settings:
        gate = learned_depth(run, params, exits, layers, costs, setting, _learning(), say)
        _, measured = halves_of(run, params, exits, layers, _BATCHES.value, gate)
        early.require_selecting(measured.depths, len(layers), f"--cost={setting}")
        outcome = _outcome(measured.depths, measured, costs)
        rows.append(Row(setting, exits, never, outcome, gate))
    assert measured is not None
    return _table(run, params, layers, rows, _at_the_end(measured, costs))


def _thresholds(
    setting: float,
    halves: tuple[Said, Said],
    by_gate: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Found on one half, and the exits that they choose on the other.

    Args:
      setting: of the row.
      halves: what the exits say of both.
      by_gate: whether gates decide.
    """
    calibration, measured = halves
    count = measured.gates.shape[1]
    if by_gate:
        thresholds = np.full(count, 0.5)
        chosen = early.chosen_exit(measured.gates, thresholds)
        key = f"--cost={setting}"
    else:
        is_right = calibration.is_right[:, :-1] > 0
        thresholds = early.calibrated(calibration.confidence, is_right, setting)
        chosen = early.chosen_exit(measured.confidence, thresholds)
        key = f"--epsilon={setting}"
    early.require_selecting(chosen, count, key)
    return thresholds, chosen


def _outcome(chosen: np.ndarray, measured: Said, costs: np.ndarray) -> early.Outcome:
    return early.outcome(chosen, measured.losses, measured.is_right > 0, costs)


def _at_the_end(measured: Said, costs: np.ndarray) -> early.Outcome:
    """No exit is taken."""
    return _outcome(np.full(len(measured.losses), len(costs) - 1), measured, costs)


def _table(
    run: Run,
    params: PyTree,
    layers: tuple[int, ...],
    rows: list[Row],
    full: early.Outcome,
) -> Table:
    """The rows, each with its continuation of the prompt if there is one.

    Args:
      run: of the model.
      params: of it.
      layers: after how many layers each exit is.
      rows: of the table.
      full: without an exit taken.
    """
    if _PROMPT.value is None:
        return Table(layers, full, rows, None)
    data = run.config.data
    tokenizer = load_tokenizer(data.tokenizer, data.end_of_document)
    ids = [int(token) for token in tokenizer.encode(_PROMPT.value)]
    require(len(ids) > 0, "--prompt", _PROMPT.value, "at least one token")
    model = run.config.model
    # The model as it is: it looks at no exit.
    plain = EarlyExit(model, params, rows[0].exits, ())
    whole = plain.generate(ids, _TOKENS.value, np.zeros(0))
    with_text = []
    by_gate = _DECIDE.value == "gates"
    for row in rows:
        decoder = EarlyExit(model, params, row.exits, layers, by_gate, row.depth)
        generated = decoder.generate(ids, _TOKENS.value, row.thresholds)
        with_text.append(row._replace(generated=generated))
    last = with_text[-1].generated
    assert last is not None
    say(_PROMPT.value + tokenizer.decode(last.tokens))
    return Table(layers, full, with_text, whole)


# --- files


def _write(folder: Any, table: Table) -> None:
    """exits.npz, table.json and table.md."""
    name = "epsilon" if _DECIDE.value == "confidence" else "cost"
    places = [*(f"after {layer}" for layer in table.layers), "end"]
    columns = [name, "loss", "accuracy", "MFLOP a token", "of a whole pass", *places]
    if table.whole is not None:
        columns += ["generating: MFLOP a token", "CPU ms a token", "left early"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    records = []
    first = ("none", table.full, table.whole)
    others = [(f"{row.setting:g}", row.outcome, row.generated) for row in table.rows]
    for label, result, generated in [first, *others]:
        fractions = [f"{fraction:.2f}" for fraction in result.fractions]
        cells = [label, f"{result.loss:.4f}", f"{result.accuracy:.4f}"]
        cells += [f"{result.flops / 1e6:.3f}", f"{result.flops / table.full.flops:.2f}", *fractions]
        record: dict[str, Any] = {name: label, **result._asdict()}
        if generated is not None:
            # Of the model as it is no exit is looked at, and its place is 0 of 0.
            is_plain = generated is table.whole
            taken = sum(place < len(table.layers) for place in generated.exits)
            record["generation"] = {
                "flops": generated.flops,
                "cpu_seconds": generated.seconds,
                "taken": 0 if is_plain else taken,
                "tokens": len(generated.exits),
            }
            cells += [f"{generated.flops / 1e6:.3f}"]
            cells += [f"{1e3 * generated.seconds / len(generated.exits):.2f}"]
            cells += [f"{record['generation']['taken']} of {len(generated.exits)}"]
        lines.append(f"| {' | '.join(cells)} |")
        records.append(record)
    body: dict[str, Any] = {"decide": _DECIDE.value, "layers": table.layers, "rows": records}
    text = "\n".join(lines) + "\n"
    with plain_errors(f"could not write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(text)
        (folder / "table.json").write_text(json.dumps(body, indent=2) + "\n")
        np.savez(folder / "exits.npz", **_arrays(table))
    say(text)


def _arrays(table: Table) -> dict[str, Any]:
    """The parameters and thresholds of each row."""
    arrays: dict[str, Any] = {"layers": np.asarray(table.layers)}
    for row in table.rows:
        for key in ("scale", "gate_weights", "gate_bias"):
            arrays[f"{row.setting:g}.{key}"] = np.asarray(getattr(row.exits, key))
        arrays[f"{row.setting:g}.thresholds"] = row.thresholds
        if row.depth is not None:
            arrays[f"{row.setting:g}.depth_weights"] = np.asarray(row.depth.weights)
            arrays[f"{row.setting:g}.depth_bias"] = np.asarray(row.depth.bias)
    return arrays


def run() -> None:
    """The command: parses the flags, then calls `main`."""
    cli.run(main)


if __name__ == "__main__":
    run()
