"""Experts out of a trained dense model, and one router before all layers (Read-ME, arXiv
2410.19123).

    python -m gatedjax.split_experts --from=runs/base --texts=a=a/,b=b/ --workdir=runs/split

The model is a run directory with gated MLPs; a text is a name and a file or folder, and gets an
expert. In every layer an expert has those channels that are largest on its text and not on all.
Router and experts then learn by turns, the rest stays as it is. WORKDIR is a run of the result, in
which the router is part of the model: eval.py, generate and another run's train.init_from take it
like any other. In it too are table.md and table.json: validation losses of the dense model and of
the experts by several ways of choosing them, what is computed, and how often experts would be
loaded. docs/combining.md says what is done.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax import Array
from jaxtyping import Float, Int, PyTree

from gatedjax.config import GatedMLPConfig, ModelConfig, SparseMoEConfig
from gatedjax.data import Batch
from gatedjax.evaluation.restore import restore_params
from gatedjax.layers.moe.channel_experts import kept_channels, loads, overlaps, router_loss
from gatedjax.layers.moe.given_experts import given_experts
from gatedjax.layers.tree import divided, flatten_dict, unflatten_dict
from gatedjax.model import LanguageModel, head_weights, logits
from gatedjax.paths import expand
from gatedjax.reporting.console import say
from gatedjax.reporting.stages import write_tables
from gatedjax.reporting.texts import Texts, parsed_texts
from gatedjax.runtime import cli, launch
from gatedjax.training import made_run
from gatedjax.training.split_model import Split, fresh_split, require_splittable, router_logits
from gatedjax.training.teacher import Teacher, by_layer, observed

_FROM = flags.DEFINE_string("from", None, "Run directory of the dense model.")
_TEXTS = flags.DEFINE_list("texts", [], "NAME=PATH of each expert's text, two or more.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the result.")
_ROUNDS = flags.DEFINE_integer("rounds", 2, "Turns of router and experts.", lower_bound=1)
_ROUTER = flags.DEFINE_integer("router_steps", 100, "Steps of the router, a turn.", lower_bound=1)
_EXPERTS = flags.DEFINE_integer("expert_steps", 100, "Steps of the experts, a turn.", lower_bound=0)
_LR = flags.DEFINE_float("lr", 1e-3, "Learning rate (Adam).", lower_bound=0.0)
_BATCHES = flags.DEFINE_integer("batches", 8, "Validation batches of each text.", lower_bound=1)
_HELD = 32


def main(_) -> None:
    """Restore -> split -> learn by turns -> measure -> the table."""
    source = expand(cli.required(_FROM), "--from")
    workdir = expand(cli.required(_WORKDIR), "--workdir").absolute()
    paths = parsed_texts(_TEXTS.value)
    made_run.require_new(workdir)
    launch.start()
    run, params, _ = restore_params(source)
    model = run.config.model
    require_splittable(model)
    texts = Texts(run, paths)
    with jax.set_mesh(run.mesh):
        kept = channels_of_texts(Teacher(params, model), texts)
        split = fresh_split(model, params, kept)
        for number in range(_ROUNDS.value):
            split = split._replace(router_params=learned_router(split, params, model, kept, texts))
            split = split._replace(params=learned_experts(split, texts))
            say(f"turn {number + 1}/{_ROUNDS.value}")
        rows, experts = measured(split, params, model, texts)
    cached = cache_rows(experts, len(paths))
    fraction = computed_fraction(split.model, model)
    text = table(rows, cached, list(paths), fraction)
    body = {"rows": rows, "loads": cached, "computed": fraction}
    whole, whole_params = split.whole
    config = made_run.with_model(run.config, whole)
    made_run.save(workdir, config, flatten_dict(whole_params), source)
    write_tables(workdir, text, body)
    say(text)


def channels_of_texts(dense: Teacher, texts: Texts) -> dict[int, np.ndarray]:
    """The channels that each text keeps, by layer: [experts, channels]."""

    @jax.jit
    def sums(params: PyTree, batch: Batch) -> dict[int, Array]:
        found = activations(Teacher(params, dense.model), batch)
        mask = jnp.asarray(batch.loss_mask)[..., None]
        return {layer: jnp.sum(jnp.abs(h) * mask, axis=(0, 1)) for layer, h in found.items()}

    of_texts = []
    for name in texts.names:
        total: dict[int, np.ndarray] = {}
        for batch in texts.training(name, _BATCHES.value):
            for layer, x in sums(dense.params, batch).items():
                total[layer] = total.get(layer, 0.0) + np.asarray(x, np.float64)
        of_texts.append(total)
    return {
        layer: kept_channels(np.stack([total[layer] for total in of_texts]))
        for layer in range(dense.model.num_layers)
    }


def activations(dense: Teacher, batch: Batch) -> dict[int, Float[Array, "B T F"]]:
    """The channels of every layer's gated MLP."""
    _, recorded = observed(dense, batch, with_activations=True)
    return by_layer(dense.model, recorded, "channels")


