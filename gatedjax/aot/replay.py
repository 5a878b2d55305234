"""Replays a parsed TPU program on the scalar side: how many cycles its schedule takes, what it
moves, where it waits.

Scalar registers, predicates, SMEM, branches (with their delay slots), DMA issue and DMA waits are
executed; vector values are ignored. That gives trip counts, executed bundles, DMA bytes and
matrix-unit work exactly, and the time lost on DMA by a simple model: one first-in first-out HBM
channel of the chip's public bandwidth and a fixed latency.

How far to trust it. The schedule: within about 3 % of measured cycles on v4 and v5e. The time:
within 5 % of published v5e times of seven matmuls (`tests/gatedjax/aot/test_tpu_model.py`); 8 to 15
percent below five published v6e times of kernels that vector units and spills bound
(`benchmarks/tpu_model.py`); v5p and v7x share the mechanism but were never checked against
hardware. Not modeled: strided or narrow DMAs, HBM refresh and bank conflicts, VMEM ports shared
with DMA, instruction fetch of huge bodies, barriers between two cores, the interconnect, clock
throttling, and the host's 0.1 ms a call. Differences below 5 % are noise. A branch or size that
depends on data is reported as unknown, and the branch taken as not taken; but that a number is
below infinity is taken as true, and so is in a whole program that a donated output lies where its
input did (`schedule.Dump.program`).

`bundles.py` parses the listing, `program.py` turns it into functions, `timeline.py` is the model of
the memory, `values.py` the arithmetic.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gatedjax.aot.bundles import Listing, Op
from gatedjax.aot.program import Program
from gatedjax.aot.targets import Tpu
from gatedjax.aot.timeline import Timeline
from gatedjax.aot.values import HBM_SHIFT, OPERAND_BITS, OPERANDS, UNKNOWN, Value, unsigned

__all__ = ["Execution", "Program", "Schedule", "Timeline", "summarize"]

MAX_BLOCKS = 3_000_000

type Words = Sequence[int] | np.ndarray


class Execution:
    """One run of a program on one core: SMEM, and how often each stretch of bundles was executed.

    Args:
      program: what runs.
      core: the answer where the program asks on which core it runs.
      operands: by index, the 32-bit words of operands that steer control flow (scalar prefetch).
      call: runs a called HLO on the timeline (whole programs).
      unknown_taken: which branches on unknown values are taken, counted from 0; none by default.
    """

    def __init__(
        self,
        program: Program,
        core: int = 0,
        operands: Mapping[int, Words] | None = None,
        call: Callable[[str, Timeline], None] | None = None,
        unknown_taken: range = range(0),
    ):
        self.program = program
        self.core = core
        self.memory: dict[Value, Value] = {}
        self.unknown = collections.Counter()
        self._operands = operands or {}
        self._call = call
        self._unknown_taken = unknown_taken
        self._runs = collections.Counter()  # by (first bundle, last bundle + 1)
        self._ticks = 0

    def run(self, timeline: Timeline) -> None:
        """Executes the program from its first bundle to its last.

        Raises:
          RuntimeError: it does not end within MAX_BLOCKS blocks, so some value is misread.
        """
        for index, words in self._operands.items():
            if self.program.in_smem(index):
                self._write(OPERANDS + (index << OPERAND_BITS), words)
        registers = collections.defaultdict(lambda: UNKNOWN)
        assigned = collections.defaultdict(int)
        at = 0
        end = len(self.program.listing.bundles)
        for _ in range(MAX_BLOCKS):
            if at >= end:
                return
            block = self.program.block(at)
            at = block(registers, assigned, timeline, self)
        raise RuntimeError(f"{self.program.listing.name}: no end after {MAX_BLOCKS} blocks")

    def executions(self) -> list[int]:
        """How often each bundle was executed."""
        # A stretch adds its runs at its first bundle and takes them away behind its last.
        change = [0] * (len(self.program.listing.bundles) + 1)
        for (start, end), times in self._runs.items():
            change[start] += times
            change[end] -= times
        total = 0
        counts = []
        for step in change[:-1]:
            total += step
            counts.append(total)
        return counts

    def _write(self, address: int, words: Words) -> None:
        for i, word in enumerate(words):
            self.memory[address + i] = int(word)

    # What the generated functions call.

    def tick(self) -> int:
        """A number for each assignment, higher for later ones."""
        self._ticks += 1
        return self._ticks

    def count(self, start: int, end: int) -> None:
        """The bundles from `start` to `end` - 1 were executed once more."""
        self._runs[start, end] += 1

    def store(self, address: Value, value: Value, predicate: Value) -> None:
        """To SMEM."""
        if address is UNKNOWN or predicate is False:
            return
        self.memory[address] = value if predicate is True else UNKNOWN

    def unknown_branch(self) -> bool:
        """Whether to take a branch on a value that is not known."""
        number = self.unknown["branch"]
        self.unknown["branch"] += 1
        return number in self._unknown_taken

    def pop(self, queue):
        """The next result of a division."""
        if isinstance(queue, list) and queue:
            return queue.pop(0)
        return UNKNOWN

    def operand_value(self, index: int) -> Value:
        """Of a scalar operand, passed by value."""
        if index not in self._operands:
            return UNKNOWN
        return int(self._operands[index][0])

    def fill_smem(self, source: Value, dest: Value, size: Value) -> None:
        """A DMA into SMEM, whose words are known if it copies a known operand from its
        beginning.
        """
        if type(source) is not int or type(dest) is not int or type(size) is not int:
            return
        if source < OPERANDS:
            return
        if source >= OPERANDS << HBM_SHIFT:  # an operand that XLA left in HBM
            source >>= HBM_SHIFT
        index, offset = divmod(source - OPERANDS, 1 << OPERAND_BITS)
        words = self._operands.get(index)
        if words is None or offset != 0:
            return
        moved = unsigned(size) * self.program.chip.dma_granule
        self._write(dest, words[: moved // 4])

    def call(self, name: str, timeline: Timeline) -> None:
        """Another HLO of a whole program."""
        if self._call is not None:
            self._call(name, timeline)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What one run of a kernel executed. Fractions are of the executed bundles."""

    bundles: int  # executed, empty ones too: the cycles of the schedule
    cycles: int  # with the waits for DMA
    hbm_bytes: int
    matrix_busy: float  # fraction of the matrix units' cycles
    slots: dict[str, float]  # fraction of each slot's capacity: VALU, VLOAD, VSTORE, EUP, XLU ...
    spills: int  # vector registers stored to and filled from memory
    empty: float
    unknown: dict[str, int]  # branches, sizes and ops that could not be followed


