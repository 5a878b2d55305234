"""Block sizes and warps of the GPU kernels of `grouped_matmul`, as data.

`benchmarks/tune_gpu.py` chooses rows by time on a device. These were chosen without one, by what
ptxas and nvdisasm count for each chip.
"""

from typing import NamedTuple

from kernels_pallas.common.gpu import chip


class Blocks(NamedTuple):
    """Sizes of a program's tile, powers of two. Only its time depends on them.

    Attributes:
      inner: of the axis that is summed (rows times groups), or of K (the matrices' gradient).
      columns: of the result.
    """

    rows: int
    inner: int
    columns: int
    warps: int
    stages: int


class Schedule(NamedTuple):
    """One for each kernel.

    Attributes:
      rows: rows times their group's matrices.
      outer: the matrices' gradient.
    """

    rows: Blocks
    outer: Blocks


# By a part of jax.Device.device_kind, then by the bytes of a number.
HOPPER = {
    2: Schedule(Blocks(128, 64, 128, 8, 3), Blocks(64, 128, 128, 8, 3)),
    4: Schedule(Blocks(64, 32, 64, 4, 2), Blocks(32, 64, 64, 4, 2)),
}
TUNED = {"H200": dict(HOPPER), "H100": dict(HOPPER), "A100": dict(HOPPER)}
DEFAULT_CHIP = "H200"


def schedule(operand_bytes: int) -> Schedule:
    """The row of the device that the call is compiled for.

    Args:
      operand_bytes: of one number that is multiplied; 32 bits take twice the room.
    """
    return TUNED[chip(TUNED, DEFAULT_CHIP)][operand_bytes]
