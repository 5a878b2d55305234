"""The one linear map of the project: any group of axes in, any group of axes out, with logical names."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float


class Projection(nn.Module):
    """`x [..., *in] -> y [..., *out]`, contracted in `dtype`, no bias.

    `in_axes` and `out_axes` map logical names to sizes, for example `{"embed": M}` to `{"heads": H, "head_dim": D}`:
    the names place the parameter on the mesh (`sharding.py`) and tell Muon which side is which (`optim.py`).
    """

    in_axes: dict[str, int]
    out_axes: dict[str, int]
    std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        names, shape = (*self.in_axes, *self.out_axes), (*self.in_axes.values(), *self.out_axes.values())
        init = nn.with_logical_partitioning(nn.initializers.normal(self.std), names)
        kernel = self.param("kernel", init, shape, jnp.float32).astype(self.dtype)
        contracted = len(self.in_axes)
        dims = (tuple(range(x.ndim - contracted, x.ndim)), tuple(range(contracted)))
        return lax.dot_general(x.astype(self.dtype), kernel, (dims, ((), ())))


def parameter(module: nn.Module, name: str, axes: Sequence[str], shape: Sequence[int], init) -> Array:
    """A float32 parameter of `module` with logical axis names."""
    return module.param(name, nn.with_logical_partitioning(init, tuple(axes)), tuple(shape), jnp.float32)
