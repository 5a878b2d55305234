"""What a compilation for an absent accelerator tells, as frozen data, as JSON and as a table."""

import dataclasses
from collections.abc import Sequence

from gatedjax.aot.cost import DeclaredCost
from gatedjax.aot.hlo import Collective


@dataclasses.dataclass(frozen=True)
class TpuKernel:
    """A Mosaic kernel. Times are the model's (`replay.py` says how far to trust it), for one
    call.
    """

    name: str
    vmem_bytes: int | None  # scoped VMEM that the compiler gave it
    seconds: float  # schedule and waits for HBM
    schedule_seconds: float
    bundles: int  # executed
    matrix_busy: float  # share of the matrix units' cycles, 0 to 1
    vector_spills: int  # registers stored and filled, executed
    hbm_bytes: int
    slots: dict[str, float]  # share of each kind of issue slot, 0 to 1
    unknown: dict[str, int]  # what the replay could not follow


@dataclasses.dataclass(frozen=True)
class GpuKernel:
    """A kernel of the compiled program. None: not measured, because no ptxas was found."""

    name: str
    threads: int | None
    registers: int | None
    spill_bytes: int | None
    shared_memory_bytes: int
    blocks_per_core: int | None
    occupancy: float | None  # resident warps over the most that fit, 0 to 1
    wgmma: int  # instructions in the text
    mma: int


@dataclasses.dataclass(frozen=True)
class HloTime:
    """All calls of one HLO in a run of the program: model time, how much of it waits for HBM, bytes
    of one core.
    """

    name: str
    calls: int
    seconds: float
    stall_seconds: float
    hbm_bytes: int


@dataclasses.dataclass(frozen=True)
class Report:
    """One compiled program on one target. Bytes and FLOPs are per device."""

    target: str
    devices: int
    argument_bytes: int
    output_bytes: int
    aliased_bytes: int  # outputs that reuse an argument's memory
    temp_bytes: int
    code_bytes: int
    compiler_flops: float | None  # XLA's own count, which sees no kernel and a loop's body once
    compiler_bytes: float | None
    declared: DeclaredCost
    collectives: tuple[Collective, ...]
    kernels: tuple[TpuKernel | GpuKernel, ...]
    program_seconds: float | None  # model time of the whole program, if its schedule was asked for
    program_hbm_bytes: int | None  # of one core
    slowest: tuple[HloTime, ...]  # HLOs of the program by their model time
    notes: tuple[str, ...]

    @property
    def peak_bytes(self) -> int:
        """Memory of a device while the program runs."""
        return (
            self.argument_bytes
            + self.output_bytes
            - self.aliased_bytes
            + self.temp_bytes
            + self.code_bytes
        )

    def as_dict(self) -> dict:
        """For JSON."""
        return dataclasses.asdict(self) | {"peak_bytes": self.peak_bytes}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns: the first one to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    line = lambda row: "  ".join(
        [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]
    ).rstrip()
    return [line(row) for row in [header, *rows]]


def size(count: float | None) -> str:
    """Bytes in the largest unit that leaves a number above 1."""
    if count is None:
        return "-"
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(count) >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"


def _lines(report: Report) -> list[str]:
    r = report
    memory = {
        "arguments": r.argument_bytes,
        "outputs": r.output_bytes,
        "of them aliased": r.aliased_bytes,
        "temporaries": r.temp_bytes,
        "peak": r.peak_bytes,
    }
    lines = [
        f"{r.target}, {r.devices} device(s)",
        "memory a device   " + ", ".join(f"{name} {size(count)}" for name, count in memory.items()),
        f"compiler's count  {_count(r.compiler_flops)}FLOP, {size(r.compiler_bytes)} accessed",
    ]
    if r.declared.kernel_calls:
        d = r.declared
        bare = f", {d.undeclared} without an estimate" if d.undeclared else ""
        lines.append(
            f"kernels declare   {_count(d.flops)}FLOP, {size(d.bytes)} accessed ({d.kernel_calls} calls{bare})"
        )
    if r.program_seconds is not None:
        moved = size(r.program_hbm_bytes)
        lines.append(
            f"model time        {1e6 * r.program_seconds:,.1f} us for the whole program, HBM {moved} a core"
        )
    if r.collectives:
        rows = [[c.kind, str(c.count), size(c.bytes)] for c in r.collectives]
        lines += ["", *table(["collective", "count", "bytes"], rows)]
    if r.kernels:
        lines += ["", *_kernel_table(r.kernels)]
    if r.slowest:
        times = lambda h: [
            f"{1e6 * h.seconds:,.1f}",
            f"{1e6 * h.stall_seconds:,.1f}",
            size(h.hbm_bytes),
        ]
        rows = [[h.name, str(h.calls), *times(h)] for h in r.slowest]
        lines += ["", *table(["slowest HLOs", "calls", "us", "of it waiting", "HBM"], rows)]
    return [*lines, *(f"note: {note}" for note in r.notes)]


def _kernel_table(kernels: Sequence[TpuKernel | GpuKernel]) -> list[str]:
    if isinstance(kernels[0], TpuKernel):
        header = ["kernel", "us", "schedule", "bundles", "MXU", "spills", "HBM", "VMEM", "unknown"]
        rows = [
            [
                k.name,
                f"{1e6 * k.seconds:,.1f}",
                f"{1e6 * k.schedule_seconds:,.1f}",
                f"{k.bundles:,}",
                f"{k.matrix_busy:.0%}",
                f"{k.vector_spills:,}",
                size(k.hbm_bytes),
                size(k.vmem_bytes),
                str(sum(k.unknown.values()) or "-"),
            ]
            for k in kernels
        ]
        return table(header, rows)
    header = [
        "kernel",
        "threads",
        "registers",
        "spill B",
        "shared",
        "blocks/SM",
        "occupancy",
        "wgmma",
        "mma",
    ]
    cell = lambda x: "-" if x is None else f"{x}"
    rows = [
        [
            k.name,
            cell(k.threads),
            cell(k.registers),
            cell(k.spill_bytes),
            size(k.shared_memory_bytes),
            cell(k.blocks_per_core),
            "-" if k.occupancy is None else f"{k.occupancy:.0%}",
            cell(k.wgmma),
            cell(k.mma),
        ]
        for k in kernels
    ]
    return table(header, rows)


def _count(number: float | None) -> str:
    if number is None:
        return "- "
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:.0f} "