def losses(
    model: ModelConfig,
    params: PyTree,
    batch: Batch,
    experts: Int[Array, "B T"] | None,
) -> Float[Array, "2"]:
    """(the sum of the tokens' losses, their number).

    Args:
      model: dense, or split.
      params: of it.
      batch: rows.
      experts: of the tokens; None for a dense model.
    """
    inputs = (batch.tokens, batch.positions, batch.segment_ids)
    given = jnp.zeros(batch.tokens.shape, jnp.int32) if experts is None else experts
    with given_experts(given):
        output: Any = LanguageModel(model).apply({"params": params}, *inputs)
    log_p = jax.nn.log_softmax(logits(output[0], head_weights(params)))
    targets = jnp.asarray(batch.targets)[..., None]
    of_tokens = -jnp.take_along_axis(log_p, targets, axis=-1)[..., 0]
    mask = jnp.asarray(batch.loss_mask, jnp.float32)
    return jnp.stack([jnp.sum(of_tokens * mask), jnp.sum(mask)])


def learned_router(
    split: Split,
    params: PyTree,
    model: ModelConfig,
    kept: Mapping[int, np.ndarray],
    texts: Texts,
) -> PyTree:
    """The router's parameters after a turn.

    Args:
      split: as it is.
      params: of the dense model.
      model: its configuration.
      kept: channels of each text, by layer.
      texts: to learn from.
    """

    def loss(of_router: PyTree, dense: PyTree, batch: Batch) -> Float[Array, ""]:
        found = activations(Teacher(dense, model), batch)
        guess = router_logits(split.router, of_router, batch)
        layers = [
            router_loss(guess, overlaps(h, jnp.asarray(kept[layer]))) for layer, h in found.items()
        ]
        mask = jnp.asarray(batch.loss_mask, jnp.float32)
        return jnp.sum(sum(layers) / len(layers) * mask) / jnp.maximum(jnp.sum(mask), 1.0)

    return _fitted(loss, split.router_params, params, texts, _ROUTER.value)


def learned_experts(split: Split, texts: Texts) -> PyTree:
    """The parameters of the split model after a turn: those of its experts learn from text."""
    of_experts, rest = divided(split.params, lambda path: "ffn" in path and "router" not in path)

    def loss(own: PyTree, given: Any, batch: Batch) -> Float[Array, ""]:
        rest, of_router = given
        experts = jnp.argmax(router_logits(split.router, of_router, batch), axis=-1)
        whole = unflatten_dict(flatten_dict(own) | flatten_dict(rest))
        total, count = losses(split.model, whole, batch, experts)
        return total / jnp.maximum(count, 1.0)

    given = (rest, split.router_params)
    own = _fitted(loss, of_experts, given, texts, _EXPERTS.value)
    return unflatten_dict(flatten_dict(own) | flatten_dict(rest))


def _fitted(loss: Any, params: PyTree, given: Any, texts: Texts, steps: int) -> PyTree:
    """Some steps of Adam, a batch of each text by turns."""
    tx = optax.adam(_LR.value)
    state = tx.init(params)

    @jax.jit
    def step(params: PyTree, state: Any, given: Any, batch: Batch):
        gradient = jax.grad(loss)(params, given, batch)
        updates, state = tx.update(gradient, state)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state, given, texts.next_batch())
    return params


