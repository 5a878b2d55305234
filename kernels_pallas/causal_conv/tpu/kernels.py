"""The kernels of `causal_conv` on TPU, of a block of tokens and channels.

They compute 128 channels at a time, of all tokens of the block: an input of `lag` tokens ago is in
a register that is turned along its sublanes. Of segments they know one word a token: bit `lag`
tells that the input of `lag` tokens ago is of the same segment. A grid step first spreads these
bits over the lanes, as words of all bits or none, so that one `&` is a select.

With z the sum of W taps, and y = silu(z) or z:

    z_t       = bias + sum over lags of kernel[W-1-lag] x_{t-lag}
    dz        = dy silu'(z)                       z once more, from x
    dx_t      = sum over lags of kernel[W-1-lag] dz_{t+lag}
    dkernel   = for every lag the sum over tokens of dz_t x_{t-lag}
    dbias     = sum over tokens of dz
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from kernels_pallas.common.tpu import LANES, SUBLANES, Ref, as_column, sigmoid

# The tokens before a block of them, as a block of their own: a register of bfloat16.
HALO = 16


class Arrays(NamedTuple):
    """What a kernel reads: arrays, their blocks' specifications, or references to these.

    Attributes:
      x: the inputs.
      halo: the same array; of it a block has the 16 tokens before those of x.
      kernel, bias: float32; no bias is None.
      same: a word a token, see the module's docstring; None without segments.
      dy: the gradient of y; None in the forward kernel.
    """

    x: Any  # [B, T, F]
    halo: Any  # [B, T, F]
    kernel: Any  # [W, F]
    bias: Any  # [1, F]
    same: Any  # [B, 1, T]
    dy: Any  # [B, T, F]


class _Strip(NamedTuple):
    """128 channels of a block.

    Attributes:
      x: the inputs.
      before: the 8 inputs before the first.
      masks: of the block; None without segments.
    """

    x: Float[Array, "R 128"]
    before: Float[Array, "8 128"]
    masks: Ref | None

    def of_same_segment(self, lag: int, x: Float[Array, "R 128"]) -> Float[Array, "R 128"]:
        """x of the tokens whose input of `lag` tokens ago is of the same segment, and zeros."""
        if self.masks is None:
            return x
        # Not a product: x may be anything elsewhere, NaN too.
        bits = lax.bitcast_convert_type(x, jnp.int32) & self.masks[lag - 1]
        return lax.bitcast_convert_type(bits, jnp.float32)

    def lagged(self, lag: int) -> Float[Array, "R 128"]:
        """The inputs of `lag` tokens ago; zeros where they are of another segment."""
        # What is turned in from below lies in the rows of `before`.
        turned = pltpu.roll(jnp.concatenate([self.before, self.x]), lag, 0)[SUBLANES:]
        return self.of_same_segment(lag, turned)


def spread(same: Ref, masks: Ref) -> None:
    """The bits of a block's words, each as a word of all bits or none, over all lanes."""
    words = jnp.broadcast_to(as_column(same[0]), masks.shape[1:])
    for i in range(masks.shape[0]):
        # Bit i + 1 to the sign, and from there over the word.
        masks[i] = words << 30 - i >> 31


def _strip(refs: Arrays, masks: Ref | None, is_first: Any, lanes: Any) -> _Strip:
    """`is_first`: whether the block is the first one of its row."""
    before = refs.halo[0, :, lanes].astype(jnp.float32)[HALO - SUBLANES :]
    # Before the first block is no token, and what the halo has is another's.
    before = jnp.where(is_first, 0.0, before)
    return _Strip(refs.x[0, :, lanes].astype(jnp.float32), before, masks)


def _tap(refs: Arrays, lag: int, lanes: Any) -> Float[Array, "1 128"]:
    """The weights of the inputs of `lag` tokens ago."""
    w = refs.kernel.shape[0] - 1 - lag
    return refs.kernel[w : w + 1, lanes]


