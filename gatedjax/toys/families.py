"""Dynamical systems of two families, told apart by a fitted gate (MixER), on generated data.

An environment is a linear oscillator of some frequency or van der Pol's of some damping; which, and
its number, nobody says. It has a context vector of its own, learned with the experts: vector fields
of a state and a context. A step of the fourth-order Runge-Kutta rule has to lead from each state to
the next one. New environments get a context by descent, with everything else as it is.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int, PyTree

from gatedjax.layers.moe.fitted_gate import chosen_experts, fitted_gate

ENVIRONMENTS, CONTEXT, HIDDEN = 16, 2, 16
STEP, POINTS = 0.1, 64
# Steps between two fits of the gate, and of descent on a new environment's context.
EVERY, ADAPTED, STARTS = 100, 200, 4


class Systems(NamedTuple):
    """Pairs of states, one step apart, of every environment, and its family."""

    before: Float[Array, "N P 2"]
    after: Float[Array, "N P 2"]
    family: Int[np.ndarray, " N"]


def runge_kutta(field: Any, x: Any, step: float) -> Any:
    """x after a step of `dx/dt = field(x)`, of fourth order."""
    a = field(x)
    b = field(x + step / 2 * a)
    c = field(x + step / 2 * b)
    d = field(x + step * c)
    return x + step / 6 * (a + 2 * b + 2 * c + d)


def drawn_systems(seed: int, count: int = ENVIRONMENTS) -> Systems:
    """Environments by chance, half of each family."""
    rng = np.random.default_rng(seed)
    family = rng.permutation(np.arange(count) % 2)
    number = np.where(family == 0, rng.uniform(1.5, 2.0, count), rng.uniform(0.5, 1.0, count))
    states = rng.uniform(-2, 2, (count, POINTS, 2))
    number_of, is_linear = number[:, None], (family == 0)[:, None]

    def field(x: np.ndarray) -> np.ndarray:
        position, velocity = x[..., 0], x[..., 1]
        linear = -(number_of**2) * position
        van_der_pol = number_of * (1 - position**2) * velocity - position
        return np.stack([velocity, np.where(is_linear, linear, van_der_pol)], axis=-1)

    after = states
    for _ in range(10):
        after = runge_kutta(field, after, STEP / 10)
    return Systems(jnp.asarray(states, jnp.float32), jnp.asarray(after, jnp.float32), family)


def fresh_experts(key: Array, count: int, hidden: int) -> PyTree:
    """The networks of the vector fields, stacked."""
    sizes = (2 + CONTEXT, hidden, hidden, 2)
    experts = {}
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        key, own = jax.random.split(key)
        experts[f"w{i}"] = jax.random.normal(own, (count, inputs, outputs)) / inputs**0.5
        experts[f"b{i}"] = jnp.zeros((count, outputs))
    return experts


def losses_by_expert(
    experts: PyTree,
    contexts: Float[Array, "N C"],
    systems: Systems,
) -> Float[Array, "N E"]:
    """The mean square error of every expert in every environment, over a step's square."""

    def one(expert: PyTree, context: Array, before: Array, after: Array) -> Array:
        def field(x: Float[Array, "P 2"]) -> Float[Array, "P 2"]:
            h = jnp.concatenate([x, jnp.broadcast_to(context, (len(x), CONTEXT))], axis=-1)
            for i in range(3):
                h = h @ expert[f"w{i}"] + expert[f"b{i}"]
                h = jnp.tanh(h) if i < 2 else h
            return h

        error = runge_kutta(field, before, STEP) - after
        return jnp.mean(error**2) / STEP**2

    of_experts = jax.vmap(one, (0, None, None, None))
    return jax.vmap(of_experts, (None, 0, 0, 0))(experts, contexts, systems.before, systems.after)


class Trained(NamedTuple):
    """Experts, contexts, and the gate; None for the gate of one expert."""

    experts: PyTree
    contexts: Float[Array, "N C"]
    gate: Float[np.ndarray, "C+1 E"] | None


def choice(gate: np.ndarray | None, contexts: Array) -> Int[np.ndarray, " N"]:
    """The expert of every environment."""
    if gate is None:
        return np.zeros(len(contexts), np.int64)
    return chosen_experts(np.asarray(contexts, np.float64), gate)


