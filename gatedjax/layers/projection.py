"""The one linear map of the project.

Any group of axes in, any group of axes out, with logical names.
"""

import functools
import math
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Float

from gatedjax.config import LoRAConfig
from gatedjax.errors import InputError
from gatedjax.layers import low_rank
from gatedjax.layers.parameters import parameter
from gatedjax.layers.ternary import eight_bits, ternary
from gatedjax.sharding import is_cut, placed
from kernels_pallas.common.opaque import opaque

# What a `jax.checkpoint` policy saves so that no projection is computed twice.
OUT_NAME = "projection_out"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def contract(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    axes: int,
    names: tuple[str, ...] = (),
) -> Float[Array, "..."]:
    """`x [..., *in] kernel [*in, *out] -> y [..., *out]`, summed over `axes` axes.

    The gradient is the usual one. It is written out because the rule of `dot_general` makes the
    kernel's gradient as [*out, *in] and transposes it, which a CPU does in memory: 5 to 15 % of a
    small model's step. No axes are merged, so that sharded ones stay where they are.

    Args:
      x: what is multiplied.
      kernel: by what.
      axes: how many of the kernel's axes are summed over.
      names: the logical names of the kernel's axes, if a mesh cuts its last one. The kernel's
        gradient is then made as [*out, *in]: devices that hold parts of a sum add and scatter it
        along its first axis, and would each get the whole of it along its last.
    """
    last_of_x = tuple(range(x.ndim - axes, x.ndim))
    first_of_kernel = tuple(range(axes))
    return _dot(x, kernel, last_of_x, first_of_kernel)


def _dot(
    left: Array,
    right: Array,
    left_axes: tuple[int, ...],
    right_axes: tuple[int, ...],
) -> Array:
    """Sum over `left_axes` of one and `right_axes` of the other; the axes that remain, in order."""
    no_batch_axes = ((), ())
    return lax.dot_general(left, right, ((left_axes, right_axes), no_batch_axes))


def _contract_forward(
    x: Array,
    kernel: Array,
    axes: int,
    names: tuple[str, ...],
):
    return contract(x, kernel, axes, names), (x, kernel)


def _contract_backward(
    axes: int,
    names: tuple[str, ...],
    residuals: tuple[Array, Array],
    dy: Array,
) -> tuple[Array, Array]:
    x, kernel = residuals
    batch_axes = tuple(range(x.ndim - axes))
    # dx [..., *in]: the output axes are the last of dy and the last of the kernel.
    out_of_dy = tuple(range(len(batch_axes), dy.ndim))
    out_of_kernel = tuple(range(axes, kernel.ndim))
    dx = _dot(dy, kernel, out_of_dy, out_of_kernel)
    if not names:
        # dkernel [*in, *out], in the kernel's own order of axes: x comes first.
        return dx, _dot(x, dy, batch_axes, batch_axes)
    scattered = placed(_dot(dy, x, batch_axes, batch_axes), (*names[axes:], *names[:axes]))
    outs = kernel.ndim - axes
    return dx, jnp.transpose(scattered, (*range(outs, kernel.ndim), *range(outs)))


contract.defvjp(_contract_forward, _contract_backward)


def contract_columns(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    axes: int,
    names: tuple[str, ...] = (),
) -> Float[Array, "... N"]:
    """`contract`, with the axes that are summed over as one and those that remain as one, [..., N].

    The heads of a projection are columns then, [B, T, H D], which is how kernels read them. A TPU
    would keep [B, T, H, D] with the tokens last, and copy it.

    Args:
      x, kernel, axes: as of `contract`.
      names: the same. Of several axes that become one, a mesh cuts the first alone.
    """
    sums = math.prod(kernel.shape[:axes])
    return contract(
        x.reshape(*x.shape[: x.ndim - axes], sums),
        kernel.reshape(sums, -1),
        1,
        (names[0], names[axes]) if names else (),
    )


# Axes of a bias, where the kernel's have a name that means a matrix to the optimizer
# (`training/optim.py`). Along the width it is whole on every device, as a norm's scale.
_AXES_OF_BIAS = {
    "embed": "embed_act",
    "mlp": "mlp_bias",
    "rank": None,
}


class Projection(nn.Module):
    """`x [..., *in] -> y [..., *out]`, contracted in `dtype`, with a bias if `has_bias`.

    `in_axes` and `out_axes` map logical names to sizes, for example `{"embed": M}` to
    `{"heads": H, "head_dim": D}`: the names place the parameter on the mesh (`sharding.py`) and
    tell Muon which side is which (`training/optim.py`). The kernel starts from a normal
    distribution, or from `kernel_init`, the bias from zeros. Where `ModelConfig.lora` names it, a
    low-rank update is added (`low_rank.py`).
    """

    in_axes: Mapping[str, int]
    out_axes: Mapping[str, int]
    init_std: float
    dtype: DTypeLike
    kernel_init: Callable[..., Array] | None = None
    has_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        kernel_init = self.kernel_init or nn.initializers.normal(self.init_std)
        kernel = _kernel(self, self.in_axes, self.out_axes, kernel_init)
        lora = low_rank.update_of(self.path)
        if lora is not None and lora.ternary:
            kernel = ternary(kernel)
        x = x.astype(self.dtype)
        names = ()
        if is_cut("embed", self.out_axes.get("embed", 1)):
            names = (*self.in_axes, *self.out_axes)
        rounded = x
        if lora is not None and lora.eight_bit_inputs:
            rounded = eight_bits(x, len(self.in_axes))
        y = contract_columns(rounded, kernel.astype(self.dtype), len(self.in_axes), names)
        if self.has_bias:
            bias = parameter(
                self,
                "bias",
                axes=[_AXES_OF_BIAS.get(name, name) for name in self.out_axes],
                shape=list(self.out_axes.values()),
                init=nn.initializers.zeros,
            )
            y = y + bias.astype(self.dtype).reshape(-1)
        if len(self.out_axes) == 2 and y.ndim == 3:
            # Heads of tokens, which lie where the mesh has both. Placed while they are columns:
            # what XLA places as [B, T, H, D] it also keeps so, and copies before a kernel.
            heads, _ = self.out_axes
            y = nn.with_logical_constraint(y, ("batch", "length", heads))
        y = checkpoint_name(y, OUT_NAME)
        y = y.reshape(*y.shape[:-1], *self.out_axes.values())
        if lora is None:
            return y
        # A module of its own: its random numbers are none of the kernel's.
        update = LowRankUpdate(
            lora,
            self.in_axes,
            self.out_axes,
            self.dtype,
            name=low_rank.UPDATE,
        )
        if not lora.num_experts:
            return y + update(x)
        weights = low_rank.weights_of(self.path, x)
        # None: the pass that the weights come from.
        return y if weights is None else y + update(x, weights)


