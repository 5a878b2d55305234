"""The static arguments of the Mosaic GPU kernel of `attention`, and its block sizes as data.

What fits, for `stages` blocks of keys and as many of values, into the 227 KiB of shared memory of a
program (16-bit numbers; D is K and V, padded to one power of two):

    queries, later y     2 warp groups x 64 rows x D        16 or 32 KiB at D = 64 or 128
    weights              2 x 64 x block_k                   16 KiB for every 64 keys
    keys and values      stages x 2 x block_k x D           32 or 64 KiB a stage of 128 keys

and into the registers of a warp group's 128 threads, of which each computing one has 232: a sum is
D / 2 of them, the product that is added to it as many, a tile of logits block_k / 2. D = 256 is too
much: with 64 keys in a tile 144 bytes a thread and more were spilled, also with a half or a quarter
of the sum multiplied at a time, so it has no row. One setting was timed.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kernels_pallas.attention.inputs import AttentionOptions
from kernels_pallas.attention.kernels import GateKind, count_visible_pairs
from kernels_pallas.common.padding import power_of_two

# What a kernel gets for an array. Its type at run time is `jax.Ref`, which does not declare `at`.
Ref = Any

# Rows of a matrix instruction of a warp group.
ROWS = 64
# Warp groups of a program that compute; one more copies.
COMPUTING = 2
# Queries in a program's block.
BLOCK_Q = COMPUTING * ROWS
# A swizzled tile of shared memory has rows of 128 bytes.
SWIZZLE_BYTES = 128
MIN_D = 64
MAX_D = 128


class KernelConfig(NamedTuple):
    """How the kernel is cut. Only its time and memory depend on this."""

    # Keys in a tile.
    block_k: int
    # Blocks of keys, and of values, in shared memory.
    stages: int
    # Registers of a thread that computes, and of one that copies: multiples of 8. Twice the one and
    # the other are at most 65,536 / 128.
    computing_registers: int
    copying_registers: int


# Channels -> the largest blocks that fit.
TUNED = {
    64: KernelConfig(128, 3, 232, 40),
    128: KernelConfig(128, 2, 232, 40),
}


class Plan(NamedTuple):
    """The static arguments of a call."""

    options: AttentionOptions
    # The true number of tokens, and that of whole blocks.
    T: int
    length: int
    H: int
    Hk: int
    # Channels of queries, keys and values, padded.
    D: int
    # The kind of the output gate.
    gate: GateKind
    # Of q, k, v, the weights and y.
    dtype: jnp.dtype
    config: KernelConfig
    interpret: bool

    @property
    def causal(self) -> bool:
        """Whether a query sees no later key."""
        return self.options.causal

    @property
    def window(self) -> int | None:
        """How far a query sees; None for no limit."""
        return self.options.window

    @property
    def group(self) -> int:
        """Query heads to a key head."""
        return self.H // self.Hk

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that the mask leaves."""
        return count_visible_pairs(self.T, self.causal, self.window)


class KernelInputs(NamedTuple):
    """The arrays of a call, padded to whole blocks and to D channels."""

    q: Float[Array, "B T H D"]
    k: Float[Array, "B T Hk D"]
    v: Float[Array, "B T Hk D"]
    gate_logits: Float[Array, "B T H D"] | Float[Array, "B H T"] | None


def padded_channels(D: int) -> int:
    """The size of a tile's axis of D channels."""
    return max(MIN_D, power_of_two(D))
