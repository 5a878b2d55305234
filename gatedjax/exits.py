"""Early exits for a trained model: learned, calibrated, measured, and used to generate.

    python -m gatedjax.exits --checkpoint=runs/tiny --out=runs/tiny/exits [--prompt="def "]

The model stays as it is. Exits are learned on its training text; thresholds are found on one half
of its validation batches, and quality against FLOPs is measured on the other. In the folder:
exits.npz (parameters and thresholds), table.md and table.json. docs/exits.md says what is done.
"""

import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax import Array
from jaxtyping import Float, PyTree

from gatedjax.config import ModelConfig
from gatedjax.data import Batch, batches, load_tokenizer, make_dataset
from gatedjax.errors import require
from gatedjax.evaluation import exits as early
from gatedjax.evaluation.early_exit import EarlyExit, Generated, require_simple
from gatedjax.evaluation.exits import Exits
from gatedjax.evaluation.restore import require_text, restore_params
from gatedjax.paths import expand
from gatedjax.reporting.console import say
from gatedjax.runtime import cli, launch
from gatedjax.sharding import my_rows
from gatedjax.training.run import Run
from gatedjax.training.run_directory import plain_errors
from gatedjax.training.teacher import Teacher, by_layer, observed

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run directory, as --workdir of train.py.")
_OUT = flags.DEFINE_string("out", None, "Folder of exits and table; default: CHECKPOINT/exits.")
_LAYERS = flags.DEFINE_list(
    "layers", [], "After how many layers an exit is: 2,4; default: after each but the last."
)
_DECIDE = flags.DEFINE_enum(
    "decide",
    "confidence",
    ["confidence", "gates"],
    "Thresholds on the likeliest token's probability, or gates learned with the exits (JEI-DNN).",
)
_EPSILON = flags.DEFINE_list(
    "epsilon", ["0", "0.01", "0.02", "0.05"], "What an exit's best accuracy may lose, each a row."
)
_COST = flags.DEFINE_list(
    "cost", ["0.5", "1", "2"], "With gates: nats that a whole forward pass is worth, each a row."
)
_STEPS = flags.DEFINE_integer("steps", 200, "Steps of learning.", lower_bound=1)
_PHASE = flags.DEFINE_integer(
    "phase", 200, "With gates: batches between exits and gates.", lower_bound=1
)
_LR = flags.DEFINE_float("lr", 1e-2, "Learning rate (Adam).", lower_bound=0.0)
_BATCHES = flags.DEFINE_integer(
    "batches", 8, "Validation batches to calibrate on, and as many to measure on.", lower_bound=1
)
_PROMPT = flags.DEFINE_string("prompt", None, "Generate from it, with the last row's thresholds.")
_TOKENS = flags.DEFINE_integer("tokens", 64, "How many tokens to generate.", lower_bound=2)
_TRUST = flags.DEFINE_bool(
    "trust_paths", False, "Use the paths in a checkpoint that somebody else wrote."
)


class Seen(NamedTuple):
    """What the exits say of many tokens, in numpy; the end is the last column.

    confidence: the probability of the likeliest token, before the end.
    gates: of the exits.
    losses: nats. is_right: whether the likeliest token was the next one.
    """

    confidence: np.ndarray
    gates: np.ndarray
    losses: np.ndarray
    is_right: np.ndarray


class Row(NamedTuple):
    """A row of the table, with the exits and thresholds that it is of."""

    setting: float
    exits: Exits
    thresholds: np.ndarray
    outcome: early.Outcome


