"""Exits learn on the training text: their norms, gates in turns with them (JEI-DNN), or a gate of
the depth after a model that was trained for its exits too (ECO-M2F, arXiv 2404.15244).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, PyTree

from gatedjax.config import ModelConfig
from gatedjax.data import Batch
from gatedjax.evaluation import exits as early
from gatedjax.evaluation.exits import DepthGate, Exits
from gatedjax.evaluation.learning import followed, training_text
from gatedjax.layers.gate_values import COLLECTION
from gatedjax.model import LanguageModel, head_weights
from gatedjax.training.run import Run
from gatedjax.training.teacher import by_layer

Report = Callable[[str], None]


class Learning(NamedTuple):
    """How exits learn.

    steps: of each thing that learns.
    phase: with gates, the most steps between exits and gates.
    rate: of Adam.
    """

    steps: int
    phase: int
    rate: float


class Seen(NamedTuple):
    """Of a batch: logits of every exit, and of the end; the residual stream after the first exit's
    layer.
    """

    of_exits: list[Array]
    of_end: Array
    first: Float[Array, "B T M"]

    @property
    def all(self) -> list[Array]:
        """Of the exits and the end."""
        return [*self.of_exits, self.of_end]


def predictions(
    model: ModelConfig,
    layers: tuple[int, ...],
    params: PyTree,
    exits: Exits,
    batch: Batch,
) -> Seen:
    """What the exits and the end say of a batch.

    Args:
      model: its configuration.
      layers: after how many layers each exit is.
      params: of the model.
      exits: their parameters.
      batch: rows of text.
    """
    outputs: Any = LanguageModel(model).apply(
        {"params": params},
        batch.tokens,
        batch.positions,
        batch.segment_ids,
        mutable=[COLLECTION],
    )
    (hidden, _, _), state = outputs
    residuals = by_layer(model, state[COLLECTION], "residual")
    weights = head_weights(params).astype(hidden.dtype)
    of_exits = []
    for index, layer in enumerate(layers):
        x = residuals[layer - 1]
        of_exits.append(early.exit_logits(x, exits.scale[index], weights, model.norm_eps))
    return Seen(of_exits, early.logits(hidden, weights), residuals[layers[0] - 1])


def token_losses(predicted: Array, batch: Batch) -> Float[Array, "B T"]:
    """Nats of the next token."""
    log_p = jax.nn.log_softmax(predicted)
    targets = jnp.asarray(batch.targets)[..., None]
    return -jnp.take_along_axis(log_p, targets, axis=-1)[..., 0]


def _all_losses(predicted: list[Array], batch: Batch) -> Float[Array, "B T _"]:
    return jnp.stack([token_losses(p, batch) for p in predicted], axis=-1)


def _mean(by_token: Float[Array, "B T"], batch: Batch) -> Float[Array, ""]:
    mask = jnp.asarray(batch.loss_mask, jnp.float32)
    return jnp.sum(by_token * mask) / jnp.maximum(jnp.sum(mask), 1.0)


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
    seen = predictions(model, layers, jax.lax.stop_gradient(params), exits, batch)
    losses = _all_losses(seen.of_exits, batch)
    by_token = jnp.sum(losses, axis=-1)
    if cost_weight is not None:
        numbers = [jax.lax.stop_gradient(early.features(p)) for p in seen.of_exits]
        gates = jnp.stack(
            [early.gate_values(exits, i, n) for i, n in enumerate(numbers)],
            axis=-1,
        )
        if of_gates:
            every = jax.lax.stop_gradient(_all_losses(seen.all, batch))
            best = early.cheapest(every, costs, cost_weight)
            by_token = early.gate_loss(gates, best)
        else:
            reached = early.exit_probabilities(jax.lax.stop_gradient(gates))[..., :-1]
            by_token = jnp.sum(reached * losses, axis=-1)
    return _mean(by_token, batch)


def parent_loss(
    trained: tuple[Exits, PyTree],
    batch: Batch,
    model: ModelConfig,
    layers: tuple[int, ...],
) -> Float[Array, ""]:
    """`sum_k a_k loss_k` over the exits and the end, a_k = its number of layers / all of them.

    Weights that rise with the depth, so that the exits do not spoil the end (ECO-M2F, step A).

    Args:
      trained: the exits and the model's parameters; both learn.
      batch: rows of text.
      model: its configuration.
      layers: after how many layers each exit is.
    """
    exits, params = trained
    seen = predictions(model, layers, params, exits, batch)
    weights = jnp.asarray([*layers, model.num_layers]) / model.num_layers
    return _mean(_all_losses(seen.all, batch) @ weights, batch)


def depth_loss(
    gate: DepthGate,
    batch: Batch,
    exits: Exits,
    params: PyTree,
    model: ModelConfig,
    layers: tuple[int, ...],
    costs: Float[Array, " E+1"],
    cost_weight: float,
) -> Float[Array, ""]:
    """Cross-entropy of the gate with the exit of the most utility: -loss_k - cost_weight cost_k.

    (ECO-M2F, steps B and C, u(k) = q_k - beta k.)

    Args:
      gate: it learns.
      batch: rows of text.
      exits: as they are.
      params: of the model, frozen.
      model: its configuration.
      layers: after how many layers each exit is.
      costs: of each exit, the end's is 1.
      cost_weight: nats that the end's cost is worth.
    """
    seen = jax.lax.stop_gradient(predictions(model, layers, params, exits, batch))
    best = early.cheapest(_all_losses(seen.all, batch), costs, cost_weight)
    chosen = jax.nn.log_softmax(early.depth_logits(gate, seen.first, model.norm_eps))
    return _mean(-jnp.take_along_axis(chosen, best[..., None], axis=-1)[..., 0], batch)


def _final_scale(run: Run, params: PyTree) -> Float[Array, " M"]:
    scale = params["final_norm"]["scale"]
    return 1.0 + scale if run.config.model.zero_centered_norm else scale


def learned(
    run: Run,
    params: PyTree,
    layers: tuple[int, ...],
    costs: np.ndarray,
    cost_weight: float | None,
    learning: Learning,
    report: Report,
) -> Exits:
    """Exits, and with a cost gates too, in turns: a phase of exits, a phase of gates.

    The first phase is of exits alone, all of which count alike.

    Args:
      run: of the model.
      params: of it.
      layers: after how many layers each exit is.
      costs: FLOPs of each exit.
      cost_weight: of gates; None without.
      learning: how.
      report: told the losses.
    """
    model = run.config.model
    # Any: to optax a tree of parameters.
    exits: Any = early.fresh_exits(len(layers), _final_scale(run, params))
    tx = optax.adam(learning.rate)
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

    stream = training_text(run)
    phases = 1 if cost_weight is None else 4
    steps = learning.steps
    if phases > 1:
        steps = min(steps, learning.phase)
    for phase in range(phases):
        of_gates = phase % 2 == 1
        weight = None if phase == 0 else cost_weight
        loss = jnp.float32(0.0)
        for _ in range(steps):
            exits, state, loss = step(exits, state, next(stream), params, weight, of_gates)
        report(f"{'gates' if of_gates else 'exits'}: loss {float(loss):.4f}")
    return exits


def trained_parent(
    run: Run,
    params: PyTree,
    layers: tuple[int, ...],
    steps: int,
    rate: float,
    report: Report,
) -> tuple[Exits, PyTree]:
    """Exits and model, trained together by `parent_loss`.

    Args:
      run: of the model.
      params: of it, where it starts.
      layers: after how many layers each exit is.
      steps: of training.
      rate: of Adam.
      report: told the loss.
    """
    model = run.config.model
    exits = early.fresh_exits(len(layers), _final_scale(run, params))

    def loss(trained: tuple[Exits, PyTree], batch: Batch) -> Array:
        return parent_loss(trained, batch, model, layers)

    trained, last = followed(loss, (exits, params), training_text(run), steps, rate)
    report(f"model and exits: loss {last:.4f}")
    return trained


def learned_depth(
    run: Run,
    params: PyTree,
    exits: Exits,
    layers: tuple[int, ...],
    costs: np.ndarray,
    cost_weight: float,
    learning: Learning,
    report: Report,
) -> DepthGate:
    """The gate that chooses the depth of a token, for one price of computing.

    Args:
      run: of the model.
      params: of it.
      exits: their parameters.
      layers: after how many layers each exit is.
      costs: FLOPs of each exit.
      cost_weight: nats that the end's cost is worth.
      learning: how.
      report: told the loss.
    """
    model = run.config.model
    relative = jnp.asarray(costs / costs[-1], jnp.float32)

    def loss(gate: DepthGate, params: PyTree, batch: Batch) -> Array:
        return depth_loss(gate, batch, exits, params, model, layers, relative, cost_weight)

    start = early.fresh_depth_gate(model.width, len(layers))
    stream = training_text(run)
    gate, last = followed(loss, start, stream, learning.steps, learning.rate, params)
    report(f"gate of the depth: loss {last:.4f}")
    return gate