def measured(
    split: Split,
    params: PyTree,
    model: ModelConfig,
    texts: Texts,
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """The losses on every text, and the experts of its rows by the router.

    Args:
      split: what has learned.
      params: of the dense model.
      model: its configuration.
      texts: their validation parts.
    """
    of_model = functools.partial(jax.jit, static_argnums=0)(losses)
    choose = jax.jit(lambda p, batch: jnp.argmax(router_logits(split.router, p, batch), axis=-1))
    ways = ("dense", "routed", "by the text's name", "by chance")
    sums = {way: {name: np.zeros(2) for name in texts.names} for way in ways}
    rows_of_experts = []
    for number, name in enumerate(texts.names):
        for batch in texts.validation(name, _BATCHES.value):
            experts = choose(split.router_params, batch)
            rows_of_experts += list(np.asarray(experts))
            shape = experts.shape
            chance = jax.random.randint(jax.random.key(number), shape, 0, len(texts.names))
            found = {
                "dense": of_model(model, params, batch, None),
                "routed": of_model(split.model, split.params, batch, experts),
                "by the text's name": of_model(
                    split.model, split.params, batch, jnp.full(shape, number, jnp.int32)
                ),
                "by chance": of_model(split.model, split.params, batch, chance),
            }
            for way, numbers in found.items():
                sums[way][name] += np.asarray(numbers, np.float64)
    rows: list[dict[str, Any]] = []
    for way in ways:
        means = {name: total / max(count, 1.0) for name, (total, count) in sums[way].items()}
        rows.append({"experts": way, **means})
    return rows, rows_of_experts


def cache_rows(experts: list[np.ndarray], count: int) -> list[dict[str, Any]]:
    """How often an expert is loaded for 100 tokens, by how many have room."""
    rows = []
    tokens = sum(len(row) for row in experts[:_HELD])
    for capacity in range(1, count):
        found: dict[str, Any] = {"room": capacity}
        for policy in ("recent", "ahead"):
            total = sum(loads(row.tolist(), capacity, policy) for row in experts[:_HELD])
            found[policy] = 100 * total / tokens
        rows.append(found)
    return rows


def computed_fraction(split: ModelConfig, dense: ModelConfig) -> float:
    """Channels of feed-forwards that a token goes through, of those of the dense model."""
    channels = [
        ffn.hidden + ffn.shared_hidden
        for ffn in (split.layer(i)[1] for i in range(split.num_layers))
        if isinstance(ffn, SparseMoEConfig)
    ]
    whole = [
        ffn.hidden
        for ffn in (dense.layer(i)[1] for i in range(dense.num_layers))
        if isinstance(ffn, GatedMLPConfig)
    ]
    return sum(channels) / sum(whole)


def table(
    rows: list[dict[str, Any]],
    cached: list[dict[str, Any]],
    names: list[str],
    fraction: float,
) -> str:
    """What was measured, to read.

    Args:
      rows: of `measured`.
      cached: of `cache_rows`.
      names: of the texts.
      fraction: of `computed_fraction`.
    """
    lines = [
        "Validation loss, nats per token. Experts compute "
        f"{fraction:.0%} of the dense feed-forwards' channels.",
        "",
        f"| experts | {' | '.join(names)} | mean |",
        "|---" * (len(names) + 2) + "|",
    ]
    for row in rows:
        values = [row[name] for name in names]
        values.append(sum(values) / len(names))
        lines.append(f"| {row['experts']} | {' | '.join(f'{value:.3f}' for value in values)} |")
    lines += [
        "",
        "| experts in memory | loads for 100 tokens: longest unused goes | farthest use goes |",
        "|---|---|---|",
    ]
    lines += [f"| {row['room']} | {row['recent']:.1f} | {row['ahead']:.1f} |" for row in cached]
    return "\n".join(lines) + "\n"


def run() -> None:
    """The command: parses the flags, then calls `main`."""
    cli.run(main)


if __name__ == "__main__":
    run()
