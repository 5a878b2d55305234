"""What one layer of softmax attention learns of linear regression in context (arXiv 2503.12734).

A row has L pairs (x, y) with y = b x + noise and a b of its own, and a query x_q whose y is asked.
From random matrices the layer comes to a pattern: in every head, W_Q W_K^T is a multiple w of the
identity on the channels of x; W_V W_O reads y and nothing else, with a factor m; and the factors of
all heads sum to about zero. Two heads with w and -w, m and -m are

    sum_l (softmax(w x_l x_q) - softmax(-w x_l x_q)) m y_l = 2 w m / L sum_l (x_l - mean x) x_q y_l

up to terms of w^3: a step of gradient descent from zero, on centered inputs ("debiased").
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float

from gatedjax.evidence.fresh_data import trained_on_fresh_data

# Rows that a result is a mean over.
EVALUATION_ROWS = 16_384


class Rows(NamedTuple):
    """Regression problems: pairs, and a query with its answer."""

    x: Float[Array, "B L d"]
    y: Float[Array, "B L"]
    query: Float[Array, "B d"]
    answer: Float[Array, " B"]


class Layer(NamedTuple):
    """One layer of attention with H heads over tokens (x, y); it reads off one number."""

    query: Float[Array, "H D K"]
    key: Float[Array, "H D K"]
    value: Float[Array, "H D K"]
    out: Float[Array, "H K"]


def draw_rows(
    rng: Array,
    num_rows: int,
    length: int,
    width: int,
    noise: float,
) -> Rows:
    """Problems with x ~ N(0, I), b ~ N(0, I / d).

    Args:
      rng: a JAX key.
      num_rows: B.
      length: L.
      width: d.
      noise: the variance of y around b x.

    Returns:
      The rows; the answer is as noisy as the pairs are.
    """
    keys = jax.random.split(rng, 3)
    x = jax.random.normal(keys[0], (num_rows, length + 1, width))
    slope = jax.random.normal(keys[1], (num_rows, width)) / jnp.sqrt(width)
    errors = jnp.sqrt(noise) * jax.random.normal(keys[2], (num_rows, length + 1))
    y = jnp.einsum("bld,bd->bl", x, slope) + errors
    return Rows(x[:, :-1], y[:, :-1], x[:, -1], y[:, -1])


def predict(layer: Layer, rows: Rows, is_softmax: bool = True) -> Float[Array, " B"]:
    """What the layer reads at the query, which has no y: softmax attention, or weights q k / 40.

    The linear layer's divisor is a constant, as of a layer that does not normalize.
    """
    tokens = jnp.concatenate([rows.x, rows.y[..., None]], axis=-1)
    asked = jnp.pad(rows.query, ((0, 0), (0, 1)))
    q = jnp.einsum("bd,hdk->bhk", asked, layer.query)
    k = jnp.einsum("bld,hdk->bhlk", tokens, layer.key)
    logits = jnp.einsum("bhk,bhlk->bhl", q, k) * tokens.shape[-1] ** -0.5
    weights = jax.nn.softmax(logits, axis=-1) if is_softmax else logits / 40.0
    read = jnp.einsum("bld,hdk,hk->bhl", tokens, layer.value, layer.out)
    return jnp.sum(weights * read, axis=(1, 2))


def query_key(layer: Layer) -> Float[Array, "H D D"]:
    """W_Q W_K^T of every head, with the scale of the logits."""
    products = jnp.einsum("hdk,hek->hde", layer.query, layer.key)
    return products * layer.query.shape[1] ** -0.5


def output_value(layer: Layer) -> Float[Array, "H D"]:
    """W_V W_O of every head: what it reads off a token."""
    return jnp.einsum("hdk,hk->hd", layer.value, layer.out)


def debiased(rows: Rows) -> Float[Array, " B"]:
    """A step of gradient descent from zero on centered inputs, of rate 1."""
    centered = rows.x - jnp.mean(rows.x, axis=1, keepdims=True)
    slope = jnp.einsum("bld,bl->bd", centered, rows.y) / rows.x.shape[1]
    return jnp.einsum("bd,bd->b", slope, rows.query)


def ridge(rows: Rows, noise: float) -> Float[Array, " B"]:
    """Bayes' answer: ridge regression with penalty d noise."""
    width = rows.x.shape[-1]
    moments = jnp.einsum("bld,ble->bde", rows.x, rows.x)
    target = jnp.einsum("bld,bl->bd", rows.x, rows.y)
    slope = jnp.linalg.solve(moments + width * noise * jnp.eye(width), target[..., None])[..., 0]
    return jnp.einsum("bd,bd->b", slope, rows.query)


