"""Block sizes and warps of the GPU kernels of `grouped_matmul`, as data.

The rows were chosen without a device, by what ptxas 13.5 and nvdisasm count for each chip, of 16
bits, 2048 -> 1024; an H200 found none that is faster:

    Hopper  The matrix unit reads both operands from shared memory, so registers hold the sums
            alone: two warp groups with 64 of the 128 rows each need 98 to 104 of them, and two
            programs of 96 KiB fit on a multiprocessor, one of which loads while the other
            multiplies. 256 columns issue 40 % fewer instructions for a product and leave one
            program; each product took 6 % less time, and the whole call more: not taken.
    A100    Operands are registers. Four warps of 64 by 64 each read what eight of 64 by 32 read
            twice. With 32 of the inner axis in four stages they need 208 to 247 registers, and two
            programs fit; with 64 the gradients spill 16 to 44 B, and eight warps need 128 to 173
            registers, of which one program fits. Two products of a tile (an expert's way back)
            spill 32 B at 128 rows, at 64 nothing; of float32 284 B at 64 columns, at 32 nothing.
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
      gathered: the same for several arrays of rows, whose products are summed.
      outer: the matrices' gradient.
    """

    rows: Blocks
    gathered: Blocks
    outer: Blocks


# By a part of jax.Device.device_kind, then by the bytes of a number.
HOPPER = {
    2: Schedule(
        rows=Blocks(128, 64, 128, 8, 3),
        gathered=Blocks(128, 64, 128, 8, 3),
        outer=Blocks(64, 128, 128, 8, 3),
    ),
    4: Schedule(
        rows=Blocks(64, 32, 64, 4, 2),
        gathered=Blocks(64, 32, 64, 4, 2),
        outer=Blocks(32, 64, 64, 4, 2),
    ),
}
AMPERE = HOPPER | {
    2: Schedule(
        rows=Blocks(128, 32, 128, 4, 4),
        gathered=Blocks(64, 32, 128, 4, 4),
        outer=Blocks(32, 128, 128, 4, 4),
    ),
    4: HOPPER[4]._replace(gathered=Blocks(64, 32, 32, 4, 2)),
}
TUNED = {"H200": dict(HOPPER), "H100": dict(HOPPER), "A100": AMPERE}
DEFAULT_CHIP = "H200"


def schedule(operand_bytes: int) -> Schedule:
    """The row of the device that the call is compiled for.

    Args:
      operand_bytes: of one number that is multiplied; 32 bits take twice the room.
    """
    return TUNED[chip(TUNED, DEFAULT_CHIP)][operand_bytes]