def main(_) -> None:
    """Restore -> learn -> calibrate -> measure -> generate."""
    checkpoint = expand(cli.required(_CHECKPOINT), "--checkpoint")
    folder = checkpoint / "exits" if _OUT.value is None else expand(_OUT.value, "--out")
    by_gate = _DECIDE.value == "gates"
    settings = _numbers(
        "--cost" if by_gate else "--epsilon", (_COST if by_gate else _EPSILON).value
    )
    launch.start()
    run, params, _ = restore_params(checkpoint, trust_paths=_TRUST.value)
    require_text(run)
    model = run.config.model
    require_simple(model)
    layers = early.layers_of(_LAYERS.value, model)
    costs = early.exit_costs(model, run.config.data.seq_len, layers)
    with jax.set_mesh(run.mesh):
        rows = []
        exits = learned(run, params, layers, costs, settings[0] if by_gate else None)
        halves = seen_halves(run, params, exits, layers)
        for setting in settings:
            # Thresholds are found for the same exits; gates are learned for each cost.
            if by_gate and rows:
                exits = learned(run, params, layers, costs, setting)
                halves = seen_halves(run, params, exits, layers)
            rows.append(_row(setting, exits, halves, costs, by_gate))
        whole = np.full(len(halves[1].losses), len(layers))
        full = early.outcome(whole, halves[1].losses, halves[1].is_right, costs)
        generated = None
        if _PROMPT.value is not None:
            generated = _generate(run, params, rows[-1], layers, by_gate, _PROMPT.value)
    _write(folder, layers, by_gate, rows, full, generated)


