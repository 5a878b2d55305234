"""Data on which softmax attention succeeds and linear attention cannot (after arXiv 2310.11685).

A row has n tokens (c, s, 1) with a random sign s each. One of them, the needle, has c = a_1 m with
m = sqrt(log n); all others a c that is uniform in [0, a_0 m]. The query has a_1 m in its first
channel and asks for the needle's sign. With the logits c c_q the needle's weight is at least

    softmax   n^(a_1^2) / (n^(a_1^2) + (n - 1) n^(a_0 a_1)) -> 1, where a_1 (a_1 - a_0) > 1
    linear    below a_1 / (a_1 + (n - 1) a_0 / 2) in the mean -> 0

Whatever its matrices, linear attention hands on sums over tokens of products of two channels. Signs
are in two of them only, S_1 = sum s and S_2 = sum c s. The needle moves them by s (1, a_1 m); the
others' part is noise, nearly normal, of covariance (n - 1) [[1, E c], [E c, E c^2]]. The best guess
from both is right with probability

    Phi(sqrt((1 + 12 (a_1 / a_0 - 1/2)^2) / (n - 1)))

which falls to 1/2 whatever network follows.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float

from gatedjax.evidence.fresh_data import trained_on_fresh_data

NEEDLE = 1.6  # a_1
OTHERS = 0.8  # a_0
EVALUATION_ROWS = 16_384
HIDDEN = 16  # of the network behind the layer


class Rows(NamedTuple):
    """tokens: (c, s, 1). answer: the needle's sign."""

    tokens: Float[Array, "B n 3"]
    answer: Float[Array, " B"]


def least_softmax_weight(n: int) -> float:
    """What the needle has at least, if all others are as near to it as they can be."""
    gap = NEEDLE * (NEEDLE - OTHERS) * math.log(n)
    return 1 / (1 + (n - 1) * math.exp(-gap))


def best_linear_accuracy(n: int) -> float:
    """Of any network behind linear attention."""
    distance = math.sqrt((1 + 12 * (NEEDLE / OTHERS - 0.5) ** 2) / (n - 1))
    return 0.5 * (1 + math.erf(distance / math.sqrt(2)))


def draw_rows(rng: Array, num_rows: int, n: int) -> Rows:
    """Rows of n tokens; the needle is anywhere."""
    keys = jax.random.split(rng, 3)
    magnitude = math.sqrt(math.log(n))
    c = OTHERS * magnitude * jax.random.uniform(keys[0], (num_rows, n))
    place = jax.random.randint(keys[1], (num_rows,), 0, n)
    is_needle = jnp.arange(n) == place[:, None]
    c = jnp.where(is_needle, NEEDLE * magnitude, c)
    s = jax.random.rademacher(keys[2], (num_rows, n), jnp.float32)
    tokens = jnp.stack([c, s, jnp.ones_like(c)], axis=-1)
    return Rows(tokens, jnp.sum(s * is_needle, axis=1))


def mixed(
    params: dict[str, Any],
    tokens: Float[Array, "B n 3"],
    mixer: str,
) -> Float[Array, "B 3"]:
    """What one head hands on at the query.

    Args:
      params: "query_key" [3, 3], "value" [3, 3].
      tokens: keys and values.
      mixer: "softmax", or "linear", whose weights are the logits over n.
    """
    n = tokens.shape[1]
    query = jnp.array([NEEDLE * math.sqrt(math.log(n)), 0.0, 1.0])
    logits = tokens @ (params["query_key"].T @ query)
    weights = jax.nn.softmax(logits, axis=-1) if mixer == "softmax" else logits / n
    return jnp.einsum("bn,bnd,de->be", weights, tokens, params["value"])


def network(
    params: dict[str, Any], tokens: Float[Array, "B n 3"], mixer: str
) -> Float[Array, " B"]:
    """The logit of a needle that is positive: a layer and an MLP."""
    o = mixed(params, tokens, mixer)
    hidden = jax.nn.relu(o @ params["up"] + params["bias"])
    return hidden @ params["down"] + o @ params["skip"]


@dataclasses.dataclass(frozen=True)
class NeedleSign:
    """Trains a layer on rows of n tokens and says how often it is right.

    Attributes:
      mixer: "softmax" or "linear".
      n: tokens of a row.
      steps: of Adam.
      rows: of a batch.
      lr: its highest rate.
    """

    mixer: str
    n: int
    steps: int = 2_000
    rows: int = 256
    lr: float = 1e-2

    def __call__(self, seed: int) -> dict[str, float]:
        start, training, evaluation = jax.random.split(jax.random.key(seed), 3)
        params = _trained(self, _initial(start), training)
        rows = draw_rows(evaluation, EVALUATION_ROWS, self.n)
        is_right = network(params, rows.tokens, self.mixer) * rows.answer > 0
        return {
            "accuracy": float(jnp.mean(is_right)),
            "linear_bound": best_linear_accuracy(self.n),
            "softmax_weight": least_softmax_weight(self.n),
        }


def _initial(rng: Array) -> dict[str, Any]:
    keys = jax.random.split(rng, 5)
    shapes = {
        "query_key": (3, 3),
        "value": (3, 3),
        "up": (3, HIDDEN),
        "down": (HIDDEN,),
        "skip": (3,),
    }
    params: dict[str, Any] = {}
    for key, (name, shape) in zip(keys, shapes.items()):
        params[name] = 0.3 * jax.random.normal(key, shape)
    return {**params, "bias": jnp.zeros(HIDDEN)}


@functools.partial(jax.jit, static_argnums=0)
def _trained(run: NeedleSign, params: dict[str, Any], rng: Array) -> dict[str, Any]:
    tx = optax.adam(optax.cosine_decay_schedule(run.lr, run.steps))

    def loss(params: dict[str, Any], rows: Rows) -> Array:
        margin = network(params, rows.tokens, run.mixer) * rows.answer
        return jnp.mean(jax.nn.softplus(-margin))

    def draw(key: Array) -> Rows:
        return draw_rows(key, run.rows, run.n)

    keys = jax.random.split(rng, run.steps)
    return trained_on_fresh_data(tx, loss, draw, params, keys)
