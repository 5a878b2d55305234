"""A Mamba layer of one head learns in context although examples are outliers (arXiv 2510.00399).

A prompt has examples p_i = (x_i, y_i) and a query (x_q, 0). A task is two of the relevant patterns:
y is 1 with the first, -1 with the second. x = mu_j + kappa nu_k, a relevant pattern and some of an
irrelevant one; an outlier has kappa_a v besides, and a label that says nothing. The layer is

    F = sum_i G_i y_i (W_B p_i) (W_C p_q),   G_i = s(w p_i) prod_{j > i} (1 - s(w p_j)),

with s the sigmoid and j up to the query: `linear_scan` of keys s(w p_i) W_B p_i with the log decay
log(1 - s(w p_i)). Linear attention is the same with all G_i = 1 / l.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Bool, Float

from gatedjax.evidence.fresh_data import trained_on_fresh_data

# Prompts that an error is a mean over.
EVALUATION_PROMPTS = 8_192


class Layer(NamedTuple):
    """One head: W_B and W_C make keys and queries, w the gate."""

    key: Float[Array, "N D"]
    query: Float[Array, "N D"]
    gate: Float[Array, " D"]


class Prompts(NamedTuple):
    """Examples with their labels, a query with its answer, and which examples are outliers."""

    tokens: Float[Array, "B L D"]
    query: Float[Array, "B D"]
    answer: Float[Array, " B"]
    is_outlier: Bool[Array, "B L"]


class Patterns(NamedTuple):
    """Rows of length 1, at right angles to each other."""

    relevant: Float[Array, "M d"]
    irrelevant: Float[Array, "N d"]
    outliers: Float[Array, "V d"]


def gates(w: Float[Array, " D"], tokens: Float[Array, "B L D"]) -> Float[Array, "B L"]:
    """G_i of every example, from a prompt with its query as the last token."""
    logits = tokens @ w
    # log(1 - s(z)) = log s(-z), of all tokens after the example.
    closing = jax.nn.log_sigmoid(-logits)
    after = jnp.cumsum(closing[:, ::-1], axis=1)[:, ::-1] - closing
    return jnp.exp(jax.nn.log_sigmoid(logits) + after)[:, :-1]


def predict(layer: Layer, prompts: Prompts, is_gated: bool = True) -> Float[Array, " B"]:
    """F of every prompt; its sign is the answer.

    Args:
      layer: the parameters.
      prompts: what is asked.
      is_gated: Mamba's; linear attention otherwise.
    """
    products = jnp.einsum("bld,nd,bn->bl", prompts.tokens, layer.key, prompts.query @ layer.query.T)
    length = prompts.tokens.shape[1]
    weights = jnp.full_like(products, 1.0 / length)
    if is_gated:
        whole = jnp.concatenate([prompts.tokens, prompts.query[:, None]], axis=1)
        weights = gates(layer.gate, whole)
    return jnp.sum(weights * products * prompts.tokens[..., -1], axis=1)


def patterns_of(relevant: int, irrelevant: int, outliers: int, width: int) -> Patterns:
    """Random ones, the same for all seeds of a study.

    Args:
      relevant, irrelevant, outliers: how many there are of each.
      width: d.
    """
    random = np.random.default_rng(0).normal(size=(width, width))
    rows = np.linalg.qr(random)[0].astype(np.float32)
    ends = np.cumsum([relevant, irrelevant, outliers])
    return Patterns(*(jnp.asarray(part) for part in np.split(rows, ends)[:3]))


def tasks_of(relevant: int, is_known: bool) -> np.ndarray:
    """Pairs of patterns (that of label 1, that of label -1): those of training, or all others.

    In both every pattern has each label equally often. A pair of training is at most 3 apart, on a
    circle: three patterns may meet each other, so that no two kinds of them can be told apart.
    """
    pairs = []
    for first in range(relevant):
        for step in range(1, relevant):
            if (step <= 3) == is_known:
                pairs.append((first, (first + step) % relevant))
    return np.asarray(pairs)


def draw_prompts(
    rng: Array,
    patterns: Patterns,
    tasks: np.ndarray,
    shape: tuple[int, int],
    fraction: float,
    strength: float,
    flipped: bool,
) -> Prompts:
    """Prompts of random tasks.

    Args:
      rng: a JAX key.
      patterns: what examples are made of.
      tasks: pairs of relevant patterns.
      shape: how many prompts, and how many examples each.
      fraction: of examples that are outliers.
      strength: kappa_a.
      flipped: outliers have the wrong label, and are made of a random mixture of the outlier
        patterns; otherwise a label by chance, and one of the patterns.
    """
    num_prompts, length = shape
    keys = jax.random.split(rng, 7)
    task = jnp.asarray(tasks)[jax.random.randint(keys[0], (num_prompts,), 0, len(tasks))]
    # The query comes last.
    side = jax.random.randint(keys[1], (num_prompts, length + 1), 0, 2)
    label = 1.0 - 2.0 * side
    of_task = jnp.take_along_axis(task, side, axis=1)
    irrelevant = jax.random.randint(keys[2], side.shape, 0, len(patterns.irrelevant))
    kappa = jax.random.uniform(keys[3], side.shape, minval=-0.5, maxval=0.5)
    x = patterns.relevant[of_task] + kappa[..., None] * patterns.irrelevant[irrelevant]
    is_outlier = jax.random.uniform(keys[4], side.shape) < fraction
    is_outlier = is_outlier.at[:, -1].set(False)
    count = len(patterns.outliers)
    if flipped:
        # Uniform over mixtures: exponential variables over their sum.
        parts = jax.random.exponential(keys[5], (*side.shape, count))
        mixture = parts / jnp.sum(parts, axis=-1, keepdims=True)
        shown = -label
    else:
        mixture = jax.nn.one_hot(jax.random.randint(keys[5], side.shape, 0, count), count)
        shown = jax.random.rademacher(keys[6], side.shape, jnp.float32)
    x = x + strength * jnp.where(is_outlier[..., None], mixture @ patterns.outliers, 0.0)
    y = jnp.where(is_outlier, shown, label).at[:, -1].set(0.0)
    tokens = jnp.concatenate([x, y[..., None]], axis=-1)
    return Prompts(tokens[:, :-1], tokens[:, -1], label[:, -1], is_outlier[:, :-1])


def hinge(prediction: Float[Array, " B"], answer: Float[Array, " B"]) -> Float[Array, ""]:
    """The mean of max(0, 1 - y F)."""
    return jnp.mean(jax.nn.relu(1.0 - answer * prediction))


@dataclasses.dataclass(frozen=True)
class OutliersInContext:
    """Trains a layer on prompts of which some examples are outliers; says where it errs.

    Attributes:
      mixer: "mamba" or "linear".
      fraction: of outliers in training.
      steps: of gradient descent on new prompts each time.
      tested: fractions of outliers that it is tested with.
      length: examples of a prompt.
      width: d, of x.
      relevant, irrelevant, outliers: how many patterns there are of each.
      strength: kappa_a.
      start: W_B and W_C are start x the identity on x.
      rows: of a batch.
      lr: the rate.
    """

    mixer: str
    fraction: float
    steps: int = 4_000
    tested: tuple[float, ...] = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8)
    length: int = 20
    width: int = 20
    relevant: int = 8
    irrelevant: int = 4
    outliers: int = 3
    strength: float = 2.0
    start: float = 0.2
    rows: int = 32
    lr: float = 1.0

    def __call__(self, seed: int) -> dict[str, float]:
        training, evaluation = jax.random.split(jax.random.key(seed))
        layer = _trained(self, training)
        values = {}
        for fraction in self.tested:
            prompts = self.prompts(evaluation, EVALUATION_PROMPTS, fraction, is_test=True)
            right = predict(layer, prompts, self.mixer == "mamba") * prompts.answer > 0
            values[f"error@{fraction}"] = float(1.0 - jnp.mean(right))
        if self.mixer == "mamba":
            prompts = self.prompts(evaluation, EVALUATION_PROMPTS, 0.5, is_test=True)
            opened = jax.nn.sigmoid(prompts.tokens @ layer.gate)
            values["gate_clean"] = float(jnp.mean(opened, where=~prompts.is_outlier))
            values["gate_outlier"] = float(jnp.mean(opened, where=prompts.is_outlier))
        return values

    def prompts(self, rng: Array, num_prompts: int, fraction: float, is_test: bool) -> Prompts:
        """Those of training, or those of a test: other tasks, other outliers, wrong labels.

        Args:
          rng: a JAX key.
          num_prompts: how many.
          fraction: of outliers.
          is_test: which of the two.
        """
        return draw_prompts(
            rng,
            patterns_of(self.relevant, self.irrelevant, self.outliers, self.width),
            tasks_of(self.relevant, is_known=not is_test),
            (num_prompts, self.length),
            fraction,
            self.strength,
            flipped=is_test,
        )


def initial(start: float, width: int) -> Layer:
    """W_B = W_C = start x the identity on x, 0 on y; a gate of zeros."""
    matrix = start * jnp.eye(width, width + 1)
    return Layer(matrix, matrix, jnp.zeros(width + 1))


@functools.partial(jax.jit, static_argnums=0)
def _trained(run: OutliersInContext, rng: Array) -> Layer:
    def loss(layer: Layer, prompts: Prompts) -> Array:
        return hinge(predict(layer, prompts, run.mixer == "mamba"), prompts.answer)

    def draw(key: Array) -> Prompts:
        return run.prompts(key, run.rows, run.fraction, is_test=False)

    start = initial(run.start, run.width)
    keys = jax.random.split(rng, run.steps)
    return trained_on_fresh_data(optax.sgd(run.lr), loss, draw, start, keys)
