"""Block sizes and warps of the GPU kernels, as data.

A schedule changes only the time of a call, and the memory of its states: one for each chunk.
Hopper's rows were chosen on an H200 by the time of each kernel (`benchmarks/gpu/tune.py`): the
fastest way back through vector decays, by a sixth, spills 580 bytes of registers. The others were
chosen without a device, by what `ptxas` says: the largest blocks that do not spill registers.
"""

from typing import NamedTuple

from kernels_pallas.common.gpu import chip as chip_of
from kernels_pallas.linear_scan.gpu.tuning import DEFAULT_CHIP, block, fitting_stages
from kernels_pallas.linear_scan.gpu.tuning import TUNED as SCAN_CHIPS

# A tile of the tensor core has 16 rows. The inverse of more than 64 is too long a program.
MIN_CHUNK = 16
MAX_CHUNK = 64
# The largest K, of which a program holds a whole state, and the largest V.
MAX_K = 256
MAX_V = 512
# The fewest chunks that are scanned as one part.
SEGMENT_CHUNKS = 8
# The fewest parts that a sequence is cut into: that takes two more scans, see `scan.py`.
MIN_SEGMENTS = 4


class Schedule(NamedTuple):
    """How the kernels are cut. block_k and block_v are upper bounds: a block divides its axis.

    Attributes:
      intra_*: the kernel of the scores inside a chunk.
      inverse_warps: the kernel of the inverses.
      scan_*: the scan over chunks, forward and backward. `scan_stages` is an upper bound too:
        chunks in flight, as far as they fit into shared memory.
      programs_per_core: a sequence is cut into segments until there are so many programs of the
        scan kernel a multiprocessor.
      changes_*: the first kernel of the way back through a chunk.
      back_*: the second one.
    """

    chunk: int = 64
    intra_block_k: int = 32
    intra_warps: int = 8
    inverse_warps: int = 1
    scan_block_k: int = 64
    scan_block_v: int = 64
    scan_warps: int = 4
    scan_stages: int = 2
    programs_per_core: int = 1
    changes_block_k: int = 64
    changes_block_v: int = 32
    changes_warps: int = 4
    back_block_k: int = 32
    back_block_v: int = 32
    back_warps: int = 8


HOPPER = Schedule(
    chunk=32,
    intra_warps=2,
    scan_block_k=128,
    changes_warps=2,
    back_block_k=64,
    back_block_v=64,
    back_warps=4,
)
HOPPER_SCALAR = Schedule(
    chunk=32,
    intra_block_k=64,
    intra_warps=4,
    changes_block_v=64,
    back_block_k=64,
    back_warps=4,
)
# Ampere's matrix instructions take their operands from registers, Hopper's from shared memory.
A100 = Schedule(
    intra_block_k=16,
    scan_block_v=32,
    back_block_k=16,
    back_block_v=16,
)

# Operands of 32 bits have shorter chunks and smaller blocks: else registers spill.
WIDE = Schedule(
    chunk=32,
    intra_block_k=16,
    scan_block_k=32,
    scan_block_v=16,
    changes_block_k=32,
    changes_block_v=16,
    changes_warps=8,
    back_block_k=16,
    back_block_v=16,
)

# By the name that jax.Device.device_kind contains: the schedules by the kind of decay.
TUNED = {
    "H200": {"vector": HOPPER, "scalar": HOPPER_SCALAR},
    "H100": {"vector": HOPPER, "scalar": HOPPER_SCALAR},
    "A100": {"vector": A100, "scalar": A100},
}


def schedule(decay: str, operand_bytes: int) -> Schedule:
    """The schedule of a call on the device that it is compiled for.

    Args:
      decay: the kind of decay.
      operand_bytes: of one number that the tensor core multiplies.

    Returns:
      The row of the table; for operands of 32 bits the same on every chip.
    """
    kind = "vector" if decay == "vector" else "scalar"
    return TUNED[chip()][kind] if operand_bytes == 2 else WIDE


def scan_block_v(schedule: Schedule, K: int, V: int) -> int:
    """Columns of V of a program of the scan kernel, whose state [K, this] is in registers."""
    most = schedule.scan_block_v
    if K > 128:
        # As many registers as at K = 128.
        most = max(16, most // 2)
    return block(most, V)


def scan_warps(schedule: Schedule, K: int) -> int:
    """Warps of a program of the scan kernel."""
    # A state of 96 rows is three small tiles, not one of 64 and a half: with four warps it spills,
    # and so does one of 256 where chunks are short.
    is_cut_small = K > 64 and K % 64 > 0
    is_tall = K > 128 and schedule.chunk < 64
    return max(8, schedule.scan_warps) if is_cut_small or is_tall else schedule.scan_warps


def scan_stages(
    schedule: Schedule,
    programs: int,
    chunk: int,
    K: int,
    block_v: int,
    operand_bytes: int,
) -> int:
    """Chunks in flight in the scan kernel, as far as they fit into shared memory.

    Args:
      schedule: gives the most.
      programs: of the whole grid.
      chunk, K, block_v: the sizes of a program's tiles.
      operand_bytes: of one number in them.
    """
    # Reads, erases and writes, two squares, and values.
    tiles = chunk * (3 * K + 2 * chunk + block_v) * operand_bytes
    return fitting_stages(schedule.scan_stages, programs, tiles)


def segments(schedule: Schedule, programs: int, chunks: int) -> int:
    """Into how many parts, a power of two, a sequence of `chunks` is cut.

    As many as it takes for `programs` programs a part to fill the chip.
    """
    wanted = SCAN_CHIPS[chip()].multiprocessors * schedule.programs_per_core
    parts = 1
    while 2 * parts * programs <= wanted and chunks >= 2 * parts * SEGMENT_CHUNKS:
        parts *= 2
    return parts if parts >= MIN_SEGMENTS else 1


def chip() -> str:
    """The table's name of the device that the computation is compiled for; see `common.gpu`."""
    return chip_of(TUNED, DEFAULT_CHIP)
