"""Block sizes of the TPU kernels, as data; `benchmarks/tune_grouped_matmul.py` compares them by model time.

A schedule changes only the time of a call. What is tuned are sizes in a step; what of a matrix is in VMEM at a time
follows from the call's own sizes, and the VMEM that the kernels may take.
"""

from typing import NamedTuple

from kernels_pallas.common.device import device_kind
from kernels_pallas.grouped_matmul.tpu import outer as tpu_outer
from kernels_pallas.grouped_matmul.tpu import rows as tpu_rows
from kernels_pallas.grouped_matmul.tpu.per_row import LANES
from kernels_pallas.grouped_matmul.tpu.visits import ROWS

MIB = 2**20
OPERANDS = 12 * MIB  # of VMEM, where the compiler keeps operands of a matmul


class Row(NamedTuple):
    """A device's line in the table. Sizes are for 16-bit numbers."""

    cores: int  # that share a program
    tile: int  # rows at a time
    parts: int  # a tile's rows are rounded up to this, for `rows`; to twice this where a tile is nearly full
    depth: int  # the same for `outer`, where rows are what a matrix unit sums over
    step: int  # columns of one matmul of `rows`
    outer_step: tuple[int, int]  # block of one matmul of `outer`
    vmem: (
        int  # bytes that a kernel may take, of 64 MiB a core on v5p and v7x, 128 MiB on v5e and v6e
    )


# By device kind, as jax.Device.device_kind says.
TUNED = {
    "TPU v5 lite": Row(
        cores=1, tile=512, parts=32, depth=128, step=512, outer_step=(1024, 512), vmem=100 * MIB
    ),
    "TPU v5": Row(
        cores=2, tile=512, parts=32, depth=128, step=1024, outer_step=(1024, 1024), vmem=56 * MIB
    ),
    "TPU v6 lite": Row(
        cores=1, tile=512, parts=32, depth=128, step=512, outer_step=(1024, 512), vmem=100 * MIB
    ),
}
DEFAULT = Row(
    cores=1, tile=512, parts=32, depth=128, step=512, outer_step=(1024, 512), vmem=56 * MIB
)
AHEAD = (4, 2)  # groups in VMEM; deeper queues gain nothing more


def rows_schedule(
    R: int, I: int, O: int, item: int, inputs=1, matrices=1, tiled=0, outputs=1, per_row=0
) -> tpu_rows.Schedule:
    """For R rows, [I, O] matrices and numbers of `item` bytes: as many columns as fit, then as many matrices.

    `per_row`: numbers for each row that are in VMEM all the time.
    """
    tuned = _tuned()
    tile = _tile(tuned, R, item)
    for columns in _divisors(O):
        for ahead in AHEAD:
            taken = ahead * (
                inputs * tile * I + matrices * I * columns + (tiled + outputs) * tile * columns
            )
            taken += tile * I if inputs > 1 else 0
            if taken * item + 8 * per_row * R <= tuned.vmem - OPERANDS:  # float32, twice
                step = next(
                    n
                    for n in _divisors(columns)
                    if n <= max(LANES, tuned.step * 2 // item // matrices)
                )
                return tpu_rows.Schedule(
                    tile, columns, ahead, step, _parts(tile, tuned.parts), tuned.cores, tuned.vmem
                )
    raise ValueError(f"grouped_matmul: {too_large(I, item)}")


def outer_schedule(
    R: int, K: int, N: int, item: int, lefts: int = 1, per_row: int = 0
) -> tpu_outer.Schedule:
    """For R rows and [K, N] sums: of the blocks that fit, the one for which the rows are read least often."""
    tuned = _tuned()
    tile = _tile(tuned, R, item)
    largest = K // tuned.cores if K % (tuned.cores * LANES) == 0 else K

    def fits(inner: int, columns: int, ahead: int = AHEAD[-1]) -> bool:
        taken = (
            ahead * item * (tile * (lefts * inner + columns) + inner * columns)
            + 4 * inner * columns
        )
        taken += 8 * per_row * R
        return taken <= tuned.vmem - OPERANDS

    blocks = [(k, n) for k in _divisors(largest) for n in _divisors(N) if fits(k, n)]
    inner, columns = min(blocks, key=lambda b: N * K // b[0] + lefts * K * N // b[1])
    ahead = next(n for n in AHEAD if fits(inner, columns, n))
    step = [
        next(n for n in _divisors(size) if n <= max(LANES, most * 2 // item))
        for size, most in zip((inner, columns), tuned.outer_step)
    ]
    return tpu_outer.Schedule(
        tile, inner, columns, ahead, tuple(step), _parts(tile, tuned.depth), tuned.vmem
    )


def largest_inner(item: int) -> int:
    """The widest rows of which a tile and `LANES` columns of two matrices fit, twice."""
    tuned = _tuned()
    tile = tuned.tile * 2 // item
    return (tuned.vmem - OPERANDS) // (item * 2 * (3 * tile + 2 * LANES)) // LANES * LANES


def too_large(I: int, item: int) -> str:
    return f"takes rows of up to {largest_inner(item)} numbers of {item} bytes, not {I}"


def _tile(tuned: Row, R: int, item: int) -> int:
    tile = tuned.tile * 2 // item
    while tile > ROWS and tile // 2 >= R:
        tile //= 2
    return tile


def _parts(tile: int, part: int) -> tuple[int, ...]:
    """Sizes of a tile, ascending. Each is code of its own, so a nearly full tile is cut less finely."""
    sizes = [tile]
    while sizes[-1] > part:
        coarse = sizes[-1] - 2 * part
        sizes.append(coarse if coarse >= 5 * tile // 8 else sizes[-1] - part)
    return tuple(reversed(sizes))


def _divisors(size: int) -> list[int]:
    """Those that are multiples of `LANES`, descending."""
    return [n for n in range(size, 0, -LANES) if size % n == 0]


def _tuned() -> Row:
    return TUNED.get(device_kind(), DEFAULT)
