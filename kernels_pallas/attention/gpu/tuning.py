"""Block sizes and warps of the GPU kernels of `attention`, as data.

The rows were chosen without a device, by `ptxas`: the largest blocks that do not spill registers, and fit into shared
memory. 128 rows of a block are as many as two warp groups of Hopper's matrix unit take, 64 as many as one.
"""

from typing import NamedTuple

from kernels_pallas.common.device import device_kind

MAX_D = 256
MIN_BLOCK = 16  # a tensor core's tile has 16 rows


class Cut(NamedTuple):
    """How a kernel is cut. Only its time and memory depend on this."""

    own: int  # tokens of a program's block: queries; keys in the kernel of dk and dv
    other: int  # tokens that it meets at a time
    warps: int
    stages: int  # tiles of the others in flight


class Schedule(NamedTuple):
    """One cut for each kernel."""

    forward: Cut
    dq: Cut
    dkv: Cut
    # where registers hold only one of dk and dv: a kernel of its own, and dkv is of dk alone
    dv: Cut | None = None

    def fitted(self, T: int) -> "Schedule":
        """Blocks no larger than a short sequence."""
        most = max(MIN_BLOCK, 1 << (T - 1).bit_length())
        fit = lambda c: c and c._replace(own=min(c.own, most), other=min(c.other, most))
        return Schedule(*map(fit, self))


# How matmuls are done -> the larger of K and V -> Schedule.
HOPPER = {
    "bfloat16": {
        64: Schedule(Cut(128, 64, 4, 3), Cut(128, 64, 8, 3), Cut(128, 64, 8, 3)),
        128: Schedule(Cut(128, 64, 8, 3), Cut(128, 64, 8, 3), Cut(128, 32, 8, 2)),
        256: Schedule(
            Cut(128, 64, 8, 2), Cut(128, 32, 8, 2), Cut(128, 32, 8, 2), Cut(128, 64, 8, 2)
        ),
    },
    "tf32": {
        64: Schedule(Cut(64, 32, 4, 2), Cut(64, 32, 4, 2), Cut(64, 32, 4, 2)),
        128: Schedule(Cut(64, 32, 4, 2), Cut(64, 16, 4, 2), Cut(64, 16, 4, 2)),
        256: Schedule(Cut(64, 16, 8, 1), Cut(64, 16, 8, 1), Cut(64, 16, 8, 1), Cut(64, 16, 8, 1)),
    },
    "tf32_x3": {
        64: Schedule(Cut(64, 32, 4, 2), Cut(64, 32, 4, 2), Cut(64, 16, 4, 2)),
        128: Schedule(Cut(64, 16, 4, 1), Cut(64, 16, 8, 1), Cut(64, 16, 8, 1), Cut(64, 16, 8, 1)),
    },
}
AMPERE = HOPPER | {
    "bfloat16": {
        64: Schedule(Cut(128, 64, 4, 2), Cut(64, 64, 4, 2), Cut(64, 32, 4, 2)),
        128: Schedule(Cut(128, 64, 8, 2), Cut(64, 32, 4, 2), Cut(64, 32, 8, 2)),
        256: Schedule(Cut(64, 32, 8, 2), Cut(64, 32, 8, 2), Cut(64, 32, 8, 1), Cut(64, 32, 8, 1)),
    },
}
# chip, as jax.Device.device_kind names it
TUNED = {"H200": HOPPER, "H100": HOPPER, "A100": AMPERE}
DEFAULT_CHIP = "H200"

STEP = Cut(
    16, 64, 4, 3
)  # own: the least number of heads that are rows of a tile; other: slots, of up to 128 numbers
STEP_PROGRAMS = 264  # so many share a cache: two a multiprocessor of an H200


def schedule(K: int, V: int, matmuls: str, sums: int, T: int) -> Schedule:
    """For a call on the device that it is compiled for; K and V are powers of two.

    A normalizer with two sums holds half as many rows of each.
    """
    found = TUNED[_chip()][matmuls][max(64, K, V)]
    forward = found.forward
    if sums > 1 and max(K, V) > 64:
        forward = forward._replace(own=forward.own // sums)
    return found._replace(forward=forward).fitted(T)


def step(K: int, V: int) -> Cut:
    """For `attention_step`: as many bytes of the cache in flight for large heads."""
    return STEP._replace(other=STEP.other * 128 // max(128, K, V))


def largest(matmuls: str) -> int:
    """The largest K or V that the table has a row for."""
    return max(HOPPER[matmuls])


def _chip() -> str:
    """The table's name of the device that the surrounding computation is compiled for."""
    kind = device_kind()
    return next((name for name in TUNED if name in kind), DEFAULT_CHIP)