class Weights(nn.Module):
    """The matrix of a `Projection` without a bias, for who multiplies with it in several ways.

    `[*in, *out]` in `dtype`, the low-rank update included. One input axis; the parameters have the
    names that they have in a `Projection`.
    """

    in_axes: Mapping[str, int]
    out_axes: Mapping[str, int]
    init_std: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self) -> Float[Array, "..."]:
        init = nn.initializers.normal(self.init_std)
        kernel = _kernel(self, self.in_axes, self.out_axes, init)
        lora = low_rank.update_of(self.path)
        if lora is None:
            return kernel.astype(self.dtype)
        if lora.num_experts:
            raise InputError(
                f"config.model.lora.targets: got {'.'.join(self.path)}, expected, with "
                "num_experts, projections that are multiplied with tokens in one way"
            )
        if lora.eight_bit_inputs:
            raise InputError(
                f"config.model.lora.targets: got {'.'.join(self.path)}, expected, with "
                "eight_bit_inputs, projections whose matrix is multiplied with tokens alone"
            )
        if lora.ternary:
            kernel = ternary(kernel)
        kernel = kernel.astype(self.dtype)
        update = LowRankUpdate(
            lora,
            self.in_axes,
            self.out_axes,
            self.dtype,
            name=low_rank.UPDATE,
        )
        (size,) = self.in_axes.values()
        # The update of unit vectors: A B.
        return kernel + update(jnp.eye(size, dtype=self.dtype))


def _kernel(
    module: nn.Module,
    in_axes: Mapping[str, int],
    out_axes: Mapping[str, int],
    init: Callable[..., Array],
) -> Float[Array, "..."]:
    """The parameter "kernel": input axes first, then output axes, [*in, *out]."""
    return parameter(
        module,
        "kernel",
        axes=(*in_axes, *out_axes),
        shape=(*in_axes.values(), *out_axes.values()),
        init=init,
    )


class LowRankUpdate(nn.Module):
    """`(alpha / rank) x A B`, times a gate if it has one: zero until B has trained.

    Of a mixture `(alpha / rank) sum_e weight_e x A_e B_e`.
    """

    config: LoRAConfig
    in_axes: Mapping[str, int]
    out_axes: Mapping[str, int]
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "..."],
        weights: Float[Array, "B T E"] | None = None,
    ) -> Float[Array, "..."]:
        """`weights`: of the experts of a mixture."""
        c = self.config
        fan_in = math.prod(self.in_axes.values())
        # As the axis of routers: experts are few, and every device has all of them.
        experts = ("router",) if c.num_experts else ()
        sizes = (c.num_experts,) if c.num_experts else ()
        a = parameter(
            self,
            "a",
            axes=(*experts, *self.in_axes, "rank"),
            shape=(*sizes, *self.in_axes.values(), c.rank),
            init=nn.initializers.normal(fan_in**-0.5),
        )
        b = parameter(
            self,
            "b",
            axes=(*experts, "rank", *self.out_axes),
            shape=(*sizes, c.rank, *self.out_axes.values()),
            init=nn.initializers.zeros,
        )
        # Where parameters are made in the same program, the compiler sees that b is all zeros.
        b = opaque(b)
        if weights is None:
            low = contract(x, a.astype(self.dtype), len(self.in_axes))
            update = contract(low, b.astype(self.dtype), 1)
        else:
            update = self._mixture(x, weights, a, b)
        update = c.alpha / c.rank * update
        if not c.gate_start:
            return update
        init = nn.initializers.constant(c.gate_start)
        gate = parameter(self, low_rank.GATE, axes=[], shape=[], init=init)
        return gate.astype(self.dtype) * update

    def _mixture(
        self,
        x: Float[Array, "..."],
        weights: Float[Array, "B T E"],
        a: Float[Array, "..."],
        b: Float[Array, "..."],
    ) -> Float[Array, "..."]:
        """`sum_e weight_e x A_e B_e`.

        Args:
          x: what is projected.
          weights: of the experts.
          a: [E, *in, r].
          b: [E, r, *out].
        """
        experts, rank = b.shape[:2]
        before = x.shape[: x.ndim - len(self.in_axes)]
        # One weight for all that a token has between itself and the axes that are summed over.
        between = (1,) * (len(before) - 2)
        y = low_rank.lora_experts(
            x.reshape(*before, -1),
            weights.reshape(*weights.shape[:2], *between, experts),
            a.reshape(experts, -1, rank).astype(self.dtype),
            b.reshape(experts, rank, -1).astype(self.dtype),
        )
        return y.reshape(*before, *self.out_axes.values()).astype(self.dtype)
