"""What a model says of the next token, for every kind of output (`OutputConfig`).

`to_logits` gives, for hidden states, numbers whose softmax are the model's probabilities. What a
kind is trained with stands in `training/output_loss.py`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int

from gatedjax.config import ModelConfig
from gatedjax.model import CODES, HEAD_BIAS
from gatedjax.model import logits as products

# (hidden states, output matrix) -> logits.
ToLogits = Callable[[Array, Array], Array]
# Added to the probabilities of a Fourier head, and of sparsemax, before their logarithm.
LEAST_PROBABILITY = 1e-5
# Of a vector that is divided by its norm, and of logits that are divided by their deviation.
LEAST_NORM = 1e-12


def to_logits(model: ModelConfig, params: Mapping[str, Any]) -> ToLogits:
    """How hidden states and the output matrix (`head_weights`) become logits, float32."""
    output = model.output
    if output.kind in ("softmax", "noisy_softmax"):
        return products

    def logits(hidden: Float[Array, "... M"], weights: Float[Array, "R M"]) -> Array:
        if output.kind == "sphereface2":
            cosines = products(unit_rows(hidden), unit_rows(weights).astype(hidden.dtype))
            return output.cosine_scale * cosines
        raw = products(hidden, weights)
        if output.kind == "stablemax":
            return log_stable(raw)
        if output.kind == "sparsemax":
            return jnp.log(sparse_probabilities(raw) + LEAST_PROBABILITY)
        if output.kind == "spherical":
            return output.sharpness * standardized(raw)
        if output.kind == "fourier":
            return fourier_logits(raw + params[HEAD_BIAS], model.vocab_size)
        return raw[..., codes_of_tokens(params)]

    return logits


def sparse_probabilities(logits: Float[Array, "... X"]) -> Float[Array, "... X"]:
    """Sparsemax: the point of the simplex that is nearest to the logits (arXiv 1602.02068)."""
    rows = logits.reshape(-1, logits.shape[-1])
    return jax.vmap(optax.projections.projection_simplex)(rows).reshape(logits.shape)


def log_stable(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """log s(x) of StableMax (arXiv 2501.04697): s(x) = x + 1 from 0 on, 1 / (1 - x) below."""
    is_positive = x >= 0
    # Selected on both sides, so that at 0 and far from it no gradient is lost.
    above = jnp.log1p(jnp.where(is_positive, x, 0))
    below = jnp.log1p(jnp.where(is_positive, 0, -x))
    return jnp.where(is_positive, above, -below)


def standardized(logits: Float[Array, "... X"]) -> Float[Array, "... X"]:
    """Logits less their mean, over their deviation: shifts and scales are gone (1604.08859)."""
    centered = logits - jnp.mean(logits, axis=-1, keepdims=True)
    variance = jnp.mean(centered**2, axis=-1, keepdims=True)
    return centered / jnp.sqrt(variance + LEAST_NORM)


def unit_rows(x: Float[Array, "... M"]) -> Float[Array, "... M"]:
    """Vectors of length 1, in x's dtype; zeros stay zeros."""
    of_float32 = x.astype(jnp.float32)
    square = jnp.sum(of_float32**2, axis=-1, keepdims=True)
    # The root of a sum that is never 0 has a gradient everywhere.
    return (of_float32 / jnp.sqrt(square + LEAST_NORM**2)).astype(x.dtype)


def fourier_logits(raw: Float[Array, "... R"], bins: int) -> Float[Array, "... X"]:
    """The logits of a Fourier head (arXiv 2410.22269), in bins of [-1, 1].

    The density of the series with coefficients c_k, the autocorrelation of a_0 ... a_N, is
    1/2 + Re sum_k c_k / c_0 e^(i pi k z), which is |sum_l a_l e^(i pi l z)|^2 / (2 c_0): never
    negative, and no complex number is needed. Its values at the centers of the bins, over their
    sum, are the probabilities.

    Args:
      raw: the real parts of a_0 ... a_N, then their imaginary parts.
      bins: how many.
    """
    count = raw.shape[-1] // 2
    real = raw[..., :count]
    imaginary = raw[..., count:]
    centers = (2.0 * np.arange(bins) + 1.0) / bins - 1.0
    angles = math.pi * np.arange(count)[:, None] * centers
    cosines = jnp.asarray(np.cos(angles), raw.dtype)
    sines = jnp.asarray(np.sin(angles), raw.dtype)
    real_sum = real @ cosines - imaginary @ sines
    imaginary_sum = real @ sines + imaginary @ cosines
    density = real_sum**2 + imaginary_sum**2
    probabilities = density / jnp.sum(density, axis=-1, keepdims=True)
    return jnp.log(probabilities + LEAST_PROBABILITY)


def roughness(raw: Float[Array, "... R"]) -> Float[Array, "..."]:
    """4 pi^2 sum_k k^2 |c_k|^2 of a Fourier head's coefficients, before they are normalized."""
    count = raw.shape[-1] // 2
    real = raw[..., :count]
    imaginary = raw[..., count:]
    total = jnp.zeros(raw.shape[:-1], raw.dtype)
    for k in range(1, count):
        of_real = real[..., k:] * real[..., :-k] + imaginary[..., k:] * imaginary[..., :-k]
        of_imaginary = imaginary[..., k:] * real[..., :-k] - real[..., k:] * imaginary[..., :-k]
        square = jnp.sum(of_real, axis=-1) ** 2 + jnp.sum(of_imaginary, axis=-1) ** 2
        total = total + k**2 * square
    return 4.0 * math.pi**2 * total


def codes_of_tokens(params: Mapping[str, Any]) -> Int[Array, " X"]:
    """The code that each token of the vocabulary shares with others."""
    return params[CODES]["frozen"].astype(jnp.int32)
