"""What the stage "tune" tries: for each op at a shape, changes of its row in the tables.

A variant changes the fields of every kernel of the op at once: the profile of one call has the time
of each kernel, so that eight variants try eight values for each of them.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.gpu import cases
from benchmarks.gpu.programs import BOTH, FORWARD, Program, programs_of
from kernels_pallas.attention.gpu import tuning as tuning_of_attention
from kernels_pallas.attention.gpu.tuning import KernelConfig
from kernels_pallas.delta_scan.gpu import tuning as tuning_of_delta
from kernels_pallas.grouped_matmul.gpu import tuning as tuning_of_grouped
from kernels_pallas.linear_scan.gpu import tuning as tuning_of_scan

# Fields of a table's row, and their values.
Changes = dict[str, Any]
DRY_VARIANTS = 2

# The rows of the tables as they are, by chip, from which each variant departs.
SCAN_ROWS = {chip: dict(row.schedules) for chip, row in tuning_of_scan.TUNED.items()}
DELTA_ROWS = {chip: dict(rows) for chip, rows in tuning_of_delta.TUNED.items()}
ATTENTION_ROWS = {chip: dict(row["bfloat16"]) for chip, row in tuning_of_attention.TUNED.items()}
GROUPED_ROWS = {chip: row[2] for chip, row in tuning_of_grouped.TUNED.items()}


class Kernels(NamedTuple):
    """Kernels that share fields of a row.

    Attributes:
      name: a part of their names. A kernel belongs to the first of an op's that is in its name.
      fields: what the names of the fields begin with.
    """

    name: str
    fields: tuple[str, ...]

    def own(self, changes: Changes) -> Changes:
        """The changes that belong to these kernels."""
        return {name: value for name, value in changes.items() if name.startswith(self.fields)}


class Tuned(NamedTuple):
    """An op at a shape.

    Attributes:
      program: forward and backward together, or forward alone.
      apply: puts changes into the rows of the op's table, for every chip.
      kernels: those that fields of their own belong to.
      variants: the first is {}, the row as it is. What belongs to no kernel ("chunk") is of all of
        them: kernels are compared among variants that agree in it.
    """

    program: Program
    apply: Callable[[Changes], None]
    kernels: tuple[Kernels, ...]
    variants: list[Changes]

    def of_all(self, changes: Changes) -> Changes:
        """The changes that belong to no kernel."""
        owned = tuple(field for kernels in self.kernels for field in kernels.fields)
        return {name: value for name, value in changes.items() if not name.startswith(owned)}


def set_scan(changes: Changes) -> None:
    """In the rows of every chip and kind of decay."""
    for chip, rows in SCAN_ROWS.items():
        for decay, row in rows.items():
            tuning_of_scan.TUNED[chip].schedules[decay] = row._replace(**changes)


def set_delta(changes: Changes) -> None:
    """In the rows of every chip and kind of decay."""
    for chip, rows in DELTA_ROWS.items():
        for decay, row in rows.items():
            tuning_of_delta.TUNED[chip][decay] = row._replace(**changes)


def set_attention(changes: Changes) -> None:
    """In the rows of bfloat16, of every chip and size of heads."""
    for chip, rows in ATTENTION_ROWS.items():
        for size, row in rows.items():
            tuning_of_attention.TUNED[chip]["bfloat16"][size] = row._replace(**changes)


def set_grouped(changes: Changes) -> None:
    """In the rows of 16 bits, of every chip."""
    for chip, row in GROUPED_ROWS.items():
        tuning_of_grouped.TUNED[chip][2] = row._replace(**changes)


def together(*of_kernels: list[Changes], **of_all: Any) -> list[Changes]:
    """The first changes of each list in one variant, the second ones in the next, and so on.

    Args:
      *of_kernels: for each kernel what is tried; a short list leaves the later variants unchanged.
      **of_all: changes in every variant.
    """
    variants = []
    for changes in itertools.zip_longest(*of_kernels, fillvalue={}):
        variant = dict(of_all)
        for one in changes:
            variant |= one
        variants.append(variant)
    return variants


# --- linear_scan

SCAN_KERNELS = (
    Kernels("backward_products", ("back_",)),
    Kernels("dproducts", ("dproducts_",)),
    Kernels("products", ("intra_",)),
    Kernels("linear_scan_", ("scan_", "programs_per_core")),
)


def intra(block_k: int, warps: int) -> Changes:
    return {"intra_block_k": block_k, "intra_warps": warps}


def scan(block_k: int, block_v: int, warps: int, stages: int, **others: Any) -> Changes:
    return {
        "scan_block_k": block_k,
        "scan_block_v": block_v,
        "scan_warps": warps,
        "scan_stages": stages,
        **others,
    }


def back(block_k: int, block_v: int, warps: int) -> Changes:
    return {"back_block_k": block_k, "back_block_v": block_v, "back_warps": warps}


def dproducts(warps: int) -> Changes:
    return {"dproducts_warps": warps}


SCAN_VARIANTS = [
    {},
    *together(
        [intra(32, 4), intra(64, 4), intra(128, 8), intra(16, 4), intra(32, 2), intra(128, 4)],
        [
            scan(256, 32, 4, 2),
            scan(256, 64, 4, 1),
            scan(256, 128, 8, 2),
            scan(64, 64, 4, 2),
            scan(256, 64, 4, 3, programs_per_core=2),
            scan(256, 64, 8, 2),
        ],
        [back(64, 64, 8), back(32, 32, 4), back(64, 32, 4), back(128, 32, 8), back(64, 64, 4)],
        [dproducts(8), dproducts(2)],
        chunk=64,
    ),
    *together(
        [intra(32, 4), intra(64, 4), intra(32, 2), intra(128, 4), intra(64, 2), intra(16, 2)],
        [
            scan(256, 64, 4, 2),
            scan(256, 64, 4, 3),
            scan(256, 32, 4, 3),
            scan(256, 128, 8, 2),
            scan(64, 64, 4, 2),
            scan(256, 64, 4, 2, scan_stores_late=False),
        ],
        [
            back(64, 32, 4),
            back(64, 64, 4),
            back(128, 32, 4),
            back(64, 64, 8),
            back(128, 64, 8),
            back(64, 32, 2),
        ],
        [dproducts(4), dproducts(2), dproducts(1)],
    ),
    *together(
        [intra(64, 2), intra(128, 4), intra(32, 1)],
        [scan(256, 64, 4, 3), scan(256, 32, 2, 3), scan(256, 64, 4, 2)],
        [back(64, 64, 2), back(128, 64, 4), back(64, 32, 1)],
        [dproducts(1), dproducts(2)],
        chunk=16,
    ),
]
SCALAR_SCAN_VARIANTS = [
    {},
    *together(
        [intra(32, 4), intra(64, 4), intra(128, 4), intra(128, 8)],
        [
            scan(256, 32, 4, 2),
            scan(256, 64, 4, 1),
            scan(256, 128, 8, 2),
            scan(64, 64, 4, 2),
        ],
        [back(64, 64, 8), back(64, 32, 4), back(128, 32, 8), back(64, 64, 4)],
        [dproducts(8), dproducts(2)],
    ),
    *together(
        [intra(64, 8), intra(128, 8)],
        [scan(256, 64, 8, 1), scan(64, 64, 4, 1)],
        [back(64, 32, 8), back(64, 64, 8)],
        [dproducts(8), dproducts(4)],
        chunk=128,
    ),
    *together(
        [intra(64, 4), intra(128, 2)],
        [scan(256, 64, 4, 3), scan(256, 128, 8, 3)],
        [back(64, 64, 4), back(128, 64, 4)],
        [dproducts(2), dproducts(4)],
        chunk=32,
    ),
]

# --- delta_scan

DELTA_KERNELS = (
    Kernels("backward_changes", ("changes_",)),
    Kernels("backward_terms", ("back_",)),
    Kernels("scores", ("intra_",)),
    Kernels("inverse", ("inverse_",)),
    Kernels("delta_scan_", ("scan_", "programs_per_core")),
)


def changes_of_v(block_k: int, block_v: int, warps: int) -> Changes:
    return {"changes_block_k": block_k, "changes_block_v": block_v, "changes_warps": warps}


def inverse(warps: int) -> Changes:
    return {"inverse_warps": warps}


DELTA_VARIANTS = [
    {},
    *together(
        [intra(64, 8), intra(64, 4), intra(32, 4), intra(128, 8), intra(16, 4), intra(32, 2)],
        [
            scan(64, 128, 8, 2),
            scan(64, 64, 8, 2),
            scan(128, 128, 8, 1),
            scan(64, 64, 4, 1),
            scan(128, 64, 8, 2),
            scan(64, 32, 4, 2),
        ],
        [
            changes_of_v(64, 64, 4),
            changes_of_v(128, 32, 4),
            changes_of_v(128, 64, 8),
            changes_of_v(64, 32, 8),
            changes_of_v(64, 128, 8),
            changes_of_v(32, 32, 4),
        ],
        [
            back(64, 32, 8),
            back(64, 64, 8),
            back(64, 32, 4),
            back(128, 32, 8),
            back(32, 64, 8),
            back(32, 32, 4),
        ],
        [inverse(2), inverse(4)],
    ),
    *together(
        [intra(64, 4), intra(32, 4), intra(32, 2), intra(128, 4)],
        [scan(64, 64, 4, 2), scan(128, 64, 4, 2), scan(64, 128, 8, 2), scan(64, 32, 4, 3)],
        [
            changes_of_v(64, 64, 4),
            changes_of_v(64, 32, 4),
            changes_of_v(128, 32, 4),
            changes_of_v(64, 32, 2),
        ],
        [back(64, 32, 4), back(64, 64, 4), back(64, 64, 8), back(128, 32, 4)],
        [inverse(1), inverse(2)],
        chunk=32,
    ),
]

# --- attention

ATTENTION_KERNELS = (
    Kernels("forward", ("forward",)),
    Kernels("_dq", ("dq",)),
    Kernels("_dkdv", ("dkv",)),
    Kernels("_dk", ("dkv",)),
    Kernels("_dv", ("dv",)),
)


def configs(kernel: str, *sizes: tuple[int, int, int, int]) -> list[Changes]:
    """One change for each: blocks of queries and of keys, warps, stages."""
    return [{kernel: KernelConfig(*size)} for size in sizes]


# Heads of 128 channels, of 64, of 256.
ATTENTION_VARIANTS = [
    {},
    *together(
        configs(
            "forward",
            (128, 128, 8, 3),
            (64, 64, 4, 3),
            (128, 64, 4, 3),
            (64, 64, 4, 4),
            (128, 128, 8, 2),
            (128, 64, 8, 4),
            (64, 128, 4, 2),
            (128, 64, 4, 2),
        ),
        configs(
            "dq",
            (64, 64, 4, 2),
            (128, 128, 8, 2),
            (64, 128, 4, 2),
            (64, 64, 4, 3),
            (128, 64, 8, 2),
            (64, 128, 8, 3),
            (128, 32, 8, 4),
            (64, 32, 4, 3),
        ),
        configs(
            "dkv",
            (64, 128, 8, 3),
            (64, 64, 4, 2),
            (32, 64, 4, 3),
            (128, 128, 8, 2),
            (32, 64, 4, 2),
            (64, 128, 8, 4),
            (128, 64, 4, 2),
            (64, 64, 4, 1),
        ),
    ),
]
NARROW_VARIANTS = [
    {},
    *together(
        configs(
            "forward",
            (128, 128, 8, 3),
            (128, 128, 4, 3),
            (64, 64, 4, 3),
            (64, 128, 4, 3),
            (128, 64, 8, 3),
            (128, 64, 4, 4),
        ),
        configs(
            "dq",
            (128, 128, 8, 3),
            (128, 64, 4, 3),
            (64, 128, 4, 3),
            (128, 64, 8, 3),
            (64, 64, 4, 2),
            (64, 64, 4, 4),
        ),
        configs(
            "dkv",
            (64, 64, 4, 3),
            (64, 64, 4, 2),
            (128, 128, 8, 3),
            (64, 128, 8, 2),
            (128, 64, 4, 3),
            (64, 128, 4, 3),
        ),
    ),
]
WIDE_VARIANTS = [
    {},
    *together(
        configs("forward", (64, 64, 4, 2), (128, 32, 8, 3), (64, 64, 8, 3)),
        configs("dq", (64, 64, 8, 2), (128, 64, 8, 1), (64, 32, 4, 2)),
        configs("dkv", (64, 64, 8, 2), (64, 128, 8, 2), (32, 64, 4, 2)),
        configs("dv", (64, 64, 8, 3), (128, 128, 8, 1), (64, 128, 8, 3)),
    ),
]

# --- grouped_matmul

GROUPED_KERNELS = (
    Kernels("drhs", ("outer",)),
    Kernels("grouped_matmul_", ("rows",)),
)


def blocks(kernel: str, *sizes: tuple[int, int, int, int, int]) -> list[Changes]:
    """One change for each: rows, inner, columns, warps, stages."""
    return [{kernel: tuning_of_grouped.Blocks(*size)} for size in sizes]


GROUPED_VARIANTS = [
    {},
    *together(
        blocks(
            "rows",
            (128, 64, 256, 8, 3),
            (128, 64, 128, 8, 4),
            (128, 64, 128, 4, 3),
            (64, 64, 256, 8, 3),
            (64, 64, 128, 4, 4),
            (256, 64, 128, 8, 3),
            (128, 128, 128, 8, 2),
        ),
        blocks(
            "outer",
            (64, 128, 256, 8, 3),
            (64, 128, 128, 8, 4),
            (64, 128, 128, 4, 3),
            (64, 256, 128, 8, 3),
            (32, 128, 128, 8, 4),
            (32, 128, 256, 8, 4),
            (128, 128, 128, 8, 2),
        ),
    ),
]


def tuned(dry: bool) -> list[Tuned]:
    """All ops at their shapes; most wanted first."""
    headline = cases.headline(dry)
    scalar_scan = headline.scan._replace(decay="scalar")
    scalar_delta = headline.delta._replace(decay="scalar")
    wide = headline.attention if dry else cases.LONG_GROUPED_HEADS
    rows = [
        (headline.scan, set_scan, SCAN_KERNELS, SCAN_VARIANTS),
        (headline.attention, set_attention, ATTENTION_KERNELS, ATTENTION_VARIANTS),
        (headline.delta, set_delta, DELTA_KERNELS, DELTA_VARIANTS),
        (scalar_scan, set_scan, SCAN_KERNELS, SCALAR_SCAN_VARIANTS),
        (headline.grouped, set_grouped, GROUPED_KERNELS, GROUPED_VARIANTS),
        (headline.narrow_attention, set_attention, ATTENTION_KERNELS, NARROW_VARIANTS),
        (scalar_delta, set_delta, DELTA_KERNELS, DELTA_VARIANTS),
        (wide, set_attention, ATTENTION_KERNELS, WIDE_VARIANTS),
    ]
    found = []
    for shape, apply, kernels, variants in rows:
        by_pass = dict(zip((FORWARD, BOTH), programs_of(shape, cases.OURS, dry)))
        tried = variants[: DRY_VARIANTS if dry else None]
        found.append(Tuned(by_pass[BOTH], apply, kernels, tried))
    return found
