"""Clicks that are predicted by FinalMLP (arXiv 2304.00902), on generated rows.

A row is a user, an item and a context. Who clicks depends on the product of what a user likes and
what an item has, and on the context; an MLP alone learns products slowly.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int

from gatedjax.layers.two_streams import FinalMLP
from gatedjax.toys.fit import fitted

SIZES = (200, 200, 10)
BATCH = 512


class World(NamedTuple):
    """What users like, what items have, and how each context shifts the odds."""

    likes: Float[Array, "users D"]
    has: Float[Array, "items D"]
    shift: Float[Array, " contexts"]


class Rows(NamedTuple):
    """Fields, and whether there was a click."""

    fields: Int[Array, "B 3"]
    clicks: Float[Array, " B"]


def made_world(seed: int = 0, dim: int = 4) -> World:
    """A world by chance."""
    rng = np.random.default_rng(seed)
    users, items, contexts = SIZES
    return World(
        likes=jnp.asarray(rng.normal(size=(users, dim)), jnp.float32),
        has=jnp.asarray(rng.normal(size=(items, dim)), jnp.float32),
        shift=jnp.asarray(rng.normal(size=contexts), jnp.float32),
    )


def odds(world: World, fields: Int[Array, "B 3"]) -> Float[Array, " B"]:
    """The logarithm of the true odds of a click."""
    user, item, context = fields.T
    return jnp.sum(world.likes[user] * world.has[item], axis=-1) + world.shift[context]


def drawn_rows(world: World, key: Array, number: int = BATCH) -> Rows:
    """Rows by chance, and who clicked."""
    of_fields, of_clicks = jax.random.split(key)
    fields = jax.random.randint(of_fields, (number, 3), 0, jnp.asarray(SIZES))
    clicks = jax.random.bernoulli(of_clicks, jax.nn.sigmoid(odds(world, fields)))
    return Rows(fields, clicks.astype(jnp.float32))


def ranking_quality(scores: Float[np.ndarray, " B"], clicks: Float[np.ndarray, " B"]) -> float:
    """The area under the ROC curve: how often a click has a higher score than a row without one."""
    order = np.argsort(np.argsort(np.asarray(scores), kind="stable"), kind="stable") + 1.0
    is_click = np.asarray(clicks) > 0
    positive = is_click.sum()
    negative = is_click.size - positive
    return float((order[is_click].sum() - positive * (positive + 1) / 2) / (positive * negative))


def run(steps: int) -> list[str]:
    """Trains FinalMLP with and without gates that depend on the row; lines for people."""
    world = made_world()
    test = drawn_rows(world, jax.random.key(10_000), 20_000)
    clicks = np.asarray(test.clicks)
    best = ranking_quality(np.asarray(odds(world, test.fields)), clicks)
    lines = [f"true odds: AUC {best:.3f}"]
    for name, contexts in {"plain gates": ((), ()), "gates by user, item": ((0,), (1,))}.items():
        model = FinalMLP(SIZES, contexts=contexts)
        params = model.init(jax.random.key(1), test.fields[:2])

        def loss(params, rows, model=model):
            logits: Any = model.apply(params, rows.fields)
            return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, rows.clicks))

        def batch(key: Array) -> Rows:
            return drawn_rows(world, key)

        params = fitted(loss, params, batch, steps=steps, rate=3e-3)
        scores: Any = model.apply(params, test.fields)
        auc = ranking_quality(np.asarray(scores), clicks)
        lines.append(f"FinalMLP, {name}: AUC {auc:.3f}")
    return lines