def trained(systems: Systems, count: int, hidden: int, steps: int) -> Trained:
    """Experts and contexts by descent, the gate by fits in between.

    Args:
      systems: to learn from.
      count: of experts.
      hidden: channels of each.
      steps: of descent.
    """
    rng = np.random.default_rng(0)
    experts = fresh_experts(jax.random.key(0), count, hidden)
    # From one place: where they go is what tells environments apart.
    contexts = jnp.zeros((len(systems.family), CONTEXT))
    gate = None
    centroids = np.zeros((count, CONTEXT))
    tx = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
    state = tx.init((experts, contexts))
    rows = np.arange(len(systems.family))

    @jax.jit
    def step(given: Any, state: Any, weights: Array):
        def loss(given: Any) -> Array:
            experts, contexts = given
            losses = losses_by_expert(experts, contexts, systems)
            return jnp.mean(jnp.sum(weights * losses, axis=1))

        updates, state = tx.update(jax.grad(loss)(given), state)
        return optax.apply_updates(given, updates), state

    every = jax.jit(losses_by_expert)
    given = (experts, contexts)
    # A gate of zeros prefers none: until the first fit, when contexts have moved apart, all experts
    # learn from all environments.
    weights = np.full((len(rows), count), 1 / count)
    for number in range(steps):
        if count > 1 and number % EVERY == 0 and number >= steps // 4:
            experts, contexts = given
            if gate is None:
                centroids = np.asarray(contexts, np.float64)[rng.permutation(len(rows))[:count]]
            losses = np.asarray(every(experts, contexts, systems), np.float64)
            fitted, clusters = fitted_gate(np.asarray(contexts, np.float64), losses, centroids, rng)
            if fitted is not None:
                gate, centroids = fitted, clusters.centroids
                weights = np.eye(count)[choice(gate, contexts)]
        given, state = step(given, state, jnp.asarray(weights))
    return Trained(*given, gate)


def adapted(model: Trained, systems: Systems) -> tuple[Float[Array, "N C"], float]:
    """Contexts of new environments, and the root mean square error; experts and gate stay."""
    tx = optax.adam(3e-2)
    contexts = jnp.zeros((len(systems.family), CONTEXT))
    rows = np.arange(len(systems.family))

    @jax.jit
    def step(contexts: Array, state: Any, expert: Array):
        def loss(contexts: Array) -> Array:
            return jnp.sum(losses_by_expert(model.experts, contexts, systems)[rows, expert])

        updates, state = tx.update(jax.grad(loss)(contexts), state)
        return optax.apply_updates(contexts, updates), state

    best = jnp.zeros_like(systems.before[:, 0]), jnp.full(len(rows), jnp.inf)
    # From several places: contexts of one family do not lead into the other one.
    for start in model.contexts[:STARTS]:
        moved, state = jnp.broadcast_to(start, contexts.shape), tx.init(contexts)
        for _ in range(ADAPTED):
            moved, state = step(moved, state, jnp.asarray(choice(model.gate, moved)))
        losses = losses_by_expert(model.experts, moved, systems)
        own = losses[rows, choice(model.gate, moved)]
        is_better = own < best[1]
        best = jnp.where(is_better[:, None], moved, best[0]), jnp.minimum(own, best[1])
    return best[0], float(jnp.sqrt(jnp.mean(best[1])))


def agreement(expert: Int[np.ndarray, " N"], family: Int[np.ndarray, " N"]) -> float:
    """The fraction of environments of whose expert's environments most are of their family."""
    counts = np.zeros((2, expert.max() + 1))
    np.add.at(counts, (family, expert), 1)
    return float(counts.max(axis=0).sum() / len(family))


def run(steps: int) -> list[str]:
    """Trains one expert, and three together as large with a fitted gate; lines for people."""
    systems, new = drawn_systems(0), drawn_systems(1, 8)
    lines = []
    for name, count, hidden in (("one expert", 1, 2 * HIDDEN), ("three, fitted gate", 3, HIDDEN)):
        model = trained(systems, count, hidden, steps)
        expert = choice(model.gate, model.contexts)
        losses = losses_by_expert(model.experts, model.contexts, systems)
        error = float(jnp.sqrt(jnp.mean(losses[np.arange(len(expert)), expert])))
        contexts, of_new = adapted(model, new)
        line = f"{name}: RMS error of the vector field {error:.4f}, of new systems {of_new:.4f}"
        if count > 1:
            found = agreement(expert, systems.family)
            new_found = agreement(choice(model.gate, contexts), new.family)
            line += f"; families told apart {found:.0%}, of new systems {new_found:.0%}"
        lines.append(line)
    return lines
