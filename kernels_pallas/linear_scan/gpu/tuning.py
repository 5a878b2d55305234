"""Block sizes and warps of the GPU kernels, as data; `benchmarks/tune_linear_scan_gpu.py` fills the
table on a device.

A schedule changes only the time of a call. The rows here were chosen without a device, by `ptxas`:
the largest blocks that do not spill registers (float32 operands take twice the room, and may).
"""

from typing import NamedTuple

from kernels_pallas.common.device import device_kind

MIN_CHUNK, MAX_CHUNK = 16, 128  # a tensor core's tile has 16 rows; logs are summed in eights
MAX_D = 512
MAX_RESIDENTS = 3  # programs of the scan kernel that the registers of a multiprocessor hold
SEGMENT_CHUNKS = 8  # the fewest chunks that are walked as one part


class Schedule(NamedTuple):
    """How the kernels are cut. block_k and block_v are upper bounds: a block divides its axis."""

    chunk: int = 64
    scores_block_k: int = 64
    scores_warps: int = 8
    scan_block_k: int = 64
    scan_block_v: int = 64
    scan_warps: int = 4
    # an upper bound too: chunks in flight, as far as they fit into shared memory
    scan_stages: int = 2
    # a sequence is cut into segments until there are so many programs of the scan kernel
    walks_per_core: int = 1
    back_block_k: int = 64
    back_block_v: int = 64
    back_warps: int = 8
    dscores_warps: int = 4


# chip, as jax.Device.device_kind names it -> (streaming multiprocessors, bytes of shared memory
# that a program can have, kind of decay -> Schedule).
TUNED = {
    "H200": (132, 232_448, {"vector": Schedule(), "scalar": Schedule()}),
    "H100": (132, 232_448, {"vector": Schedule(), "scalar": Schedule()}),
    "A100": (108, 166_912, {"vector": Schedule(), "scalar": Schedule()}),
}
DEFAULT_CHIP = "H200"


def schedule(decay: str) -> Schedule:
    """For a call on the device that it is compiled for."""
    return TUNED[chip()][2]["vector" if decay == "vector" else "scalar"]


def scan_block_v(schedule: Schedule, K: int, V: int) -> int:
    """A program of the scan kernel holds a state of K x this in registers."""
    most = (
        schedule.scan_block_v
        if K <= 128
        else max(16, schedule.scan_block_v * 128 // (1 << (K - 1).bit_length()))
    )
    return block(most, V)


def scan_stages(
    schedule: Schedule, programs: int, chunk: int, K: int, block_v: int, operand_bytes: int
) -> int:
    """Chunks in flight in the scan kernel: with more programs than multiprocessors, several share a
    multiprocessor.

    Triton was seen to take up to half a chunk's tiles more than those of the chunks in flight.
    """
    cores, shared, _ = TUNED[chip()]
    residents = min(MAX_RESIDENTS, -(-programs // cores))
    tiles = chunk * (2 * K + chunk + block_v) * operand_bytes
    return max(1, min(schedule.scan_stages, int(shared / residents / tiles - 0.5)))


def segments(schedule: Schedule, walks: int, chunks: int) -> int:
    """Into how many parts, a power of two, a sequence is cut so that `walks` programs a part fill
    the chip.
    """
    wanted = TUNED[chip()][0] * schedule.walks_per_core
    parts = 1
    while 2 * parts * walks <= wanted and chunks >= 2 * parts * SEGMENT_CHUNKS:
        parts *= 2
    return parts


def block(most: int, size: int) -> int:
    """The largest power of two up to `most` that divides `size`."""
    return min(most, size & -size)


def chip() -> str:
    """The table's name of the device that the computation is compiled for; see `common.device`."""
    kind = device_kind()
    return next((name for name in TUNED if name in kind), DEFAULT_CHIP)
