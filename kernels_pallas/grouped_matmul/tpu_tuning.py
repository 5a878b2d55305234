"""Block sizes of the TPU kernels, as data; `benchmarks/tune_grouped_matmul.py` compares them by model time.

A schedule changes only the time of a call. What is tuned are sizes in a step; what of a matrix is in VMEM at a time
follows from the call's own sizes, and the VMEM that the kernels may take.
"""

from typing import NamedTuple

import jax

from kernels_pallas.grouped_matmul import tpu_outer, tpu_rows
from kernels_pallas.grouped_matmul.tpu_rows import LANES, VMEM_LIMIT
from kernels_pallas.grouped_matmul.tpu_visits import ROWS

VMEM_FOR_BLOCKS = VMEM_LIMIT - 12 * 2**20  # the compiler keeps operands of a matmul there too


class Row(NamedTuple):
    """A device's line in the table. Sizes are for 16-bit numbers."""

    cores: int  # that share a program: each makes its own columns
    tile: int  # rows at a time
    parts: int  # a tile's rows are rounded up to this, for `tpu_rows`
    depth: int  # the same for `tpu_outer`, where rows are what a matrix unit sums over
    step: int  # columns of one matmul of `tpu_rows`
    outer_step: tuple[int, int]  # block of one matmul of `tpu_outer`


# By device kind, as jax.Device.device_kind says.
TUNED = {
    "TPU v5 lite": Row(cores=1, tile=512, parts=64, depth=128, step=512, outer_step=(1024, 512)),
    "TPU v5": Row(cores=2, tile=512, parts=64, depth=128, step=1024, outer_step=(1024, 1024)),
    "TPU v6 lite": Row(cores=1, tile=512, parts=64, depth=128, step=512, outer_step=(1024, 512)),
}
DEFAULT_KIND = "TPU v6 lite"  # the nearest to later ones: a matrix unit of 256
AHEAD = (4, 2)  # matrices in VMEM, the more the better


def rows_schedule(R: int, I: int, O: int, inputs: int, matrices: int, outputs: int, item: int) -> tpu_rows.Schedule:
    """For R rows, [I, O] matrices and numbers of `item` bytes: as many columns as fit, then as many matrices."""
    tuned = _tuned()
    tile, parts = _tile(tuned, R, item), tuned.parts
    largest = O // tuned.cores if O % (tuned.cores * LANES) == 0 else O
    for columns in _divisors(largest):
        for ahead in AHEAD:
            taken = ahead * (inputs * tile * I + matrices * I * columns) + 2 * outputs * tile * columns
            if taken * item <= VMEM_FOR_BLOCKS:
                step = next(n for n in _divisors(columns) if n <= max(LANES, tuned.step * 2 // item))
                return tpu_rows.Schedule(tile, columns, ahead, step, _parts(tile, parts))
    raise NotImplementedError(too_large(I, item))


def outer_schedule(R: int, K: int, N: int, item: int) -> tpu_outer.Schedule:
    """For R rows and [K, N] sums: blocks of as many columns as fit, then of as many rows."""
    tuned = _tuned()
    tile = _tile(tuned, R, item)
    largest = K // tuned.cores if K % (tuned.cores * LANES) == 0 else K
    fits = lambda inner, columns: (
        2 * item * (tile * (inner + columns) + inner * columns) + 4 * inner * columns <= VMEM_FOR_BLOCKS
    )
    blocks = [(k, n) for k in _divisors(largest) for n in _divisors(N) if fits(k, n)]
    # Of what fits, the block for which the rows are read least often: K / inner times dout, N / columns times lhs.
    inner, columns = min(blocks, key=lambda b: K * N * (1 / b[0] + 1 / b[1]))
    step = tuple(next(n for n in _divisors(size) if n <= max(LANES, most * 2 // item))
                 for size, most in zip((inner, columns), tuned.outer_step))  # fmt: skip
    return tpu_outer.Schedule(tile, inner, columns, step, _parts(tile, tuned.depth))


def largest_inner(item: int) -> int:
    """The widest rows for which a step of `LANES` columns fits."""
    return VMEM_FOR_BLOCKS // (AHEAD[-1] * item * (ROWS * 8 + LANES)) // LANES * LANES


def too_large(I: int, item: int) -> str:
    return f"takes rows of up to {largest_inner(item)} numbers of {item} bytes, not {I}"


def _tile(tuned: Row, R: int, item: int) -> int:
    tile = tuned.tile * 2 // item
    while tile > ROWS and tile // 2 >= R:
        tile //= 2
    return tile


def _parts(tile: int, part: int) -> tuple[int, ...]:
    return tuple(range(part, tile + 1, part)) if part < tile else (tile,)


def _divisors(size: int) -> list[int]:
    """Those that are multiples of `LANES`, descending."""
    return [n for n in range(size, 0, -LANES) if size % n == 0]


def _tuned() -> Row:
    return TUNED.get(_device_kind(), TUNED[DEFAULT_KIND])


def _device_kind() -> str:
    """Of the device that the surrounding computation is compiled for, as in `dispatch.target_platform`."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "device_kind", None) or jax.devices()[0].device_kind