def _sum_of_taps(refs: Arrays, strip: _Strip, lanes: Any) -> Float[Array, "R 128"]:
    """z of the module's docstring."""
    z = strip.x * _tap(refs, 0, lanes)
    for lag in range(1, refs.kernel.shape[0]):
        z += strip.lagged(lag) * _tap(refs, lag, lanes)
    if refs.bias is not None:
        z += refs.bias[:, lanes]
    return z


def _for_each_strip(channels: int, body: Callable[[Any], None]) -> None:
    """Calls `body` for every 128 channels of a block."""

    def step(i: Array, _: None) -> None:
        body(pl.ds(pl.multiple_of(i * LANES, LANES), LANES))

    lax.fori_loop(0, channels // LANES, step, None)


def forward(
    is_activated: bool,
    refs: Arrays,
    masks: Ref | None,
    y_ref: Ref,
) -> None:
    """y of a block."""
    is_first = pl.program_id(2) == 0

    def of_strip(lanes: Any) -> None:
        z = _sum_of_taps(refs, _strip(refs, masks, is_first, lanes), lanes)
        y = z * sigmoid(z) if is_activated else z
        y_ref[0, :, lanes] = y.astype(y_ref.dtype)

    _for_each_strip(y_ref.shape[2], of_strip)


def backward(
    is_activated: bool,
    T: int,
    refs: Arrays,
    masks: Ref | None,
    dx_ref: Ref,
    sums_ref: Ref,
    after_ref: Ref,
) -> None:
    """dx of a block, and what its tokens add to the sums.

    Args:
      is_activated: whether a SiLU follows.
      T: tokens of a row.
      refs, masks: the blocks, and what is of the same segment.
      dx_ref, sums_ref: the outputs.
      after_ref: by lag, dz of the 8 tokens after the block, as those `lag` before them receive it.
    """
    _, num_rows, channels = dx_ref.shape
    W = refs.kernel.shape[0]
    block = pl.num_programs(2) - 1 - pl.program_id(2)

    # The last block of a row comes first.
    @pl.when(pl.program_id(2) == 0)
    def _():
        sums_ref[...] = jnp.zeros_like(sums_ref)
        after_ref[...] = jnp.zeros_like(after_ref)

    def of_strip(lanes: Any) -> None:
        strip = _strip(refs, masks, block == 0, lanes)
        dz = refs.dy[0, :, lanes].astype(jnp.float32)
        if T % num_rows:
            # Behind the last token is what happens to be there.
            token = block * num_rows + lax.broadcasted_iota(jnp.int32, (num_rows, 1), 0)
            dz = jnp.where(token < T, dz, 0.0)
            strip = strip._replace(x=jnp.where(token < T, strip.x, 0.0))
        if is_activated:
            z = _sum_of_taps(refs, strip, lanes)
            gate = sigmoid(z)
            # The slope of z sigmoid(z).
            dz = dz * (gate + z * gate * (1.0 - gate))

        dx = dz * _tap(refs, 0, lanes)
        sums = [_sum_of_registers(dz * strip.x)]
        # Read before anything is written: a write holds up what is read after it.
        after = [after_ref[lag - 1, :, lanes] for lag in range(1, W)]
        new_after = []
        for lag in range(1, W):
            # To the tokens `lag` before.
            sent = strip.of_same_segment(lag, dz)
            # Up by `lag`, which is down by all rows but those.
            extended = jnp.concatenate([sent, after[lag - 1]])
            turned = pltpu.roll(extended, num_rows + SUBLANES - lag, 0)[:num_rows]
            dx += turned * _tap(refs, lag, lanes)
            new_after.append(sent[:SUBLANES])
            sums.insert(0, _sum_of_registers(dz * strip.lagged(lag)))
        if refs.bias is not None:
            sums.append(_sum_of_registers(dz))
        dx_ref[0, :, lanes] = dx.astype(dx_ref.dtype)
        for i, x in enumerate(new_after):
            after_ref[i, :, lanes] = x
        for i, x in enumerate(sums):
            sums_ref[0, i, :, lanes] += x

    _for_each_strip(channels, of_strip)


def _sum_of_registers(x: Float[Array, "R 128"]) -> Float[Array, "8 128"]:
    """The sum over tokens, but for 8 of them."""
    return x.reshape(-1, SUBLANES, LANES).sum(0)
