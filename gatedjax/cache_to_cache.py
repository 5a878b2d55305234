"""Two trained models that talk through their caches (Cache-to-Cache, arXiv 2510.03215).

    python -m gatedjax.cache_to_cache --source=runs/a --target=runs/b --workdir=runs/fused

Both stay as they are. Of every row both read the first --prompt tokens; a fuser puts what the
source holds of them into the target's cache, and the target predicts the rest of the row. The
fuser learns on the training text of --text_of, a run. In WORKDIR: fuser.npz, and table.md and
table.json, the validation losses on the rest of the rows: of each model alone and of the target
with the fused cache. `--fuser=runs/fused/fuser.npz` measures one that has learned.
docs/combining.md says what is done.
"""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax import Array
from jaxtyping import Float, PyTree

from gatedjax.config import DataConfig, ModelConfig
from gatedjax.data import Batch, batches, load_tokenizer, make_dataset
from gatedjax.errors import InputError, require
from gatedjax.evaluation.restore import RestoredRun, require_text, restore_params
from gatedjax.layers.cache_fuser import (
    CacheFuser,
    Noise,
    gate_temperature,
    paired_layers,
)
from gatedjax.layers.tree import flatten_dict, unflatten_dict
from gatedjax.model import Caches, LanguageModel, head_weights, init_caches, logits
from gatedjax.paths import expand
from gatedjax.reporting.console import say
from gatedjax.reporting.stages import write_tables
from gatedjax.runtime import cli, launch
from gatedjax.sharding import my_rows
from gatedjax.training.run_directory import plain_errors

Split = Literal["train", "validation"]

