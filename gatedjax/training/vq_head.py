"""A codebook for the output of a trained model (VQ-Logits, arXiv 2505.10202), by k-means.

Tokens whose rows of the output matrix are near each other share a code, whose row is their mean; a
model with `output.kind = "vq"` goes on from there (`from_trained`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from gatedjax.config import ModelConfig, OutputConfig
from gatedjax.errors import require
from gatedjax.layers.tree import Path, flatten_dict
from gatedjax.model import CODES, head_weights
from gatedjax.training.output_loss import model_loss

ITERATIONS = 50


def k_means(
    points: Float[np.ndarray, "X M"],
    count: int,
    seed: int = 0,
    iterations: int = ITERATIONS,
) -> tuple[Float[np.ndarray, "K M"], Int[np.ndarray, " X"]]:
    """(means, the mean that is nearest to each point): Lloyd's iterations from k-means++ starts.

    Args:
      points: what is divided.
      count: of means, as many as points at most; none stays without a point.
      seed: of the starts.
      iterations: at most.

    Raises:
      InputError: more means than different points.
    """
    points = np.asarray(points, np.float64)
    different = len(np.unique(points, axis=0))
    require(1 <= count <= different, "codes", count, f"from 1 to {different} different rows")
    means = _starts(points, count, np.random.default_rng(seed))
    nearest = np.full(len(points), -1)
    for _ in range(iterations):
        squares = _squares(points, means)
        before = nearest
        nearest = np.argmin(squares, axis=1)
        for empty in np.setdiff1d(np.arange(count), nearest):
            # The point that is furthest from its mean, of those that do not stand alone.
            distances = squares[np.arange(len(points)), nearest]
            is_alone = np.bincount(nearest, minlength=count)[nearest] == 1
            nearest[np.argmax(np.where(is_alone, -1.0, distances))] = empty
        if np.array_equal(nearest, before):
            break
        is_of = nearest == np.arange(count)[:, None]
        means = is_of @ points / np.sum(is_of, axis=1, keepdims=True)
    return means, nearest


def _starts(
    points: Float[np.ndarray, "X M"],
    count: int,
    rng: np.random.Generator,
) -> Float[np.ndarray, "K M"]:
    """Each start is a point, drawn as its squared distance from those before."""
    chosen = [int(rng.integers(len(points)))]
    squares = _squares(points, points[chosen])[:, 0]
    while len(chosen) < count:
        chosen.append(int(rng.choice(len(points), p=squares / squares.sum())))
        squares = np.minimum(squares, _squares(points, points[chosen[-1:]])[:, 0])
    return points[chosen]


def _squares(
    points: Float[np.ndarray, "X M"],
    means: Float[np.ndarray, "K M"],
) -> Float[np.ndarray, "X K"]:
    """Squared distances."""
    of_points = np.sum(points**2, axis=1)[:, None]
    of_means = np.sum(means**2, axis=1)
    return np.maximum(of_points - 2.0 * points @ means.T + of_means, 0.0)


def from_trained(
    model: ModelConfig,
    params: Mapping[str, Any],
    codes: int,
    seed: int = 0,
) -> tuple[ModelConfig, dict[Path, Any]]:
    """A trained model's configuration and parameters, with codes in place of its output matrix.

    Args:
      model: with the output softmax.
      params: its parameters.
      codes: how many.
      seed: of k-means.

    Returns:
      The configuration, and all parameters by path, for `fresh_state(run, given)`.
    """
    kind = model.output.kind
    require(kind == "softmax", "output.kind", kind, "'softmax', of the model that is changed")
    means, nearest = k_means(np.asarray(head_weights(params)), codes, seed)
    output = OutputConfig(kind="vq", codes=codes)
    changed = dataclasses.replace(model, output=output, tie_embeddings=False, z_loss=0.0)
    given = dict(flatten_dict(params))
    given[("head",)] = jnp.asarray(means, jnp.float32)
    given[(CODES, "frozen")] = jnp.asarray(nearest, jnp.float32)
    return changed, given


def loss_memory(model: ModelConfig, rows: int, length: int) -> int:
    """Bytes that the loss and its gradient need beside their inputs and results, as XLA says.

    Args:
      model: with any kind of output, without chunks.
      rows: of the batch.
      length: of each.
    """

    def loss(hidden: Any, params: Any, targets: Any) -> Any:
        ones = jnp.ones((rows, length))
        return model_loss(model, params, hidden, targets, ones, jnp.float32(1.0), 0)[0]

    params: dict[str, Any] = {}
    shape = (model.output.rows(model.vocab_size), model.width)
    params["head"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    if model.output.kind == "vq":
        params[CODES] = {"frozen": jax.ShapeDtypeStruct((model.vocab_size,), jnp.float32)}
    hidden = jax.ShapeDtypeStruct((rows, length, model.width), jnp.dtype(model.dtype))
    targets = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    memory: Any = gradient.lower(hidden, params, targets).compile().memory_analysis()
    return int(memory.temp_size_in_bytes)
