"""Block sizes of the TPU kernels, as data.

`benchmarks/tune_grouped_matmul.py` compares them by model time. A schedule changes only the time of
a call. What is tuned are the sizes of a step; how much of a matrix is in VMEM at a time follows
from the call's own sizes, and from the VMEM that the kernels may take.
"""

from typing import NamedTuple

from kernels_pallas.common.device import device_kind
from kernels_pallas.grouped_matmul.tpu import outer, rows
from kernels_pallas.grouped_matmul.tpu.tiles import LANES, ROWS

MIB = 2**20
OPERANDS = 12 * MIB  # of VMEM, where the compiler keeps operands of a matmul
BUFFERS = (4, 2)  # the first that fits; more gain nothing


class Tuning(NamedTuple):
    """A device's line in the table. Sizes are for 16-bit numbers."""

    cores: int  # that share a program
    tile: int  # rows at a time
    # A tile's rows are rounded up to this for `rows`; to twice this where a tile is nearly full.
    part: int
    outer_part: int  # the same for `outer`, where rows are what a matrix unit sums over
    step: int  # columns of one matmul of `rows`
    outer_step: tuple[int, int]  # rows and columns of the result of one matmul of `outer`
    # Bytes that a kernel may take, of 64 MiB a core on v5p and v7x, 128 MiB on v5e and v6e.
    vmem: int


# By device kind, as `jax.Device.device_kind` says.
TUNED = {
    "TPU v5 lite": Tuning(
        cores=1,
        tile=512,
        part=32,
        outer_part=128,
        step=512,
        outer_step=(1024, 512),
        vmem=100 * MIB,
    ),
    "TPU v5": Tuning(
        cores=2,
        tile=512,
        part=32,
        outer_part=128,
        step=1024,
        outer_step=(1024, 1024),
        vmem=56 * MIB,
    ),
    "TPU v6 lite": Tuning(
        cores=1,
        tile=512,
        part=32,
        outer_part=128,
        step=512,
        outer_step=(1024, 512),
        vmem=100 * MIB,
    ),
    "TPU7x": Tuning(
        cores=1,
        tile=512,
        part=32,
        outer_part=128,
        step=1024,
        outer_step=(1024, 1024),
        vmem=56 * MIB,
    ),
}
DEFAULT = Tuning(
    cores=1,
    tile=512,
    part=32,
    outer_part=128,
    step=512,
    outer_step=(1024, 512),
    vmem=56 * MIB,
)


def tuned() -> Tuning:
    """The line of the device that the call is compiled for."""
    return TUNED.get(device_kind(), DEFAULT)


def rows_schedule(options: rows.RowsOptions, inputs: rows.RowsInputs) -> rows.Schedule:
    """As many columns as fit, then as many buffers; the inputs are padded.

    Raises:
      ValueError: not even the fewest columns fit.
    """
    line = tuned()
    num_rows, I = inputs.xs[0].shape
    O = inputs.matrices[0].shape[1 if options.transposed else 2]
    item = inputs.xs[0].dtype.itemsize
    tile = _tile_rows(line, num_rows, item)
    # Numbers for each row, which are in VMEM all the time.
    per_row = (inputs.scale is not None) + options.row_sums
    # What is multiplied in place of several inputs. There is one of it, as it is not copied.
    operand = tile * I if len(inputs.xs) > 1 else 0
    # More columns come before more buffers: they are how often the rows are read.
    for columns in _divisors(O):
        x = len(inputs.xs) * tile * I
        matrices = len(inputs.matrices) * I * columns
        results = (len(inputs.tiled) + len(options.out_dtypes)) * tile * columns
        for buffers in BUFFERS:
            taken = buffers * (x + matrices + results) + operand
            if taken * item + _per_row_bytes(per_row, num_rows) > line.vmem - OPERANDS:
                continue
            # Two matrices make two products of a step, and wider numbers larger ones.
            most = line.step * 2 // item // len(inputs.matrices)
            return rows.Schedule(
                tile_rows=tile,
                columns=columns,
                buffers=buffers,
                step=_largest_divisor(columns, most),
                row_counts=_row_counts(tile, line.part),
                cores=line.cores,
                vmem=line.vmem,
            )
    raise ValueError(f"grouped_matmul: {too_large(I, item)}")


