"""A classifier that a user's own data are too much for, and a small local one with a gate beside it
(arXiv 1811.00056), on generated rows.

Everybody's rows are a prototype of their class and noise. A user's are turned and moved, as by an
accent: the global network, trained on everybody's, mostly fails on them. The local network and then
the gate learn from few of the user's rows (and as many of everybody's, for the gate); the global
one stays as it is.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int, PyTree

from gatedjax.layers.customized import customized_log_probs, customized_logits
from gatedjax.toys.fit import fitted

CLASSES, WIDTH, GLOBAL, LOCAL = 10, 32, 256, 8
BATCH, OF_USER, EVALUATED = 128, 200, 4000
Rows = tuple[Float[Array, "B M"], Int[Array, " B"]]


def drawn_rows(key: Array, number: int, of_user: bool) -> Rows:
    """Rows by chance and their classes, everybody's or the user's."""
    rng = np.random.default_rng(0)
    prototypes = jnp.asarray(rng.normal(size=(CLASSES, WIDTH)), jnp.float32)
    turn = jnp.asarray(np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0], jnp.float32)
    moved = jnp.asarray(rng.normal(size=WIDTH), jnp.float32)
    of_class, of_noise = jax.random.split(key)
    classes = jax.random.randint(of_class, (number,), 0, CLASSES)
    x = prototypes[classes] + 1.2 * jax.random.normal(of_noise, (number, WIDTH))
    return (x @ turn + moved if of_user else x), classes


def fresh_network(key: Array, hidden: int, outputs: int) -> PyTree:
    """An MLP with one hidden layer; its last matrix starts from 0."""
    return {
        "w": jax.random.normal(key, (WIDTH, hidden)) / WIDTH**0.5,
        "b": jnp.zeros(hidden),
        "out": jnp.zeros((hidden, outputs)),
    }


def applied(params: PyTree, x: Float[Array, "B M"]) -> Float[Array, "B _"]:
    """The MLP's outputs."""
    return jax.nn.relu(x @ params["w"] + params["b"]) @ params["out"]


def cross_entropy(params: PyTree, rows: Rows) -> Float[Array, ""]:
    """Of a network alone."""
    x, classes = rows
    losses = optax.softmax_cross_entropy_with_integer_labels(applied(params, x), classes)
    return jnp.mean(losses)


def size(params: PyTree) -> int:
    """How many numbers there are."""
    return sum(x.size for x in jax.tree.leaves(params))


def run(steps: int) -> list[str]:
    """Trains the three, one after the other; lines for people."""
    keys = jax.random.split(jax.random.key(0), 3)
    of_global = fitted(
        cross_entropy,
        fresh_network(keys[0], GLOBAL, CLASSES),
        lambda key: drawn_rows(key, BATCH, False),
        steps=steps,
        rate=1e-3,
    )
    few = drawn_rows(jax.random.key(1), OF_USER, True)
    of_local = fitted(
        cross_entropy,
        fresh_network(keys[1], LOCAL, CLASSES),
        lambda _: few,
        steps=steps // 4 + 1,
        rate=1e-2,
    )
    everybody = drawn_rows(jax.random.key(2), OF_USER, False)
    seen: Any = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), few, everybody)

    def gate_loss(gate: PyTree, rows: Rows) -> Float[Array, ""]:
        x, classes = rows
        log_p = customized_log_probs(
            applied(of_global, x), applied(of_local, x), applied(gate, x)[:, 0]
        )
        return -jnp.mean(jnp.take_along_axis(log_p, classes[:, None], axis=-1))

    fresh_gate = fresh_network(keys[2], LOCAL, 1)
    gate = fitted(gate_loss, fresh_gate, lambda _: seen, steps=steps // 4 + 1, rate=1e-2)

    def accuracy(logits: Float[Array, "B X"], classes: Int[Array, " B"]) -> float:
        return float(jnp.mean(jnp.argmax(logits, axis=-1) == classes))

    lines = []
    for name, of_user in (("everybody's", False), ("the user's", True)):
        x, classes = drawn_rows(jax.random.key(10_000), EVALUATED, of_user)
        both = applied(of_global, x), applied(of_local, x)
        first = customized_logits(*both, applied(fresh_gate, x)[:, 0])
        mixed = customized_logits(*both, applied(gate, x)[:, 0])
        found = [accuracy(logits, classes) for logits in (*both, first, mixed)]
        lines.append(
            f"{name} rows: accuracy of the global network {found[0]:.1%}, the local one "
            f"{found[1]:.1%}, both with a fresh gate {found[2]:.1%}, with the trained one "
            f"{found[3]:.1%}"
        )
    more = (size(of_local) + size(gate)) / size(of_global)
    lines.append(f"local network and gate: {more:.1%} of the global network's parameters")
    return lines
