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
    matrix_busy: float  # fraction of the matrix units' cycles, 0 to 1
    vector_spills: int  # registers stored and filled, executed
    hbm_bytes: int
    slots: dict[str, float]  # fraction used of each kind of issue slot, 0 to 1
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
    instructions: int | None = None  # of the machine; None without nvdisasm
    # Of the shortest loop that multiplies matrices: what a warp issues for a tile.
    tile_instructions: int | None = None
    async_copies: int | None = None  # instructions: to shared memory, while others run
    warnings: tuple[str, ...] = ()  # of ptxas, such as C7515: it serialized matrix instructions


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
        new_output_bytes = self.output_bytes - self.aliased_bytes
        return self.argument_bytes + new_output_bytes + self.temp_bytes + self.code_bytes

    def as_dict(self) -> dict:
        """For JSON."""
        return dataclasses.asdict(self) | {"peak_bytes": self.peak_bytes}

    def __str__(self) -> str:
        lines = _summary(self)
        for rows in (_collective_table(self), _kernel_table(self.kernels), _slowest_table(self)):
            if rows:
                lines += ["", *rows]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns: the first one to the left, numbers to the right."""
    all_rows = [header, *rows]
    columns = zip(*all_rows)
    widths = [max(len(cell) for cell in column) for column in columns]
    lines = []
    for row in all_rows:
        first = row[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        lines.append("  ".join([first, *others]).rstrip())
    return lines


def size(count: float | None) -> str:
    """Bytes in the largest unit that leaves a number above 1."""
    if count is None:
        return "-"
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(count) >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"


def _summary(report: Report) -> list[str]:
    """The lines above the tables."""
    memory = {
        "arguments": report.argument_bytes,
        "outputs": report.output_bytes,
        "of them aliased": report.aliased_bytes,
        "temporaries": report.temp_bytes,
        "peak": report.peak_bytes,
    }
    parts = ", ".join(f"{name} {size(count)}" for name, count in memory.items())
    flops = _count(report.compiler_flops)
    accessed = size(report.compiler_bytes)
    lines = [
        f"{report.target}, {report.devices} device(s)",
        f"memory a device   {parts}",
        f"compiler's count  {flops}FLOP, {accessed} accessed",
    ]
    declared = report.declared
    if declared.kernel_calls:
        calls = f"{declared.kernel_calls} calls"
        if declared.undeclared:
            calls += f", {declared.undeclared} without an estimate"
        flops = _count(declared.flops)
        accessed = size(declared.bytes)
        lines.append(f"kernels declare   {flops}FLOP, {accessed} accessed ({calls})")
    if report.program_seconds is not None:
        time = _microseconds(report.program_seconds)
        moved = size(report.program_hbm_bytes)
        lines.append(f"model time        {time} us for the whole program, HBM {moved} a core")
    return lines


def _collective_table(report: Report) -> list[str]:
    rows = [[c.kind, str(c.count), size(c.bytes)] for c in report.collectives]
    return table(["collective", "count", "bytes"], rows) if rows else []


def _slowest_table(report: Report) -> list[str]:
    rows = []
    for called in report.slowest:
        rows.append(
            [
                called.name,
                str(called.calls),
                _microseconds(called.seconds),
                _microseconds(called.stall_seconds),
                size(called.hbm_bytes),
            ]
        )
    return table(["slowest HLOs", "calls", "us", "of it waiting", "HBM"], rows) if rows else []


def _kernel_table(kernels: Sequence[TpuKernel | GpuKernel]) -> list[str]:
    """A program's kernels are all of one machine."""
    tpu_rows = [_tpu_row(k) for k in kernels if isinstance(k, TpuKernel)]
    gpu_rows = [_gpu_row(k) for k in kernels if isinstance(k, GpuKernel)]
    if tpu_rows:
        header = ["kernel", "us", "schedule", "bundles", "MXU", "spills", "HBM", "VMEM", "unknown"]
        return table(header, tpu_rows)
    if gpu_rows:
        header = ["kernel", "threads", "registers", "spill B", "shared", "blocks/SM", "occupancy"]
        others = ["wgmma", "mma", "instructions", "a tile", "warnings"]
        return table([*header, *others], gpu_rows)
    return []


def _tpu_row(kernel: TpuKernel) -> list[str]:
    unknown = sum(kernel.unknown.values())
    return [
        kernel.name,
        _microseconds(kernel.seconds),
        _microseconds(kernel.schedule_seconds),
        f"{kernel.bundles:,}",
        f"{kernel.matrix_busy:.0%}",
        f"{kernel.vector_spills:,}",
        size(kernel.hbm_bytes),
        size(kernel.vmem_bytes),
        str(unknown or "-"),
    ]


def _gpu_row(kernel: GpuKernel) -> list[str]:
    occupancy = "-" if kernel.occupancy is None else f"{kernel.occupancy:.0%}"
    return [
        kernel.name,
        _or_dash(kernel.threads),
        _or_dash(kernel.registers),
        _or_dash(kernel.spill_bytes),
        size(kernel.shared_memory_bytes),
        _or_dash(kernel.blocks_per_core),
        occupancy,
        str(kernel.wgmma),
        str(kernel.mma),
        _or_dash(kernel.instructions),
        _or_dash(kernel.tile_instructions),
        " ".join(kernel.warnings) or "-",
    ]


def _or_dash(number: int | None) -> str:
    return "-" if number is None else str(number)


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f}"


def _count(number: float | None) -> str:
    """With the prefix of a unit that the caller writes behind it: "1.61 G"."""
    if number is None:
        return "- "
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:.0f} "