def outer_schedule(inputs: outer.OuterInputs) -> outer.Schedule:
    """Of the blocks that fit, the one for which rows are read least often; inputs are padded."""
    line = tuned()
    num_rows, K = inputs.lefts[0].shape
    N = inputs.dout.shape[1]
    item = inputs.dout.dtype.itemsize
    lefts = len(inputs.lefts)
    per_row = int(inputs.scale is not None)
    tile = _tile_rows(line, num_rows, item)

    def fits(inner: int, columns: int, buffers: int) -> bool:
        rows_of_tile = tile * (lefts * inner + columns)
        result = inner * columns
        taken = buffers * item * (rows_of_tile + result)
        total = 4 * result  # float32
        everything = taken + total + _per_row_bytes(per_row, num_rows)
        return everything <= line.vmem - OPERANDS

    def numbers_read(block: tuple[int, int]) -> int:
        """For each row: dout once for each block of K, the left operands for each of N."""
        inner, columns = block
        return N * K // inner + lefts * K * N // columns

    # The cores share the blocks of K if they divide it, else those of N.
    of_cores = line.cores * LANES
    share_inner = K % of_cores == 0
    share_columns = not share_inner and N % of_cores == 0
    blocks = [
        (inner, columns)
        for inner in _divisors(K // line.cores if share_inner else K)
        for columns in _divisors(N // line.cores if share_columns else N)
        if fits(inner, columns, BUFFERS[-1])
    ]
    # The largest blocks come first, so of equal ones the one with the most of K is taken.
    inner, columns = min(blocks, key=numbers_read)
    buffers = next(n for n in BUFFERS if fits(inner, columns, n))
    inner_step, column_step = line.outer_step
    return outer.Schedule(
        tile_rows=tile,
        inner=inner,
        columns=columns,
        buffers=buffers,
        columns_first=share_columns,
        step=(
            _step_of(inner, inner_step * 2 // item),
            _step_of(columns, column_step * 2 // item),
        ),
        row_counts=_row_counts(tile, line.outer_part),
        vmem=line.vmem,
    )


def largest_inner(item: int) -> int:
    """The widest rows of which a tile and `LANES` columns of two matrices fit, twice."""
    line = tuned()
    tile = line.tile * 2 // item
    # Two inputs and the operand made of them; and the columns of two matrices.
    bytes_of_column = 2 * item * (3 * tile + 2 * LANES)
    return (line.vmem - OPERANDS) // bytes_of_column // LANES * LANES


def too_large(I: int, item: int) -> str:
    """Why rows of width I are refused."""
    return f"takes rows of up to {largest_inner(item)} numbers of {item} bytes, not {I}"


def _per_row_bytes(per_row: int, num_rows: int) -> int:
    """float32, in two buffers of the pipeline."""
    return 2 * 4 * per_row * num_rows


def _tile_rows(
    line: Tuning,
    num_rows: int,
    item: int,
) -> int:
    """Rows at a time: the tuned number, less where the array has fewer."""
    # The same number of bytes for wider numbers.
    tile = line.tile * 2 // item
    while tile > ROWS and tile // 2 >= num_rows:
        tile //= 2
    return tile


def _row_counts(tile: int, part: int) -> tuple[int, ...]:
    """Row counts of a tile's matmuls, ascending.

    Each is code of its own, so a nearly full tile, which wastes little, is divided less finely.
    """
    counts = [tile]
    while counts[-1] > part:
        coarse = counts[-1] - 2 * part
        counts.append(coarse if coarse >= 5 * tile // 8 else counts[-1] - part)
    return tuple(reversed(counts))


def _divisors(size: int) -> list[int]:
    """Those that are multiples of `LANES`, descending."""
    return [n for n in range(size, 0, -LANES) if size % n == 0]


def _step_of(size: int, most: int) -> int:
    """`_largest_divisor`, or all of a size that has small ones only and is not much more.

    1408, of many experts, is 11 x 128: steps of 128 take a third longer.
    """
    divisor = _largest_divisor(size, most)
    if 4 * divisor < most and 2 * size <= 3 * most:
        return size
    return divisor


def _largest_divisor(size: int, most: int) -> int:
    """The largest of `_divisors` up to `most`, or `LANES` where `most` is less."""
    return next(n for n in _divisors(size) if n <= max(LANES, most))