def _numbers(flag: str, values: list[str]) -> list[float]:
    """Numbers of a flag, 0 or more, at least one."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        numbers = []
    is_good = bool(numbers) and all(0 <= number < np.inf for number in numbers)
    require(is_good, flag, ",".join(values), "numbers of 0 or more, such as 0,0.01")
    return numbers


# --- learning


def predictions(
    model: ModelConfig,
    layers: tuple[int, ...],
    params: PyTree,
    exits: Exits,
    batch: Batch,
) -> tuple[list[Array], Array]:
    """Logits of every exit, and of the end."""
    frozen = Teacher(params, model)
    hidden, recorded = observed(frozen, batch, with_activations=True)
    residuals = by_layer(model, recorded, "residual")
    weights = params["head"] if "head" in params else params["embedding"]
    weights = weights.astype(hidden.dtype)
    of_exits = []
    for index, layer in enumerate(layers):
        x = residuals[layer - 1]
        of_exits.append(early.exit_logits(x, exits.scale[index], weights, model.norm_eps))
    return of_exits, early.logits(hidden, weights)


def token_losses(predicted: Array, batch: Batch) -> Float[Array, "B T"]:
    """Nats of the next token."""
    log_p = jax.nn.log_softmax(predicted)
    targets = jnp.asarray(batch.targets)[..., None]
    return -jnp.take_along_axis(log_p, targets, axis=-1)[..., 0]


def exits_loss(
    exits: Exits,
    batch: Batch,
    params: PyTree,
    model: ModelConfig,
    layers: tuple[int, ...],
    costs: Float[Array, " E+1"],
    cost_weight: float | None,
    of_gates: bool,
) -> Float[Array, ""]:
    """What exits or gates learn from, a mean over tokens.

    Args:
      exits: the parameters.
      batch: rows of text.
      params: of the model, frozen.
      model: its configuration.
      layers: after how many layers each exit is.
      costs: of each exit, the end's is 1.
      cost_weight: nats that the end's cost is worth; None without gates: all exits count alike.
      of_gates: the gates' loss (they learn where the least of loss and cost is), not the exits'
        (whose losses count as often as the gates let a token leave there).
    """
    of_exits, of_end = predictions(model, layers, params, exits, batch)
    losses = jnp.stack([token_losses(p, batch) for p in of_exits], axis=-1)
    by_token = jnp.sum(losses, axis=-1)
    if cost_weight is not None:
        numbers = [jax.lax.stop_gradient(early.features(p)) for p in of_exits]
        gates = jnp.stack(
            [early.gate_values(exits, i, n) for i, n in enumerate(numbers)],
            axis=-1,
        )
        if of_gates:
            all_losses = jnp.stack(
                [*jnp.moveaxis(losses, -1, 0), token_losses(of_end, batch)], axis=-1
            )
            best = early.cheapest(jax.lax.stop_gradient(all_losses), costs, cost_weight)
            by_token = early.gate_loss(gates, best)
        else:
            reached = early.exit_probabilities(jax.lax.stop_gradient(gates))[..., :-1]
            by_token = jnp.sum(reached * losses, axis=-1)
    mask = jnp.asarray(batch.loss_mask, jnp.float32)
    return jnp.sum(by_token * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def learned(
    run: Run,
    params: PyTree,
    layers: tuple[int, ...],
    costs: np.ndarray,
    cost_weight: float | None,
) -> Exits:
    """Exits, and with a cost gates too, in turns: a phase of exits, a phase of gates.

    The first phase is of exits alone, all of which count alike.

    Args:
      run: of the model.
      params: of it.
      layers: after how many layers each exit is.
      costs: FLOPs of each exit.
      cost_weight: of gates; None without.
    """
    model = run.config.model
    data = run.config.data
    rows = run.config.train.batch_size
    scale = params["final_norm"]["scale"]
    start = 1.0 + scale if model.zero_centered_norm else scale
    # Any: to optax a tree of parameters.
    exits: Any = early.fresh_exits(len(layers), start)
    tx = optax.adam(_LR.value)
    state = tx.init(exits)
    relative = jnp.asarray(costs / costs[-1], jnp.float32)

    @functools.partial(jax.jit, static_argnums=(4, 5))
    def step(
        exits: Any,
        state: Any,
        batch: Batch,
        params: PyTree,
        weight: float | None,
        of_gates: bool,
    ):
        loss, gradient = jax.value_and_grad(exits_loss)(
            exits, batch, params, model, layers, relative, weight, of_gates
        )
        updates, state = tx.update(gradient, state)
        return optax.apply_updates(exits, updates), state, loss

    dataset = make_dataset(
        data, "train", batch_size=rows, rows=my_rows(run.mesh, rows), seed=data.seed
    )
    stream = batches(dataset)
    phases = 1 if cost_weight is None else 4
    for phase in range(phases):
        of_gates = phase % 2 == 1
        weight = None if phase == 0 else cost_weight
        loss = jnp.float32(0.0)
        for _ in range(_STEPS.value if phases == 1 else min(_STEPS.value, _PHASE.value)):
            exits, state, loss = step(exits, state, next(stream), params, weight, of_gates)
        say(f"{'gates' if of_gates else 'exits'}: loss {float(loss):.4f}")
    return exits


# --- measuring


def seen_halves(
    run: Run,
    params: PyTree,
    exits: Exits,
    layers: tuple[int, ...],
) -> tuple[Seen, Seen]:
    """What the exits say of validation tokens: to calibrate on, and to measure on."""
    model = run.config.model
    data = run.config.data
    rows = run.config.train.batch_size

    @jax.jit
    def look(exits: Exits, params: PyTree, batch: Batch):
        of_exits, of_end = predictions(model, layers, params, exits, batch)
        numbers = [early.features(p) for p in of_exits]
        gates = [early.gate_values(exits, i, n) for i, n in enumerate(numbers)]
        every = [*of_exits, of_end]
        losses = [token_losses(p, batch) for p in every]
        is_right = [jnp.argmax(p, axis=-1) == jnp.asarray(batch.targets) for p in every]
        groups = ([n[..., 0] for n in numbers], gates, losses, is_right)
        return [jnp.stack(group, axis=-1) for group in groups]

    dataset = make_dataset(
        data, "validation", batch_size=rows, rows=my_rows(run.mesh, rows), seed=data.seed
    )
    wanted = 2 * _BATCHES.value
    require(
        len(dataset) >= 2,
        "--checkpoint",
        f"{len(dataset)} batches of validation text",
        "at least two, to calibrate and to measure",
    )
    found: list[list[np.ndarray]] = []
    for batch in batches(dataset[: min(wanted, len(dataset))]):
        is_counted = np.asarray(batch.loss_mask).reshape(-1) > 0
        groups = look(exits, params, batch)
        found.append([np.asarray(g).reshape(-1, g.shape[-1])[is_counted] for g in groups])
    half = len(found) // 2
    halves = []
    for part in (found[:half], found[half:]):
        halves.append(Seen(*(np.concatenate(group).astype(np.float64) for group in zip(*part))))
    calibration, measured = halves
    return calibration, measured


def _row(
    setting: float,
    exits: Exits,
    halves: tuple[Seen, Seen],
    costs: np.ndarray,
    by_gate: bool,
) -> Row:
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
    outcome = early.outcome(chosen, measured.losses, measured.is_right > 0, costs)
    return Row(setting, exits, thresholds, outcome)


def _generate(
    run: Run,
    params: PyTree,
    row: Row,
    layers: tuple[int, ...],
    by_gate: bool,
    prompt: str,
) -> tuple[Generated, Generated]:
    """The prompt's continuation with exits, and with none taken.

    Args:
      run: of the model.
      params: of it.
      row: the exits and their thresholds.
      layers: after how many layers each exit is.
      by_gate: whether gates decide.
      prompt: the text.
    """
    data = run.config.data
    tokenizer = load_tokenizer(data.tokenizer, data.end_of_document)
    ids = [int(token) for token in tokenizer.encode(prompt)]
    require(len(ids) > 0, "--prompt", prompt, "at least one token")
    decoder = EarlyExit(run.config.model, params, row.exits, layers, by_gate)
    with_exits = decoder.generate(ids, _TOKENS.value, row.thresholds)
    never = np.full(len(layers), np.inf)
    whole = decoder.generate(ids, _TOKENS.value, never)
    say(prompt + tokenizer.decode(with_exits.tokens))
    return with_exits, whole


def _write(
    folder: Any,
    layers: tuple[int, ...],
    by_gate: bool,
    rows: list[Row],
    full: early.Outcome,
    generated: tuple[Generated, Generated] | None,
) -> None:
    """exits.npz, table.json and table.md."""
    name = "cost" if by_gate else "epsilon"
    places = [*(f"after {layer}" for layer in layers), "end"]
    lines = [
        f"| {name} | loss | accuracy | MFLOP a token | of a whole pass | {' | '.join(places)} |",
        f"|{'---|' * (5 + len(places))}",
    ]
    records = []
    for label, result in [("none", full), *((f"{row.setting:g}", row.outcome) for row in rows)]:
        fractions = [f"{fraction:.2f}" for fraction in result.fractions]
        cells = [label, f"{result.loss:.4f}", f"{result.accuracy:.4f}"]
        cells += [f"{result.flops / 1e6:.3f}", f"{result.flops / full.flops:.2f}", *fractions]
        lines.append(f"| {' | '.join(cells)} |")
        records.append({name: label, **result._asdict()})
    body: dict[str, Any] = {"decide": _DECIDE.value, "layers": layers, "rows": records}
    if generated is not None:
        early_exit, whole = generated
        lines += ["", "| generation | MFLOP a token, by XLA's count | CPU seconds | exits taken |"]
        lines.append("|---|---|---|---|")
        body["generation"] = {}
        for label, result in (("all layers", whole), ("with exits", early_exit)):
            taken = sum(place < len(layers) for place in result.exits)
            cells = [label, f"{result.flops / 1e6:.3f}", f"{result.seconds:.2f}"]
            lines.append(f"| {' | '.join([*cells, f'{taken} of {len(result.exits)}'])} |")
            body["generation"][label] = {
                "flops": result.flops,
                "seconds": result.seconds,
                "taken": taken,
                "tokens": len(result.exits),
            }
    text = "\n".join(lines) + "\n"
    arrays = {"layers": np.asarray(layers)}
    for row in rows:
        for key in ("scale", "gate_weights", "gate_bias"):
            arrays[f"{row.setting:g}.{key}"] = np.asarray(getattr(row.exits, key))
        arrays[f"{row.setting:g}.thresholds"] = row.thresholds
    with plain_errors(f"could not write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(text)
        (folder / "table.json").write_text(json.dumps(body, indent=2) + "\n")
        np.savez(folder / "exits.npz", **arrays)
    say(text)


def run() -> None:
    """The command: parses the flags, then calls `main`."""
    cli.run(main)


if __name__ == "__main__":
    run()
