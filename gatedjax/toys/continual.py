"""Tasks learned one after the other by gated class-attention (arXiv 2211.12292), on generated rows.

Each task has three prototypes of its own. A row is noise, and one prototype of every task at places
by chance; its class is which of the task's own it has, so that a task has to look past the others'.
With masks, what earlier tasks use is kept: their accuracy at the end is what it was.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int, PyTree

from gatedjax.layers.class_attention import (
    GatedClassAttention,
    annealed_scale,
    compensated,
    kept_fraction,
    mask_penalty,
    task_mask,
    used_before,
)

TASKS, CLASSES, LENGTH, WIDTH, HEADS = 3, 3, 6, 32, 4
BATCH = 64
# Steps over which s grows, s_max, and the weight of the penalty.
EPOCH, LARGEST, PENALTY = 100, 100.0, 0.5
EVALUATED = 1000
MODEL = GatedClassAttention(num_heads=HEADS, num_tasks=TASKS, init_std=0.2)


class Rows(NamedTuple):
    """Tokens, and which prototype is among them."""

    tokens: Float[Array, "B T M"]
    classes: Int[Array, " B"]


def drawn_rows(task: int, key: Array, number: int = BATCH) -> Rows:
    """Rows by chance, and their classes in a task."""
    prototypes = np.random.default_rng(0).normal(size=(TASKS, CLASSES, WIDTH)).astype(np.float32)
    of_class, of_place, of_noise = jax.random.split(key, 3)
    classes = jax.random.randint(of_class, (number, TASKS), 0, CLASSES)
    # The first places of a random order are the tasks'.
    order = jnp.argsort(jax.random.uniform(of_place, (number, LENGTH)), axis=1)[:, :TASKS]
    shown = jnp.asarray(prototypes)[jnp.arange(TASKS), classes]
    noise = 0.5 * jax.random.normal(of_noise, (number, LENGTH, WIDTH))
    rows = jnp.arange(number)[:, None]
    return Rows(noise.at[rows, order].add(shown), classes[:, task])


def first_params(key: Array) -> PyTree:
    """Of the attention, and a head for each task."""
    of_attention, of_heads = jax.random.split(key)
    tokens = jnp.zeros((1, LENGTH, WIDTH))
    attention: Any = MODEL.init(of_attention, tokens, 0, 1.0)["params"]
    heads = 0.1 * jax.random.normal(of_heads, (TASKS, WIDTH, CLASSES))
    return {"attention": attention, "heads": heads}


def class_logits(
    params: PyTree,
    tokens: Float[Array, "B T M"],
    task: int,
    scale: Float[Array, ""] | float,
) -> Float[Array, "B _"]:
    """Of the classes of a task, by its masks and its head."""
    y: Any = MODEL.apply({"params": params["attention"]}, tokens, task, scale)
    return y[:, 0] @ params["heads"][task]


def kept_gradients(
    gradient: PyTree,
    params: PyTree,
    task: int,
    scale: Float[Array, ""],
) -> PyTree:
    """The gradients of a task that leave earlier ones as they are.

    Args:
      gradient: of the loss.
      params: of the model.
      task: which one learns.
      scale: s, of the masks.
    """
    attention = dict(gradient["attention"])
    embeddings = params["attention"]["tasks"]
    before = used_before(task_mask(embeddings[:task], LARGEST))
    ones = jnp.ones(WIDTH)
    kernels = {"query": before[0], "key": before[1], "value": before[2]}
    for name, of_outputs in kernels.items():
        kept = kept_fraction(ones, of_outputs)
        kernel = attention[name]["kernel"]
        attention[name] = {"kernel": kernel * kept.reshape(kernel.shape)}
    kernel = attention["out"]["kernel"]
    kept = kept_fraction(before[2], ones)
    attention["out"] = {"kernel": kernel * kept.reshape(kernel.shape)}
    # The class token asks for all tasks: the first one settles it.
    attention["class_token"] = attention["class_token"] * (task == 0)
    own = jnp.arange(TASKS)[:, None, None] == task
    of_masks = compensated(attention["tasks"], embeddings, scale, LARGEST)
    attention["tasks"] = jnp.where(own, of_masks, 0)
    return {"attention": attention, "heads": gradient["heads"]}


def learned(params: PyTree, task: int, steps: int, with_masks: bool) -> PyTree:
    """The parameters after a task.

    Args:
      params: before it.
      task: its number.
      steps: of training.
      with_masks: False: one set of weights for all tasks, masks of 1.
    """
    tx = optax.adam(3e-3)
    before = used_before(task_mask(params["attention"]["tasks"][:task], LARGEST))

    def loss(params: PyTree, rows: Rows, scale: Array) -> Array:
        logits = class_logits(params, rows.tokens, task, scale)
        of_rows = optax.softmax_cross_entropy_with_integer_labels(logits, rows.classes)
        mask = task_mask(params["attention"]["tasks"][task], scale)
        return jnp.mean(of_rows) + PENALTY * with_masks * mask_penalty(mask, before)

    def step(carry: tuple[PyTree, Any], given: tuple[Array, Array]):
        params, state = carry
        number, key = given
        scale = annealed_scale(number % EPOCH, EPOCH, LARGEST)
        gradient = jax.grad(loss)(params, drawn_rows(task, key), scale)
        if with_masks:
            gradient = kept_gradients(gradient, params, task, scale)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(task), steps)
    given = (jnp.arange(steps), keys)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, given)[0])
    params, _ = run((params, tx.init(params)))
    return params


def accuracy(params: PyTree, task: int) -> float:
    """On new rows of a task, its masks hard."""
    rows = drawn_rows(task, jax.random.key(1000 + task), EVALUATED)
    found = jnp.argmax(class_logits(params, rows.tokens, task, LARGEST), axis=-1)
    return float(jnp.mean(found == rows.classes))


def run(steps: int) -> list[str]:
    """Learns the tasks with and without masks; lines for people."""
    lines = []
    for with_masks in (True, False):
        params = first_params(jax.random.key(0))
        if not with_masks:
            # sigmoid(s e) is 1 from the smallest s on.
            params["attention"]["tasks"] = jnp.full_like(params["attention"]["tasks"], 1e4)
        at_once = []
        for task in range(TASKS):
            params = learned(params, task, steps, with_masks)
            at_once.append(accuracy(params, task))
        at_end = [accuracy(params, task) for task in range(TASKS)]
        name = "masks" if with_masks else "no masks"
        pairs = ", ".join(f"{a:.0%} -> {b:.0%}" for a, b in zip(at_once, at_end))
        lines.append(f"{name}: accuracy of each task when learned -> at the end: {pairs}")
    return lines