def summarize(execution: Execution, timeline: Timeline) -> Schedule:
    """The figures of a finished run."""
    program = execution.program
    listing = program.listing
    counts = execution.executions()
    executed = sum(counts)
    total = max(1, executed)
    busy = 0
    empty = 0
    for count, ops in zip(counts, listing.bundles):
        busy += count * sum(_matrix_cycles(op, program.chip) for op in ops)
        if not ops:
            empty += count
    used = _slots_used(listing, counts)
    slots = {}
    for name, size in listing.slot_capacity.items():
        if size:
            slots[name] = used[name] / (total * size)
    return Schedule(
        bundles=executed,
        cycles=timeline.time,
        hbm_bytes=timeline.hbm_bytes,
        matrix_busy=busy / (program.chip.mxus * total),
        slots=slots,
        spills=used.get("VSTORE:SPILL", 0) + used.get("VLOAD:FILL", 0),
        empty=empty / total,
        unknown=dict(timeline.unknown + execution.unknown + program.unhandled),
    )


def _slots_used(listing: Listing, counts: list[int]) -> dict[str, int]:
    """By name, how many slots of that kind were used, executed bundles counted as often as they
    ran.
    """
    used = dict.fromkeys(listing.slot_capacity, 0)
    if len(listing.slots_used) != len(counts):  # libtpu did not write that file, or not all of it
        return used
    for count, row in zip(counts, listing.slots_used):
        if not count:
            continue
        for name, slots in zip(used, row):
            used[name] += count * slots
    return used


def _matrix_cycles(op: Op, chip: Tpu) -> int:
    """Cycles that one matrix op keeps its unit: 8 rows of float32, or 16 packed rows of anything
    smaller.
    """
    if not op.name.startswith("vmatmul"):
        return 0
    packed = re.search(r"\.(bf16|f16|s8|u8|x8)|f8", op.name)
    return chip.cycles_per_8_rows * (2 if packed else 1)
