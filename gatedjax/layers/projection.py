"""The one linear map of the project: any group of axes in, any group of axes out, with logical names."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def contract(x: Float[Array, "..."], kernel: Float[Array, "..."], axes: int) -> Float[Array, "..."]:
    """`x [..., *in] kernel [*in, *out] -> y [..., *out]`, summed over `axes` axes.

    The gradient is the usual one. It is written out because the rule of `dot_general` makes the kernel's gradient as
    [*out, *in] and transposes it, which a CPU does in memory: 5 to 15 % of a small model's step. No axes are merged,
    so that sharded ones stay where they are.
    """
    dims = (tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes)))
    return lax.dot_general(x, kernel, (dims, ((), ())))


def _contract_forward(x: Array, kernel: Array, axes: int):
    return contract(x, kernel, axes), (x, kernel)


def _contract_backward(axes: int, residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    rows = tuple(range(x.ndim - axes))
    out = tuple(range(len(rows), dy.ndim)), tuple(range(axes, kernel.ndim))
    return lax.dot_general(dy, kernel, (out, ((), ()))), lax.dot_general(
        x, dy, ((rows, rows), ((), ()))
    )


contract.defvjp(_contract_forward, _contract_backward)


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
        names, shape = (
            (*self.in_axes, *self.out_axes),
            (*self.in_axes.values(), *self.out_axes.values()),
        )
        init = nn.with_logical_partitioning(nn.initializers.normal(self.std), names)
        kernel = self.param("kernel", init, shape, jnp.float32).astype(self.dtype)
        return contract(x.astype(self.dtype), kernel, len(self.in_axes))


def parameter(
    module: nn.Module, name: str, axes: Sequence[str], shape: Sequence[int], init
) -> Array:
    """A float32 parameter of `module` with logical axis names."""
    return module.param(
        name, nn.with_logical_partitioning(init, tuple(axes)), tuple(shape), jnp.float32
    )
