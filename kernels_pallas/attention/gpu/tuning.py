"""Block sizes and warps of the GPU kernels of `attention`, as data.

Hopper's rows of 16 bits at D = 64 and 128 were chosen on an H200 by the time of each kernel
(`benchmarks/gpu/tune.py`); with a gate dk and dv at D = 128 spill 112 bytes of registers. The
others were chosen without a device, by what `ptxas` and `nvdisasm` count for each chip
(`benchmarks/gpu_report.py`): no matrix instruction serialized, no register spilled, two programs of
four warps or one of eight on a multiprocessor at least, and then few instructions issued for a pair
of a query and a key. Where the chips differ, and why:

    Hopper  Two warp groups of the matrix unit take 128 rows of a block, and one takes 64. It reads
            its operands from shared memory, of which there are 227 KiB: two or three stages.
    A100    Operands of the matrix unit are registers, so blocks are half as large, or have twice as
            many warps; 163 KiB of shared memory hold one stage less.

Three passes of TF32 keep every operand twice. At 64 rows that is 1.9 KB of spilled registers a
thread at D = 128; 32 by 32 spill at most 44 B, and issue a quarter less for a pair.
"""

from typing import NamedTuple

from kernels_pallas.common.gpu import chip
from kernels_pallas.common.padding import power_of_two

MAX_D = 256
# A tensor core's tile has 16 rows.
MIN_BLOCK = 16


class KernelConfig(NamedTuple):
    """How a kernel is cut. Only its time and memory depend on this."""

    # Queries in a tile. A program of forward and dq has one block of them.
    block_q: int
    # Keys in a tile. A program of dk and dv has one block of them.
    block_k: int
    # Warps that compute a tile together.
    num_warps: int
    # Tiles whose loads are in flight.
    num_stages: int


class Schedule(NamedTuple):
    """One configuration for each kernel."""

    # y, and what is saved.
    forward: KernelConfig
    dq: KernelConfig
    # dk and dv; dk alone where `dv` is given.
    dkv: KernelConfig
    # Of a kernel of its own, where registers hold only one of dk and dv.
    dv: KernelConfig | None = None

    def fitted(self, T: int) -> "Schedule":
        """Blocks no larger than a short sequence."""
        # The power of two that T fits into.
        most = max(MIN_BLOCK, power_of_two(T))
        return Schedule(
            forward=_at_most(self.forward, most),
            dq=_at_most(self.dq, most),
            dkv=_at_most(self.dkv, most),
            dv=None if self.dv is None else _at_most(self.dv, most),
        )


def _at_most(config: KernelConfig, block: int) -> KernelConfig:
    return config._replace(
        block_q=min(config.block_q, block),
        block_k=min(config.block_k, block),
    )


# fmt: off
# How matmuls are done -> the larger of K and V -> forward, dq, dkv and, where it is a kernel of its
# own, dv.
HOPPER = {
    "bfloat16": {
        64: Schedule(KernelConfig(128, 64, 4, 3), KernelConfig(128, 64, 4, 3),
                     KernelConfig(64, 64, 4, 3)),
        128: Schedule(KernelConfig(64, 64, 4, 3), KernelConfig(128, 64, 8, 3),
                      KernelConfig(64, 64, 4, 2)),
        256: Schedule(KernelConfig(128, 64, 8, 2), KernelConfig(128, 32, 8, 2),
                      KernelConfig(32, 128, 8, 2), KernelConfig(64, 128, 8, 2)),
    },
    "tf32": {
        64: Schedule(KernelConfig(64, 32, 4, 2), KernelConfig(64, 32, 4, 2),
                     KernelConfig(32, 64, 4, 2)),
        128: Schedule(KernelConfig(64, 32, 4, 2), KernelConfig(64, 16, 4, 2),
                      KernelConfig(16, 64, 4, 2)),
        256: Schedule(KernelConfig(64, 16, 8, 1), KernelConfig(32, 32, 8, 1),
                      KernelConfig(32, 32, 8, 1), KernelConfig(16, 64, 8, 1)),
    },
    "tf32_x3": {
        64: Schedule(KernelConfig(64, 32, 4, 2), KernelConfig(64, 32, 4, 2),
                     KernelConfig(16, 64, 4, 2)),
        128: Schedule(KernelConfig(64, 16, 4, 1), KernelConfig(32, 32, 8, 1),
                      KernelConfig(32, 32, 8, 1), KernelConfig(16, 64, 8, 1)),
    },
}
AMPERE = HOPPER | {
    "bfloat16": {
        64: Schedule(KernelConfig(128, 64, 8, 2), KernelConfig(64, 64, 4, 2),
                     KernelConfig(32, 64, 4, 2)),
        128: Schedule(KernelConfig(128, 64, 8, 2), KernelConfig(64, 32, 4, 2),
                      KernelConfig(32, 64, 8, 2)),
        256: Schedule(KernelConfig(64, 32, 8, 2), KernelConfig(64, 32, 8, 2),
                      KernelConfig(32, 64, 8, 1), KernelConfig(32, 64, 8, 1)),
    },
    # Two stages of dq are 96 KiB: one program on a multiprocessor instead of two.
    "tf32_x3": HOPPER["tf32_x3"] | {
        64: Schedule(KernelConfig(64, 32, 4, 2), KernelConfig(64, 32, 4, 1),
                     KernelConfig(16, 64, 4, 2)),
    },
}
# fmt: on

# By a part of jax.Device.device_kind.
TUNED = {"H200": HOPPER, "H100": HOPPER, "A100": AMPERE}
DEFAULT_CHIP = "H200"

# Of `attention_step`. block_q: the least number of heads that are rows of a tile; block_k: slots of
# up to 128 channels.
STEP = KernelConfig(
    block_q=16,
    block_k=64,
    num_warps=4,
    num_stages=3,
)
# So many programs read a cache: two a multiprocessor of an H200.
STEP_PROGRAMS = 264


def schedule(
    K: int,
    V: int,
    matmuls: str,
    sums: int,
    T: int,
) -> Schedule:
    """The schedule of a call on the device that it is compiled for.

    Args:
      K: channels of a query and a key, a power of two.
      V: channels of a value, a power of two.
      matmuls: how matmuls are done: "bfloat16", "tf32" or "tf32_x3".
      sums: of weighted values that the normalizer keeps of a row.
      T: tokens in a row.

    Returns:
      Blocks no larger than T.
    """
    # Smaller heads use the row of 64: they have fewer bytes, not more rows.
    chosen = TUNED[chip(TUNED, DEFAULT_CHIP)][matmuls][max(64, K, V)]
    forward = chosen.forward
    if sums > 1 and max(K, V) > 64:
        # Registers hold as many sums in all, so half as many rows of two.
        forward = forward._replace(block_q=forward.block_q // sums)
    return chosen._replace(forward=forward).fitted(T)


def step(K: int, V: int) -> KernelConfig:
    """For `attention_step`: as many bytes of the cache are in flight for large heads."""
    return STEP._replace(block_k=STEP.block_k * 128 // max(128, K, V))


def largest(matmuls: str) -> int:
    """The largest K or V that the table has a row for."""
    return max(HOPPER[matmuls])


def padded_channels(D: int) -> int:
    """The size of a tile's axis of D channels: Triton has no others."""
    return max(MIN_BLOCK, power_of_two(D))