def approximate_loss(
    omega: Float[Array, " H"],
    mu: Float[Array, " H"],
    *,
    width: int,
    length: int,
    noise: float,
) -> Float[Array, ""]:
    """The loss of heads W_Q W_K^T = omega I, W_V W_O = (0, mu), for small omega.

        1 + s - 2 mu omega + mu^T (omega omega^T + (1 + s) / L exp(d omega omega^T)) mu

    Args:
      omega: the heads' logits per x x_q.
      mu: what they read of y.
      width: d.
      length: L.
      noise: s.
    """
    outer = jnp.outer(omega, omega)
    second = outer + (1 + noise) / length * jnp.exp(width * outer)
    return 1 + noise - 2 * mu @ omega + mu @ second @ mu


def pattern(layer: Layer) -> dict[str, float]:
    """How far the layer is what the paper describes; 1, 1, 0, 0 if it is entirely.

        kq_diagonal   the squares of W_Q W_K^T on x, those that are explained by w I
        ov_last       the squares of W_V W_O that are the factor of y
        zero_sum      |sum of factors| / sum of |factors|
        unequal       the spread of |w| over heads that read, over their mean

    Heads count by the squares of their w m, which is their part of the prediction.
    """
    products = np.asarray(query_key(layer), np.float64)
    # The query's y is 0: the last row is never used.
    on_x = products[:, :-1]
    read = np.asarray(output_value(layer), np.float64)
    scale = np.trace(on_x[:, :, :-1], axis1=1, axis2=2) / on_x.shape[1]
    importance = (scale * read[:, -1]) ** 2
    importance = importance / importance.sum()
    explained = scale**2 * on_x.shape[1] / np.sum(on_x**2, axis=(1, 2))
    last = read[:, -1] ** 2 / np.sum(read**2, axis=1)
    factors = read[:, -1]
    mean = np.sum(importance * np.abs(scale))
    spread = np.sqrt(np.sum(importance * (np.abs(scale) - mean) ** 2))
    return {
        "kq_diagonal": float(np.sum(importance * explained)),
        "ov_last": float(np.sum(importance * last)),
        "zero_sum": float(np.abs(factors.sum()) / np.abs(factors).sum()),
        "unequal": float(spread / mean),
    }


@dataclasses.dataclass(frozen=True)
class InContextRegression:
    """Trains a layer and says what it has become.

    Attributes:
      heads: H.
      mixer: "softmax" or "linear".
      steps: of Adam, with a rate that falls along a cosine.
      width: d.
      length: L, in training.
      longer: another L, at which it is read too.
      noise: the variance of y around b x.
      rows: of a batch.
      lr: the highest rate.
    """

    heads: int
    mixer: str = "softmax"
    steps: int = 20_000
    width: int = 5
    length: int = 40
    longer: int = 160
    noise: float = 0.1
    rows: int = 128
    lr: float = 3e-3

    def __call__(self, seed: int) -> dict[str, float]:
        rng = jax.random.key(seed)
        start, training, evaluation = jax.random.split(rng, 3)
        layer = _trained(self, initial(start, self.heads, self.width + 1), training)
        is_softmax = self.mixer == "softmax"
        values = pattern(layer)
        for length in (self.length, self.longer):
            rows = draw_rows(evaluation, EVALUATION_ROWS, length, self.width, self.noise)
            loss = jnp.mean((predict(layer, rows, is_softmax) - rows.answer) ** 2)
            values[f"loss@{length}"] = float(loss)
            values[f"bayes@{length}"] = float(
                jnp.mean((ridge(rows, self.noise) - rows.answer) ** 2)
            )
            values[f"debiased@{length}"] = _best_multiple(debiased(rows), rows.answer)
        return values


def initial(rng: Array, heads: int, width: int) -> Layer:
    """Random matrices, uniform in +-1 / sqrt(inputs)."""
    keys = jax.random.split(rng, 2)
    shape = (heads, width, width)
    bound = width**-0.5
    query, key, value = jax.random.uniform(keys[0], (3, *shape), minval=-bound, maxval=bound)
    bound = (heads * width) ** -0.5
    out = jax.random.uniform(keys[1], shape[:2], minval=-bound, maxval=bound)
    return Layer(query, key, value, out)


@functools.partial(jax.jit, static_argnums=0)
def _trained(run: InContextRegression, layer: Layer, rng: Array) -> Layer:
    schedule = optax.cosine_decay_schedule(run.lr, run.steps)

    def loss(layer: Layer, rows: Rows) -> Array:
        predicted = predict(layer, rows, run.mixer == "softmax")
        return jnp.mean((predicted - rows.answer) ** 2)

    def draw(key: Array) -> Rows:
        return draw_rows(key, run.rows, run.length, run.width, run.noise)

    keys = jax.random.split(rng, run.steps)
    return trained_on_fresh_data(optax.adam(schedule), loss, draw, layer, keys)


def _best_multiple(prediction: Array, answer: Array) -> float:
    """The loss of the multiple of a prediction that is best on these rows."""
    factor = jnp.sum(prediction * answer) / jnp.sum(prediction**2)
    return float(jnp.mean((factor * prediction - answer) ** 2))
