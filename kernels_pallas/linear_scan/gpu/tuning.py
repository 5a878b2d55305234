"""Block sizes and warps of the GPU kernels, as data.

A schedule changes only the time of a call, and the memory of its states: one for each chunk.
Hopper's rows were chosen on an H200 by the time of each kernel (`benchmarks/gpu/tune.py`), the
others without a device, by what `ptxas` says: the largest blocks that do not spill registers.

The scan kernel copies chunks ahead (LDGSTS) only where two stages fit into shared memory, and on
Hopper only with all of K in one block does ptxas not complain: with two blocks it serializes the
matrix instructions (C7517).
"""

from typing import NamedTuple

from kernels_pallas.common.gpu import chip as chip_of

# A tile of the tensor core has 16 rows, and logs are summed in eights.
MIN_CHUNK = 16
MAX_CHUNK = 128
# The largest K and V.
MAX_D = 512
# Programs of the scan kernel that are to share a multiprocessor. Hopper's registers have room for a
# third one, but then its shared memory has none for copies ahead.
MAX_RESIDENTS = 2
# As many as registers hold: of `delta_scan`.
MAX_RESIDENTS_BY_REGISTERS = 3
# Bytes of shared memory that every program takes on top of its own.
RESERVED = 1024
# The fewest chunks that are scanned as one part.
SEGMENT_CHUNKS = 8


class Schedule(NamedTuple):
    """How the kernels are cut. block_k and block_v are upper bounds: a block divides its axis.

    Attributes:
      intra_*: the kernel of products inside a chunk.
      scan_*: the scan over chunks. `scan_stages` is an upper bound too: chunks in flight, as far as
        they fit into shared memory. `scan_stores_late`: the state before a chunk is stored after
        the products with it, whose shared memory the store then takes over on its way to another
        layout; more registers are live.
      programs_per_core: a sequence is cut into segments until there are so many programs of the
        scan kernel a multiprocessor.
      back_*: the way back through a chunk.
      dproducts_warps: the cotangents of the products.
    """

    chunk: int = 64
    intra_block_k: int = 64
    intra_warps: int = 8
    scan_block_k: int = 64
    scan_block_v: int = 64
    scan_warps: int = 4
    scan_stages: int = 2
    scan_stores_late: bool = False
    programs_per_core: int = 1
    back_block_k: int = 64
    back_block_v: int = 32
    back_warps: int = 8
    dproducts_warps: int = 4


class Chip(NamedTuple):
    """A chip's sizes, and the schedules measured or chosen for it, by the kind of decay."""

    multiprocessors: int
    shared_memory: int  # bytes that one program can have
    schedules: dict[str, Schedule]
    # Whether matrix instructions read shared memory: then the chunk that is computed stays there
    # beside those that are on their way.
    reads_shared: bool = True


# Stored early, states take 8 KiB more at K = V = 128: one program of two stages and not two.
HOPPER = Schedule(
    intra_block_k=128,
    intra_warps=4,
    scan_block_k=256,
    scan_stores_late=True,
    back_block_v=64,
    back_warps=4,
)
# The way back through a chunk is half of the time, and takes less in short ones.
HOPPER_VECTOR = HOPPER._replace(
    chunk=32,
    intra_block_k=64,
    scan_stages=3,
    dproducts_warps=2,
)
# Ampere's matrix instructions take their operands from registers, Hopper's from shared memory.
# Stored late, states would cost 36 bytes of spilled registers.
A100 = Schedule(back_block_k=32)

# Operands of 32 bits have smaller blocks in more threads: else registers spill. Three passes keep
# both halves of every operand; few large products spill less than many small ones.
WIDE = Schedule(
    intra_block_k=32,
    scan_block_v=32,
    scan_warps=8,
    back_block_k=16,
)
THREE_PASSES = WIDE._replace(scan_block_k=128)

