"""Groups of examples with opposing signals (arXiv 2311.04163).

Between two steps of gradient descent the losses of some examples fall most and of others rise most.
These two groups share a feature of large magnitude that is right for one and wrong for the other
(there: a sky, of planes and of everything else that flies): the gradients of the two point in
opposite directions, and a step that is too long for that feature helps one group and hurts the
other, again and again, while the loss as a whole goes down.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

Params = dict[str, Array]


class Examples(NamedTuple):
    """has_large: whether the feature of large magnitude, the last one, is there."""

    x: Float[Array, "N d"]
    label: Float[Array, " N"]
    has_large: Bool[Array, " N"]


class Groups(NamedTuple):
    """Examples by the change of their losses."""

    falling: Int[np.ndarray, " size"]
    rising: Int[np.ndarray, " size"]


def opposing_groups(
    before: Float[np.ndarray, " N"], after: Float[np.ndarray, " N"], size: int
) -> Groups:
    """The examples whose losses fall most, and those whose losses rise most.

    Raises:
      ValueError: fewer than twice `size` examples.
    """
    if 2 * size > len(before):
        raise ValueError(f"size: got {size}, expected at most half of {len(before)} examples")
    order = np.argsort(np.asarray(after) - np.asarray(before), kind="stable")
    return Groups(order[:size], order[-size:])


def draw_examples(
    rng: Array,
    num_examples: int,
    width: int,
    fraction: float,
    magnitude: float,
) -> Examples:
    """Two classes that differ in small features; and a large feature in some examples.

    Args:
      rng: a JAX key.
      num_examples: N.
      width: d, the large feature included.
      fraction: of examples that have the large feature; it has the sign +1 whatever the class, and
        two of three of those are of class 1.
      magnitude: of the large feature.
    """
    keys = jax.random.split(rng, 4)
    has_large = jax.random.uniform(keys[0], (num_examples,)) < fraction
    odds = jnp.where(has_large, 2 / 3, 1 / 2)
    label = jnp.where(jax.random.uniform(keys[1], (num_examples,)) < odds, 1.0, -1.0)
    direction = jax.random.normal(keys[2], (width - 1,))
    direction = direction / jnp.linalg.norm(direction)
    noise = jax.random.normal(keys[3], (num_examples, width - 1))
    small = 0.5 * (noise + 2 * label[:, None] * direction)
    x = jnp.concatenate([small, magnitude * has_large[:, None]], axis=1)
    return Examples(x, label, has_large)


def losses(params: Params, examples: Examples) -> Float[Array, " N"]:
    """Half of the squared error of a linear network with two layers, example by example."""
    predicted = examples.x @ params["in"] @ params["out"]
    return 0.5 * (predicted - examples.label) ** 2


@dataclasses.dataclass(frozen=True)
class OpposingSignals:
    """Descends on all examples and looks at the groups of the last steps.

    Attributes:
      edge: the rate of descent, in units of 2 / sharpness at the start: from 1 on a step is too
        long for the sharpest direction, and descent oscillates along it.
      steps: of it.
      num_examples: N.
      width: d.
      hidden: units.
      fraction: of examples with the large feature.
      magnitude: of it.
      group: examples in a group.
      window: the last steps, over which means are taken.
    """

    edge: float
    steps: int = 40
    num_examples: int = 400
    width: int = 20
    hidden: int = 32
    fraction: float = 0.2
    magnitude: float = 8.0
    group: int = 20
    window: int = 30

    def __call__(self, seed: int) -> dict[str, float]:
        keys = jax.random.split(jax.random.key(seed), 2)
        examples = draw_examples(
            keys[0], self.num_examples, self.width, self.fraction, self.magnitude
        )
        params = _initial(keys[1], self.width, self.hidden)
        rate = float(2 * self.edge / sharpness(params, examples))
        params = _descended(self.steps - self.window, rate, params, examples)
        rng = np.random.default_rng(seed)
        seen = []
        for _ in range(self.window):
            after = _step(params, examples, rate)
            seen.append(self._look(params, after, examples, rng))
            params = after
        means = {name: float(np.mean([values[name] for values in seen])) for name in seen[0]}
        top = float(sharpness(params, examples))
        return {**means, "sharpness x rate / 2": top * rate / 2}

    def _look(
        self,
        params: Params,
        after: Params,
        examples: Examples,
        rng: np.random.Generator,
    ) -> dict[str, float]:
        changes = np.asarray(losses(params, examples)), np.asarray(losses(after, examples))
        groups = opposing_groups(*changes, self.group)
        random = Groups(*rng.permutation(self.num_examples)[: 2 * self.group].reshape(2, -1))
        has_large = np.asarray(examples.has_large)
        label = np.asarray(examples.label)
        return {
            "cosine": group_cosine(params, examples, groups),
            "cosine, random groups": group_cosine(params, examples, random),
            "with the feature": float(np.mean(has_large[np.concatenate(groups)])),
            "labels apart": float(
                abs(label[groups.falling].mean() - label[groups.rising].mean()) / 2
            ),
            "loss": float(changes[0].mean()),
        }


def group_cosine(params: Params, examples: Examples, groups: Groups) -> float:
    """Of the mean gradients of the two groups."""
    falling, rising = (_mean_gradient(params, _chosen(examples, group)) for group in groups)
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), falling, rising)
    total = sum(jax.tree.leaves(products))
    return float(total / (_norm(falling) * _norm(rising)))


def _chosen(examples: Examples, group: Int[np.ndarray, " size"]) -> Examples:
    return Examples(*(values[group] for values in examples))


@jax.jit
def _mean_gradient(params: Params, examples: Examples) -> Params:
    return jax.grad(lambda p: jnp.mean(losses(p, examples)))(params)


def _norm(tree: Params) -> Array:
    return jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)))


@jax.jit
def _step(params: Params, examples: Examples, rate: float) -> Params:
    gradient = _mean_gradient(params, examples)
    return jax.tree.map(lambda w, g: w - rate * g, params, gradient)


@functools.partial(jax.jit, static_argnums=0)
def _descended(steps: int, rate: float, params: Params, examples: Examples) -> Params:
    def step(_: Any, params: Params) -> Params:
        return _step(params, examples, rate)

    return jax.lax.fori_loop(0, steps, step, params)


def _initial(rng: Array, width: int, hidden: int) -> Params:
    keys = jax.random.split(rng, 2)
    return {
        "in": jax.random.normal(keys[0], (width, hidden)) * width**-0.5,
        "out": jax.random.normal(keys[1], (hidden,)) * hidden**-0.5,
    }


@jax.jit
def sharpness(params: Params, examples: Examples) -> Float[Array, ""]:
    """The largest eigenvalue of the loss's Hessian, by power iteration.

    Descent oscillates along its vector where this times the rate is above 2.
    """

    def gradient(p: Params) -> Params:
        return _mean_gradient(p, examples)

    def step(_: Any, carry: tuple[Params, Array]) -> tuple[Params, Array]:
        vector, _ = carry
        product = jax.jvp(gradient, (params,), (vector,))[1]
        length = _norm(product)
        return jax.tree.map(lambda x: x / length, product), length

    start = jax.tree.map(jnp.ones_like, params)
    return jax.lax.fori_loop(0, 100, step, (start, jnp.float32(0)))[1]