_SOURCE = flags.DEFINE_string("source", None, "Run directory of the model that brings its cache.")
_TARGET = flags.DEFINE_string("target", None, "Run directory of the model that predicts.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the fuser and of the table.")
_TEXT_OF = flags.DEFINE_string("text_of", None, "A run whose text is used; default: --target.")
_FUSER = flags.DEFINE_string("fuser", None, "A fuser.npz that is measured, and does not learn.")
_PROMPT = flags.DEFINE_integer("prompt", None, "Tokens of a row's prompt; default: half of them.")
_HIDDEN = flags.DEFINE_integer("hidden", 128, "Channels of the fuser.", lower_bound=1)
_DEPTH = flags.DEFINE_integer("depth", 2, "Blocks of the fuser.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 300, "Steps of learning.", lower_bound=1)
_LR = flags.DEFINE_float("lr", 1e-3, "Learning rate (Adam).", lower_bound=0.0)
_BATCHES = flags.DEFINE_integer("batches", 16, "Validation batches.", lower_bound=1)
_TRUST = flags.DEFINE_bool("trust_paths", False, "Read the text a stranger's run names.")


def main(_) -> None:
    """Restore both -> learn -> measure -> the table."""
    places = {
        "source": expand(cli.required(_SOURCE), "--source"),
        "target": expand(cli.required(_TARGET), "--target"),
    }
    workdir = expand(cli.required(_WORKDIR), "--workdir")
    launch.start()
    runs = {name: restore_params(place, trust_paths=_TRUST.value) for name, place in places.items()}
    of_text = runs["target"].run
    if _TEXT_OF.value is not None:
        of_text = restore_params(expand(_TEXT_OF.value, "--text_of"), trust_paths=_TRUST.value).run
    require_text(of_text)
    data = of_text.config.data
    prompt = data.seq_len // 2 if _PROMPT.value is None else _PROMPT.value
    require(0 < prompt < data.seq_len, "--prompt", prompt, f"between 1 and {data.seq_len - 1}")
    fuser = fuser_of(runs)
    with jax.set_mesh(runs["target"].run.mesh):
        if _FUSER.value is None:
            params = learned(fuser, runs, data, prompt)
        else:
            params = loaded(_FUSER.value, fuser)
        rows = measured(fuser, params, runs, data, prompt)
    text = table(rows, prompt, data.seq_len - prompt)
    write_tables(workdir, text, {"prompt": prompt, "rows": rows})
    path = workdir / "fuser.npz"
    with plain_errors(f"could not write {path}"):
        flat = flatten_dict(params)
        arrays: Any = {".".join(name): np.asarray(x) for name, x in flat.items()}
        np.savez(path, **arrays)
    say(text)
    say(f"the fuser is {path}")


def fuser_of(runs: dict[str, RestoredRun]) -> CacheFuser:
    """The fuser of two runs.

    Raises:
      InputError: another tokenizer, or layers whose caches cannot be fused.
    """
    source, target = (runs[name].run.config for name in ("source", "target"))
    of_source, of_target = (
        load_tokenizer(config.data.tokenizer, config.data.end_of_document)
        for config in (source, target)
    )
    require(
        of_source.fingerprint == of_target.fingerprint,
        "--source: data.tokenizer",
        source.data.tokenizer,
        f"that of --target, {target.data.tokenizer}",
    )
    fuser = CacheFuser(source.model, target.model, _HIDDEN.value, _DEPTH.value)
    try:
        paired_layers(source.model, target.model)
    except InputError as error:
        raise InputError(f"--source, --target: {error}") from None
    return fuser


def piece(batch: Batch, begin: int | None, end: int | None) -> tuple[Array, Array, Array]:
    """What a model is told of some tokens of all rows."""
    arrays = (batch.tokens, batch.positions, batch.segment_ids)
    tokens, positions, segment_ids = (jnp.asarray(x)[:, begin:end] for x in arrays)
    return tokens, positions, segment_ids


def prefilled(model: ModelConfig, params: PyTree, batch: Batch, prompt: int) -> Caches:
    """The caches of a model after the prompts, with room for the rest of the rows.

    Args:
      model: its configuration.
      params: of it.
      batch: rows.
      prompt: tokens of each.
    """
    caches = init_caches(model, *batch.tokens.shape)
    inputs = piece(batch, None, prompt)
    output: Any = LanguageModel(model).apply({"params": params}, *inputs, caches)
    return output[1]


def losses_of_rest(
    model: ModelConfig,
    params: PyTree,
    batch: Batch,
    prompt: int,
    caches: Caches,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Nats of the tokens behind the prompts, summed, and how many there are.

    Args:
      model: the model that predicts.
      params: of it.
      batch: rows.
      prompt: tokens of each that are in the caches.
      caches: of these.
    """
    inputs = piece(batch, prompt, None)
    output: Any = LanguageModel(model).apply({"params": params}, *inputs, caches)
    log_p = jax.nn.log_softmax(logits(output[0], head_weights(params)))
    targets = jnp.asarray(batch.targets)[:, prompt:, None]
    of_tokens = -jnp.take_along_axis(log_p, targets, axis=-1)[..., 0]
    mask = jnp.asarray(batch.loss_mask, jnp.float32)[:, prompt:]
    return jnp.sum(of_tokens * mask), jnp.sum(mask)


def fused_losses(
    fuser: CacheFuser,
    params: PyTree,
    given: tuple[PyTree, PyTree],
    batch: Batch,
    prompt: int,
    noise: Noise | None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`losses_of_rest` of the target with what the source brings.

    Args:
      fuser: of the two models.
      params: of the fuser.
      given: the parameters of source and target, frozen.
      batch: rows.
      prompt: tokens of each that both models read.
      noise: of the gates, while they learn.
    """
    of_source, of_target = given
    source = prefilled(fuser.source, of_source, batch, prompt)
    target = prefilled(fuser.target, of_target, batch, prompt)
    layers: Any = fuser.apply({"params": params}, source.layers, target.layers, noise)
    caches = dataclasses.replace(target, layers=layers)
    return losses_of_rest(fuser.target, of_target, batch, prompt, caches)


def learned(
    fuser: CacheFuser,
    runs: dict[str, RestoredRun],
    data: DataConfig,
    prompt: int,
) -> PyTree:
    """The parameters of the fuser after its training.

    Args:
      fuser: of the two models.
      runs: source and target.
      data: the text.
      prompt: tokens of a row that both models read.
    """
    given = (runs["source"].params, runs["target"].params)
    stream = batches(_text(runs["target"], data, "train"))
    first = next(stream)
    params = fresh(fuser, first.tokens.shape)
    tx = optax.adam(_LR.value)
    state = tx.init(params)

    @jax.jit
    def step(params: PyTree, state: Any, given: Any, batch: Batch, number: Array):
        noise = Noise(
            jax.random.fold_in(jax.random.key(0), number),
            gate_temperature(number / _STEPS.value),
        )

        def loss(params: PyTree) -> Float[Array, ""]:
            total, count = fused_losses(fuser, params, given, batch, prompt, noise)
            return total / jnp.maximum(count, 1.0)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    batch = first
    for number in range(_STEPS.value):
        params, state, value = step(params, state, given, batch, jnp.int32(number))
        if (number + 1) % 50 == 0 or number + 1 == _STEPS.value:
            say(f"step {number + 1}/{_STEPS.value}  loss {float(value):.3f}")
        if number + 1 < _STEPS.value:
            batch = next(stream)
    return params


def fresh(fuser: CacheFuser, shape: tuple[int, ...]) -> PyTree:
    """The fuser's parameters at the start, for batches of a shape."""
    rows, length = shape
    layers = [init_caches(c, rows, length).layers for c in (fuser.source, fuser.target)]
    return nn.meta.unbox(jax.jit(fuser.init)(jax.random.key(0), *layers)["params"])


def loaded(name: str, fuser: CacheFuser) -> PyTree:
    """The parameters of a fuser.npz.

    Raises:
      InputError: no such file, or one of other models or sizes.
    """
    path = expand(name, "--fuser")
    with plain_errors(f"--fuser: could not read {path}"), np.load(path) as arrays:
        given = {tuple(key.split(".")): arrays[key] for key in arrays.files}
    shapes = jax.eval_shape(lambda: fresh(fuser, (1, 2)))
    wanted = {key: x.shape for key, x in flatten_dict(shapes).items()}
    found = {key: x.shape for key, x in given.items()}
    if found != wanted:
        differing = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        key = differing[0]
        require(False, f"--fuser: {'.'.join(key)}", found.get(key), f"{wanted.get(key)}")
    return unflatten_dict({key: jnp.asarray(x) for key, x in given.items()})


def _text(target: RestoredRun, data: DataConfig, split: Split) -> Any:
    """Batches of the text, with as many rows as the target was trained with."""
    run = target.run
    rows = run.config.train.batch_size
    return make_dataset(data, split, batch_size=rows, rows=my_rows(run.mesh, rows), seed=data.seed)


def measured(
    fuser: CacheFuser,
    params: PyTree,
    runs: dict[str, RestoredRun],
    data: DataConfig,
    prompt: int,
) -> list[dict[str, Any]]:
    """The loss of each model alone, and of the target with the fused cache.

    Args:
      fuser: of the two models.
      params: of the fuser.
      runs: source and target.
      data: the text.
      prompt: tokens of a row that both models read.
    """
    given = (runs["source"].params, runs["target"].params)

    @functools.partial(jax.jit, static_argnums=0)
    def alone(model: ModelConfig, params: PyTree, batch: Batch):
        caches = prefilled(model, params, batch, prompt)
        return losses_of_rest(model, params, batch, prompt, caches)

    @jax.jit
    def together(params: PyTree, given: Any, batch: Batch):
        return fused_losses(fuser, params, given, batch, prompt, None)

    dataset = _text(runs["target"], data, "validation")
    sums = {name: np.zeros(2) for name in ("source alone", "target alone", "fused")}
    for batch in batches(dataset[: min(_BATCHES.value, len(dataset))]):
        found = {
            "source alone": alone(fuser.source, given[0], batch),
            "target alone": alone(fuser.target, given[1], batch),
            "fused": together(params, given, batch),
        }
        for name, numbers in found.items():
            sums[name] += np.asarray(numbers, np.float64)
    gates = {path[0]: float(x) for path, x in flatten_dict(params).items() if path[-1] == "gate"}
    rows: list[dict[str, Any]] = [
        {"model": name, "loss": total / max(count, 1.0)} for name, (total, count) in sums.items()
    ]
    rows[-1]["gates"] = {name: round(logit, 4) for name, logit in gates.items()}
    return rows


def table(rows: list[dict[str, Any]], prompt: int, rest: int) -> str:
    """What `measured` found, to read.

    Args:
      rows: of `measured`.
      prompt: tokens that both models read.
      rest: tokens that are predicted.
    """
    lines = [
        f"Validation loss of {rest} tokens after a prompt of {prompt}, nats per token.",
        "",
        "| model | loss | open gates |",
        "|---|---|---|",
    ]
    for row in rows:
        gates = row.get("gates", {})
        is_open = [name for name, logit in gates.items() if logit > 0]
        shown = f"{len(is_open)} of {len(gates)}" if gates else ""
        lines.append(f"| {row['model']} | {row['loss']:.3f} | {shown} |")
    return "\n".join(lines) + "\n"


def run() -> None:
    """The command: parses the flags, then calls `main`."""
    cli.run(main)


if __name__ == "__main__":
    run()