# By the name that jax.Device.device_kind contains.
TUNED = {
    "H200": Chip(132, 232_448, {"vector": HOPPER_VECTOR, "scalar": HOPPER}),
    "H100": Chip(132, 232_448, {"vector": HOPPER_VECTOR, "scalar": HOPPER}),
    "A100": Chip(108, 166_912, {"vector": A100, "scalar": A100}, reads_shared=False),
}
DEFAULT_CHIP = "H200"


def schedule(
    decay: str,
    operand_bytes: int,
    is_exact: bool,
) -> Schedule:
    """The schedule of a call on the device that it is compiled for.

    Args:
      decay: the kind of decay.
      operand_bytes: of one number that the tensor core multiplies.
      is_exact: whether its products take three passes.

    Returns:
      The row of the table; for operands of 32 bits the same on every chip.
    """
    kind = "vector" if decay == "vector" else "scalar"
    if operand_bytes > 2:
        return THREE_PASSES if is_exact else WIDE
    return TUNED[chip()].schedules[kind]


def scan_block_v(schedule: Schedule, K: int, V: int) -> int:
    """Columns of V of a program of the scan kernel, whose state [K, this] is in registers."""
    most = schedule.scan_block_v
    if K > 128:
        # As many registers as at K = 128.
        rows = 1 << (K - 1).bit_length()
        most = max(16, most * 128 // rows)
    return block(most, V)


def back_warps(schedule: Schedule, V: int) -> int:
    """Warps of a program of the way back through a chunk: with wide values four would spill."""
    return max(8, schedule.back_warps) if V > 128 else schedule.back_warps


def scan_stages(
    schedule: Schedule, programs: int, chunk: int, K: int, block_v: int, operand_bytes: int
) -> int:
    """Chunks in flight in the scan kernel, as far as they fit into shared memory.

    With more programs than multiprocessors, several share the memory of one.

    Args:
      schedule: gives the most.
      programs: of the whole grid.
      chunk, K, block_v: the sizes of a program's tiles.
      operand_bytes: of one number in them.
    """
    device = TUNED[chip()]
    residents = min(MAX_RESIDENTS, -(-programs // device.multiprocessors))
    memory = (device.shared_memory + RESERVED) // residents - RESERVED
    tiles = chunk * (2 * K + chunk + block_v) * operand_bytes
    if operand_bytes > 2:
        # Triton was seen to take up to half a chunk's tiles more.
        return max(1, min(schedule.scan_stages, int(memory / tiles - 0.5)))
    # A block of the state, rounded for the product with the reads.
    state = block(schedule.scan_block_k, K) * block_v * operand_bytes
    fitting = (memory - state) // tiles
    if not device.reads_shared:
        fitting += 1
    return max(1, min(schedule.scan_stages, fitting))


def fitting_stages(most: int, programs: int, chunk_bytes: int) -> int:
    """How many chunks of `chunk_bytes`, up to `most`, a program of `delta_scan` has in flight."""
    device = TUNED[chip()]
    residents = min(MAX_RESIDENTS_BY_REGISTERS, -(-programs // device.multiprocessors))
    # Triton was seen to take up to half a chunk's tiles more than those of the chunks in flight.
    fitting = int(device.shared_memory / residents / chunk_bytes - 0.5)
    return max(1, min(most, fitting))


def segments(schedule: Schedule, programs: int, chunks: int) -> int:
    """Into how many parts, a power of two, a sequence of `chunks` is cut.

    As many as it takes for `programs` programs a part to fill the chip.
    """
    wanted = TUNED[chip()].multiprocessors * schedule.programs_per_core
    parts = 1
    while 2 * parts * programs <= wanted and chunks >= 2 * parts * SEGMENT_CHUNKS:
        parts *= 2
    return parts


def block(most: int, size: int) -> int:
    """The largest power of two up to `most` that divides `size`."""
    lowest_bit = size & -size
    return min(most, lowest_bit)


def chip() -> str:
    """The table's name of the device that the computation is compiled for; see `common.gpu`."""
    return chip_of(TUNED, DEFAULT_CHIP)
