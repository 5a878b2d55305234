"""Softmax in two passes over its input, without a maximum (arXiv 2001.04438).

An exponential is kept as a pair (m, n) that means m 2^n, with m near 1 and n a whole number in a
float: no exponential overflows, so none has to be made smaller first. The first pass adds such
pairs, the second makes them again and divides:

    exp(x) = m 2^n                n = round(x log2 e), m = exp(x - n log 2)
    a + b  = (m_a 2^(n_a - n) + m_b 2^(n_b - n)) 2^n              n = max(n_a, n_b)
    y      = m 2^(n - n_sum) / m_sum

Softmax as usual takes three passes: the maximum, the sum, the quotient.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from kernels_pallas.common.mesh import varying_like

DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32)
LOG2_E = 1.4426950408889634
# log 2 in three parts. The first two have 9 bits each: a whole number of up to 15 bits times one of
# them is exact, and so is the difference to x.
LOG_2 = (float.fromhex("0x1.62p-1"), float.fromhex("0x1.c8p-10"), float.fromhex("0x1.7f7d1cp-20"))
# exp on [-log 2 / 2, log 2 / 2], lowest power first: least squares of the relative error, 2e-8.
POLYNOMIAL = (1.0, 1.0, 0.499999911, 0.166664213, 0.0416683592, 0.0083747711, 0.00138294208)
LARGEST_REST = 0.35
# Beyond it x log2 e overflows.
LARGEST_INPUT = 2.3e38
# The n of exp(-inf), and of an empty sum: below that of any other float.
LEAST_EXPONENT = -3.4e38

# How many sums are made side by side, over all rows, and how many pairs enter each of them at a
# time: they share one change of the sum's exponent.
SUMS = 2**14
PAIRS = 4


@jax.custom_jvp
def two_pass_softmax(x: Float[Array, "*rows n"]) -> Float[Array, "*rows n"]:
    """softmax(x) over the last axis, for any finite x, in two passes.

    As exact as float32 is up to |x| = 2e4; beyond it the distance of two inputs is known to the
    rounding of x alone. Weights below 2^-126 are 0. Rows with NaN, with infinity, or of nothing
    but -infinity are NaN, as those of `jax.nn.softmax`.

    Args:
      x: float16, bfloat16 or float32; computed in float32.

    Returns:
      The weights, in x's dtype.

    Raises:
      ValueError: another dtype, or an empty last axis.
    """
    if x.dtype not in DTYPES:
        raise ValueError(
            f"two_pass_softmax: x: got dtype {x.dtype}, expected float16, bfloat16 or float32"
        )
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"two_pass_softmax: x: got shape {x.shape}, expected a last axis that is not empty"
        )
    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    mantissa_sum, exponent_sum = _sum(rows)
    mantissa, exponent = _exp(rows)
    # One division a row, not one a number.
    scale = 1.0 / mantissa_sum
    y = mantissa * _power_of_two(exponent - exponent_sum) * scale
    return y.reshape(x.shape).astype(x.dtype)


@two_pass_softmax.defjvp
def _jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = two_pass_softmax(*primals)
    weights = y.astype(jnp.float32)
    dx = tangents[0].astype(jnp.float32)
    # dy_i = y_i (dx_i - sum_j y_j dx_j)
    mean = jnp.sum(weights * dx, axis=-1, keepdims=True)
    return y, (weights * (dx - mean)).astype(y.dtype)


def _exp(x: Array) -> tuple[Array, Array]:
    """(m, n) with exp(x) = m 2^n."""
    bounded = jnp.clip(x, -LARGEST_INPUT, LARGEST_INPUT)
    exponent = jnp.round(bounded * LOG2_E)
    rest = bounded
    for part in LOG_2:
        rest = rest - exponent * part
    # Of huge x only, whose products with the parts are rounded.
    rest = jnp.clip(rest, -LARGEST_REST, LARGEST_REST)
    mantissa = jnp.full_like(rest, POLYNOMIAL[-1])
    for coefficient in POLYNOMIAL[-2::-1]:
        mantissa = mantissa * rest + coefficient
    is_zero = x == -jnp.inf
    mantissa = jnp.where(is_zero, 0.0, mantissa)
    # softmax of infinity is NaN.
    mantissa = jnp.where(x == jnp.inf, jnp.nan, mantissa)
    return mantissa, jnp.where(is_zero, LEAST_EXPONENT, exponent)


def _power_of_two(exponent: Array) -> Array:
    """2^n for whole n <= 0, by writing the exponent's bits; 0 below 2^-126."""
    biased = jnp.maximum(exponent, -127.0).astype(jnp.int32) + 127
    return lax.bitcast_convert_type(biased << 23, jnp.float32)


def _sum(rows: Array) -> tuple[Array, Array]:
    """The sum of exp over every row as a pair of [rows, 1], in one pass."""
    num_rows, length = rows.shape
    # Sums side by side fill vector registers, and stay in the cache.
    lanes = max(8, SUMS // num_rows)
    tile = lanes * PAIRS
    steps = length // tile
    zero = varying_like(jnp.zeros((num_rows, 1), jnp.float32), rows)
    sums = (zero, zero + LEAST_EXPONENT)

    def add(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        # A slice of the loop's own: one before the loop would be a copy.
        x = lax.dynamic_slice_in_dim(rows, i * tile, tile, axis=1)
        mantissas, exponents = _exp(x.reshape(num_rows, PAIRS, lanes))
        pairs = [(mantissas[:, j], exponents[:, j]) for j in range(PAIRS)]
        return _added([sums, *pairs])

    if steps:
        start = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_rows, lanes)), sums)
        mantissas, exponents = lax.fori_loop(0, steps, add, start)
        sums = _row_sum(mantissas, exponents)
    if steps * tile < length:
        rest = _row_sum(*_exp(rows[:, steps * tile :]))
        sums = _added([sums, rest])
    return sums


def _added(pairs: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """The sum of several pairs, number by number."""
    largest = pairs[0][1]
    for _, exponent in pairs[1:]:
        largest = jnp.maximum(largest, exponent)
    total = jnp.zeros_like(largest)
    for mantissa, exponent in pairs:
        total = total + mantissa * _power_of_two(exponent - largest)
    return total, largest


def _row_sum(mantissas: Array, exponents: Array) -> tuple[Array, Array]:
    """The sum of the pairs of every row."""
    largest = jnp.max(exponents, axis=-1, keepdims=True)
    scaled = mantissas * _power_of_two(exponents - largest)
    return jnp.sum(scaled, axis=-1, keepdims=True), largest
