"""One attention of several: results over other keys, joined by their log-sum-exps."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

# y and the log-sum-exp of its rows, as `attention(..., return_lse=True)` returns them.
Part = tuple[Float[Array, "B T H V"], Float[Array, "B H T"]]


def merge_attention(parts: Sequence[Part]) -> Part:
    """What `attention` returns for the keys of all parts together.

        lse = log sum_n exp(lse_n)
        y = sum_n exp(lse_n - lse) y_n

    Each part attended from the same queries to other keys, under one softmax. A sink belongs to one
    part only. Outputs may be gated, all by the same gate. Differentiable; a result is a part again.

    Args:
      parts: (y, lse) of each, at least one.

    Returns:
      (y, lse), y in the first part's dtype. A row that sees nothing in any part is 0, at -inf.

    Raises:
      ValueError: no part, or parts of different shapes.
    """
    if not parts:
        raise ValueError("merge_attention: parts: got none, expected one (y, lse) at least")
    y, lse = parts[0]
    for n, (other_y, other_lse) in enumerate(parts):
        B, T, H, _ = other_y.shape
        if other_y.shape != y.shape or other_lse.shape != (B, H, T):
            expected = f"y {y.shape} and lse {lse.shape} as of part 0, lse [B, H, T]"
            got = f"y {other_y.shape} and lse {other_lse.shape}"
            raise ValueError(f"merge_attention: part {n}: got {got}, expected {expected}")
    dtype = lse.dtype
    stacked_lse = jnp.stack([of_part.astype(dtype) for _, of_part in parts])
    # A part in which a row saw nothing has no weight, and no gradient that is 0 times infinity.
    is_empty = stacked_lse == -jnp.inf
    most = lax.stop_gradient(jnp.max(stacked_lse, axis=0))
    most = jnp.where(most == -jnp.inf, 0, most)
    exponentials = jnp.exp(jnp.where(is_empty, 0, stacked_lse - most))
    exponentials = jnp.where(is_empty, 0, exponentials)
    total = jnp.sum(exponentials, axis=0)
    sees_nothing = total == 0
    safe_total = jnp.where(sees_nothing, 1, total)
    merged_lse = jnp.where(sees_nothing, -jnp.inf, most + jnp.log(safe_total))
    # [N, B, H, T] -> [N, B, T, H, 1]
    weights = jnp.swapaxes(exponentials / safe_total, 2, 3)[..., None]
    merged_y = jnp.zeros(y.shape, dtype)
    for of_part, (part_y, _) in zip(weights, parts):
        merged_y = merged_y + of_part * part_y.astype(dtype)
    return merged_y.astype(y.dtype), merged_lse
