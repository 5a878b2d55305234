"""What linear attention has in place of an exponential: features of queries and of keys.

A weight is the product of two features, so sums over keys are made once for all queries. Most maps
work channel by channel and are the same for queries and keys; the others see a vector's length
(NaLaFormer), its position (cosFormer) or a random matrix (FAVOR+).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from gatedjax.config import BidirectionalLinearAttentionConfig, GatedLinearAttentionConfig

# What FAVOR+ adds to every feature, as its published code.
FAVOR_EPS = 1e-4
# Keys that are not divided by their largest feature: the exponent from which on they are equal.
_LARGEST_EXPONENT = 40.0


def identity(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Queries and keys as they are."""
    return x


def elu_plus_one(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The positive feature map of linear attention (arXiv 2006.16236)."""
    return jax.nn.elu(x) + 1.0


def relu_plus_eps(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """relu(x) + 1e-6, as LINA has it (arXiv 2601.22630): no sum of weights is zero."""
    return jax.nn.relu(x) + 1e-6


def unit_silu(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """(silu(x) + 0.5) over its length, LION's map with decays (arXiv 2502.16249)."""
    shifted = jax.nn.silu(x.astype(jnp.promote_types(x.dtype, jnp.float32))) + 0.5
    # silu is above -0.28, so no channel is zero.
    length = jnp.sqrt(jnp.sum(shifted * shifted, axis=-1, keepdims=True))
    return (shifted / length).astype(x.dtype)


# The same for queries and keys, without anything else.
FEATURE_MAPS = {
    "identity": identity,
    "silu": jax.nn.silu,
    "elu_plus_one": elu_plus_one,
    "relu": relu_plus_eps,
    "unit_silu": unit_silu,
}


class Features(NamedTuple):
    """Of queries and of keys."""

    q: Float[Array, "B T H F"]
    k: Float[Array, "B T Hk F"]


def features(
    name: str,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T Hk K"],
    *,
    positions: Int[Array, "B T"] | None = None,
    length: int | None = None,
    projection: Float[np.ndarray, "F K"] | None = None,
    shift_keys: bool = False,
) -> Features:
    """The features of queries and keys, by the name of the map.

    Args:
      name: of `FEATURE_MAPS`, or "norm_aware", "cosformer", "favor+".
      q, k: queries and keys.
      positions: of tokens in their document; cosFormer needs them.
      length: M of cosFormer.
      projection: W of FAVOR+.
      shift_keys: as of `favor_keys`.
    """
    if name == "norm_aware":
        return Features(norm_aware_queries(q), norm_aware_keys(k))
    if name == "cosformer":
        assert positions is not None
        assert length is not None
        return Features(cosformer(q, positions, length), cosformer(k, positions, length))
    if name == "favor+":
        assert projection is not None
        return Features(favor_queries(q, projection), favor_keys(k, projection, shift_keys))
    feature_map = FEATURE_MAPS[name]
    return Features(feature_map(q), feature_map(k))


def features_of(
    config: GatedLinearAttentionConfig | BidirectionalLinearAttentionConfig,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T Hk K"],
    positions: Int[Array, "B T"],
    shift_keys: bool = False,
) -> Features:
    """The features of a layer's queries and keys.

    Args:
      config: of the layer.
      q, k: queries and keys.
      positions: of tokens in their document.
      shift_keys: as of `favor_keys`; then a key's features depend on other tokens.
    """
    projection = None
    if config.feature_map == "favor+":
        projection = favor_projection(
            config.features_per_head,
            config.key_dim,
            config.feature_seed,
        )
    return features(
        config.feature_map,
        q,
        k,
        positions=positions,
        length=config.feature_length,
        projection=projection,
        shift_keys=shift_keys,
    )


# --- NaLaFormer (arXiv 2506.21137): queries raised to a power that their length decides


def norm_aware_queries(q: Float[Array, "... K"]) -> Float[Array, "... F"]:
    """[relu(q) / |q|]^p, [relu(-q) / |q|]^p with p = 3 (0.5 + tanh |q|): long ones are sharp."""
    q = q.astype(jnp.promote_types(q.dtype, jnp.float32))
    square = jnp.sum(q * q, axis=-1, keepdims=True)
    # A query of zeros has features of zeros, and gradients that are finite.
    is_zero = square == 0
    length = jnp.sqrt(jnp.where(is_zero, 1.0, square))
    direction = q / length
    power = 3.0 * (0.5 + jnp.tanh(jnp.where(is_zero, 0.0, length)))
    positive = jax.nn.relu(direction) ** power
    negative = jax.nn.relu(-direction) ** power
    return jnp.concatenate([positive, negative], axis=-1)


def norm_aware_keys(k: Float[Array, "... K"]) -> Float[Array, "... F"]:
    """relu(k^3), relu(-k^3)."""
    cubes = k.astype(jnp.promote_types(k.dtype, jnp.float32)) ** 3
    return jnp.concatenate([jax.nn.relu(cubes), jax.nn.relu(-cubes)], axis=-1)


# --- cosFormer (arXiv 2202.08791): nearer tokens weigh more


def cosformer(
    x: Float[Array, "B T H K"],
    positions: Int[Array, "B T"],
    length: int,
) -> Float[Array, "B T H F"]:
    """relu(x) cos a, relu(x) sin a with a = pi i / (2 M).

    A product of features is relu(q_i) relu(k_j) cos(pi (i - j) / (2 M)): not negative while tokens
    are at most M apart.

    Args:
      x: queries or keys.
      positions: i, of the tokens in their document.
      length: M.
    """
    angles = positions.astype(jnp.promote_types(x.dtype, jnp.float32)) * (math.pi / 2 / length)
    angles = angles[:, :, None, None]
    positive = jax.nn.relu(x)
    cosines = positive * jnp.cos(angles).astype(x.dtype)
    sines = positive * jnp.sin(angles).astype(x.dtype)
    return jnp.concatenate([cosines, sines], axis=-1)


# --- FAVOR+ (arXiv 2009.14794): random features whose products are exponentials on average


def favor_projection(num_features: int, key_dim: int, seed: int) -> Float[np.ndarray, "F K"]:
    """W: rows of normal numbers, those of each block of K made orthogonal.

    Args:
      num_features: rows.
      key_dim: channels of a head.
      seed: of the random numbers. W is not trained.
    """
    rng = np.random.default_rng(seed)
    num_blocks = -(-num_features // key_dim)
    blocks = [np.linalg.qr(rng.normal(size=(key_dim, key_dim)))[0].T for _ in range(num_blocks)]
    directions = np.concatenate(blocks)[:num_features]
    # As long as rows of independent normal numbers are.
    lengths = np.linalg.norm(rng.normal(size=(num_features, key_dim)), axis=1, keepdims=True)
    return (lengths * directions).astype(np.float32)


def favor_queries(
    q: Float[Array, "... K"],
    projection: Float[np.ndarray, "F K"],
) -> Float[Array, "... F"]:
    """F^-0.5 (exp(W x - |x|^2 / 2 - max W x) + 1e-4) of x = q K^-0.25, the max over features.

    The max is the same factor for all weights of a query, and is divided out.
    """
    products, half_square = _favor_exponents(q, projection)
    largest = jax.lax.stop_gradient(jnp.max(products, axis=-1, keepdims=True))
    return _favor(products - half_square - largest, projection)


def favor_keys(
    k: Float[Array, "B T Hk K"],
    projection: Float[np.ndarray, "F K"],
    shift: bool,
) -> Float[Array, "B T Hk F"]:
    """F^-0.5 (exp(W x - |x|^2 / 2 - c) + 1e-4) of x = k K^-0.25.

    Args:
      k: keys.
      projection: W.
      shift: c is the largest of W x over all tokens and features of a row and head, as published:
        it is divided out, but for what 1e-4 weighs. Otherwise c is 0, so that a key's features do
        not depend on tokens that it may not see, and exponents end at 40.
    """
    products, half_square = _favor_exponents(k, projection)
    if shift:
        largest = jax.lax.stop_gradient(jnp.max(products, axis=(1, 3), keepdims=True))
        return _favor(products - half_square - largest, projection)
    return _favor(jnp.minimum(products - half_square, _LARGEST_EXPONENT), projection)


def _favor_exponents(x: Array, projection: np.ndarray) -> tuple[Array, Array]:
    """(W x, |x|^2 / 2) of x K^-0.25, float32 or better."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32)) * x.shape[-1] ** -0.25
    products = jnp.einsum("...k,fk->...f", x, jnp.asarray(projection, x.dtype), precision="highest")
    return products, jnp.sum(x * x, axis=-1, keepdims=True) / 2


def _favor(exponents: Array, projection: np.ndarray) -> Array:
    return projection.shape[0] ** -0.5 * (jnp.exp(exponents) + FAVOR_EPS)
