"""`causal_conv` on TPU (Pallas, Mosaic): one kernel forward, one backward (`kernels.py`).

A grid step takes some tokens of one row and some channels, and beside them the 16 tokens before.
Saved for the backward pass: the inputs. The backward kernel takes the blocks of tokens from the
last to the first: what the tokens after a block send back is there when the block needs it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from kernels_pallas.causal_conv import xla
from kernels_pallas.causal_conv.inputs import ConvInputs
from kernels_pallas.causal_conv.tpu import kernels
from kernels_pallas.causal_conv.tpu.kernels import HALO, Arrays
from kernels_pallas.common.cost import moved
from kernels_pallas.common.mesh import like
from kernels_pallas.common.padding import padded, round_up
from kernels_pallas.common.second_order import differentiable_gradient
from kernels_pallas.common.tpu import (
    LANES,
    SUBLANES,
    VMEM_LIMIT,
    Interpret,
    Ref,
    in_hbm,
    interpret_params,
)

# Tokens and channels of a grid step: 2 MiB of bfloat16. With fewer tokens there is more waiting in
# a step, with fewer channels more of it is for segments.
MOST_ROWS = 512
MOST_CHANNELS = 2048
# The inputs before a block that it needs lie in one register.
MOST_TAPS = SUBLANES + 1
# With fewer, a call costs more than what it saves.
LEAST_TOKENS = 128


def unsupported(inputs: ConvInputs) -> str | None:
    """Why this backend cannot take a call, or None when it can."""
    B, T, F = inputs.x.shape
    W = inputs.kernel.shape[0]
    if inputs.x.dtype != jnp.bfloat16:
        return f"takes x in bfloat16, not {inputs.x.dtype}"
    if F % LANES:
        return f"takes a multiple of {LANES} channels, not {F}"
    if W > MOST_TAPS:
        return f"takes kernels of up to {MOST_TAPS} tokens, not {W}"
    if B * T < LEAST_TOKENS:
        return f"takes {LEAST_TOKENS} tokens or more, not {B * T}"
    return None


class _Call(NamedTuple):
    """The static arguments of a call.

    Attributes:
      is_activated: whether a SiLU follows.
      interpret: what `pallas_call` takes.
    """

    is_activated: bool
    interpret: Interpret


def causal_conv(
    inputs: ConvInputs,
    is_activated: bool,
    interpret: Interpret,
) -> Float[Array, "B T F"]:
    """As `api.causal_conv`, of the rows and channels of one device."""
    return _conv(_Call(is_activated, interpret_params(interpret, inputs.x)), inputs)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(call: _Call, inputs: ConvInputs) -> Float[Array, "B T F"]:
    (y,) = _run(
        call,
        partial(kernels.forward, call.is_activated),
        _arrays(inputs),
        [like(inputs.x, inputs.x.shape, inputs.x.dtype)],
        is_backward=False,
    )
    return y


def _conv_forward(call: _Call, inputs: ConvInputs):
    return _conv(call, inputs), inputs


def _conv_backward(call: _Call, inputs: ConvInputs, dy: Array) -> tuple[ConvInputs]:
    gradients = differentiable_gradient(
        partial(_gradients, call),
        partial(xla.causal_conv, is_activated=call.is_activated),
        inputs,
        inputs,
        dy,
    )
    return (gradients,)


_conv.defvjp(_conv_forward, _conv_backward)


def _gradients(call: _Call, inputs: ConvInputs, dy: Array) -> ConvInputs:
    """Of all but the segments."""
    B, T, F = inputs.x.shape
    W = inputs.kernel.shape[0]
    # A sum for each tap, and that of the bias; their 8 rows are still to be added.
    num_sums = W + (inputs.bias is not None)
    dx, sums = _run(
        call,
        partial(kernels.backward, call.is_activated, T),
        _arrays(inputs, dy),
        [
            like(inputs.x, inputs.x.shape, inputs.x.dtype),
            like(inputs.x, (B, num_sums, SUBLANES, F), jnp.float32),
        ],
        is_backward=True,
    )
    of_taps = sums.sum((0, 2))
    dbias = None
    if inputs.bias is not None:
        dbias = of_taps[W].astype(inputs.bias.dtype)
    return ConvInputs(dx, of_taps[:W].astype(inputs.kernel.dtype), dbias, None)


def _arrays(inputs: ConvInputs, dy: Array | None = None) -> Arrays:
    W, T = inputs.kernel.shape[0], inputs.x.shape[1]
    bias, same = None, None
    if inputs.bias is not None:
        bias = inputs.bias.astype(jnp.float32)[None]
    if inputs.segment_ids is not None and W > 1:
        words = jnp.zeros_like(inputs.segment_ids, jnp.int32)
        for lag in range(1, W):
            is_same = xla.lagged(inputs.segment_ids, lag) == inputs.segment_ids
            # Bit 0 stays 0: a token is of its own segment.
            words |= is_same.astype(jnp.int32) << lag
        # Of whole blocks: what runs along lanes may not end inside of one.
        same = padded(words, 1, round_up(T, _block_rows(T)))[:, None]
    return Arrays(inputs.x, inputs.x, inputs.kernel.astype(jnp.float32), bias, same, dy)


def _run(
    call: _Call,
    kernel: Callable[..., None],
    arrays: Arrays,
    outputs: list[jax.ShapeDtypeStruct],
    *,
    is_backward: bool,
) -> Sequence[Array]:
    """Runs a kernel over (rows, blocks of channels, blocks of tokens).

    Args:
      call: the static arguments.
      kernel: of `kernels.py`.
      arrays: of the call.
      outputs: as x, or sums [B, n, 8, F].
      is_backward: the blocks of tokens come from the last to the first, one after the other, and
        there is a scratch for dz of the tokens after a block.
    """
    B, T, F = arrays.x.shape
    W = arrays.kernel.shape[0]
    rows = _block_rows(T)
    # Blocks of one size, as far as lanes allow.
    channels = round_up(pl.cdiv(F, pl.cdiv(F, MOST_CHANNELS)), LANES)
    num_blocks = pl.cdiv(T, rows)

    def tokens(t: Any) -> Any:
        return num_blocks - 1 - t if is_backward else t

    def before(t: Any) -> Any:
        # The first block has none; what it gets is not used.
        return jnp.maximum(tokens(t) * (rows // HALO) - 1, 0)

    of_x = pl.BlockSpec((1, rows, channels), lambda b, f, t: (b, tokens(t), f))
    of_sums = pl.BlockSpec(
        (1, outputs[-1].shape[1], SUBLANES, channels), lambda b, f, t: (b, 0, 0, f)
    )
    specs = Arrays(
        x=of_x,
        halo=pl.BlockSpec((1, HALO, channels), lambda b, f, t: (b, before(t), f)),
        kernel=pl.BlockSpec((W, channels), lambda b, f, t: (0, f)),
        bias=pl.BlockSpec((1, channels), lambda b, f, t: (0, f)),
        same=pl.BlockSpec((1, 1, rows), lambda b, f, t: (b, 0, tokens(t))),
        dy=of_x,
    )
    given, tree = jax.tree.flatten(arrays)
    in_specs = [spec for spec, x in zip(specs, arrays) if x is not None]

    # Both by lag; the second is there for one tap too.
    scratch = {}
    if arrays.same is not None:
        scratch["masks"] = pltpu.VMEM((W - 1, rows, LANES), jnp.int32)
    if is_backward:
        scratch["after_ref"] = pltpu.VMEM((W, SUBLANES, channels), jnp.float32)

    def body(*refs: Ref, masks: Ref | None = None, **scratch: Ref) -> None:
        blocks: Arrays = jax.tree.unflatten(tree, refs[: len(given)])
        if masks is not None:
            kernels.spread(blocks.same, masks)
        kernel(blocks, masks, *refs[len(given) :], **scratch)

    return pl.pallas_call(
        body,
        grid=(B, pl.cdiv(F, channels), num_blocks),
        in_specs=in_specs,
        out_specs=[of_x, of_sums][: len(outputs)],
        out_shape=outputs,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        cost_estimate=pl.CostEstimate(
            flops=(6 if is_backward else 2) * W * arrays.x.size,
            transcendentals=arrays.x.size if call.is_activated else 0,
            # Of the halo, which is x once more, little is moved.
            bytes_accessed=moved([*given, *outputs]) - moved([arrays.halo]),
        ),
        interpret=call.interpret,
        name="causal_conv_backward" if is_backward else "causal_conv_forward",
    )(*[in_hbm(x, call.interpret) for x in given])


def _block_rows(T: int) -> int:
    """How many tokens a grid step takes: whole registers of the words of segments."""
    return min(MOST_ROWS, round_up(T, LANES))
