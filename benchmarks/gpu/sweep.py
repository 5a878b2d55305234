"""The stage "sweep": block sizes and warps of the kernels, one change of a table at a time."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from benchmarks.gpu import cases
from benchmarks.gpu.guard import WorkerOptions, run_each
from benchmarks.gpu.programs import Program, programs
from benchmarks.gpu.records import append_record, one_line
from benchmarks.gpu.timing import compile_program, time_program
from kernels_pallas.attention.gpu import tuning as tuning_of_attention
from kernels_pallas.attention.gpu.tuning import KernelConfig
from kernels_pallas.grouped_matmul.gpu import tuning as tuning_of_grouped
from kernels_pallas.linear_scan.gpu import tuning as tuning_of_scan

# The rows of the tables as they are, by chip, from which each setting departs.
SCAN_ROWS = {chip: dict(row.schedules) for chip, row in tuning_of_scan.TUNED.items()}
ATTENTION_ROWS = {chip: dict(row["bfloat16"]) for chip, row in tuning_of_attention.TUNED.items()}
GROUPED_ROWS = {chip: row[2] for chip, row in tuning_of_grouped.TUNED.items()}

AS_IT_IS = "as it is"
SCAN_SETTINGS = [
    {},
    {"scan_block_k": 64},
    {"scan_block_v": 32},
    {"scan_block_v": 128, "scan_warps": 8},
    {"scan_stages": 1},
    {"scan_stages": 3},
    {"intra_block_k": 32},
    {"intra_block_k": 32, "intra_warps": 4},
    {"back_block_k": 32},
    {"back_block_v": 64},
    {"chunk": 32},
    {"scan_warps": 8},
    {"programs_per_core": 2},
]
ATTENTION_SETTINGS = [
    {},
    {"forward": KernelConfig(128, 128, 8, 2)},
    {"forward": KernelConfig(64, 64, 4, 3)},
    {"forward": KernelConfig(128, 64, 8, 2)},
    {"dq": KernelConfig(64, 64, 4, 2)},
    {"dq": KernelConfig(128, 64, 8, 2)},
    {"dkv": KernelConfig(64, 64, 4, 2)},
    {"dkv": KernelConfig(32, 64, 4, 3)},
    {"dkv": KernelConfig(32, 128, 8, 3)},
]
GROUPED_SETTINGS = [
    {},
    {"stages": 4},
    {"columns": 256},
    {"rows": 64, "warps": 4},
    {"inner": 32, "stages": 4},
    {"warps": 4},
]
DRY_SETTINGS = 2


class Setting(NamedTuple):
    """A program, and what to change in its table before it is compiled."""

    program: Program
    label: str
    apply: Callable[[], None]


def set_scan(changes: dict[str, Any]) -> None:
    """In the rows of every chip and kind of decay."""
    for chip, rows in SCAN_ROWS.items():
        for decay, row in rows.items():
            tuning_of_scan.TUNED[chip].schedules[decay] = row._replace(**changes)


def set_attention(changes: dict[str, Any]) -> None:
    """In the rows of bfloat16, of every chip and size of heads."""
    for chip, rows in ATTENTION_ROWS.items():
        for size, row in rows.items():
            tuning_of_attention.TUNED[chip]["bfloat16"][size] = row._replace(**changes)


def set_grouped(changes: dict[str, Any]) -> None:
    """In the blocks of rows times their group's matrix, of 16 bits, of every chip."""
    for chip, row in GROUPED_ROWS.items():
        blocks = row.rows._replace(**changes)
        tuning_of_grouped.TUNED[chip][2] = row._replace(rows=blocks)


def settings_of_sweep(dry: bool) -> list[Setting]:
    """All of them. The last repeats one: the difference between the two is noise."""
    ours = {p.case: p for p in programs(dry) if p.implementation == cases.OURS}
    headline = cases.headline(dry)
    scan = ours[f"{headline.scan.case} both"]
    attention = ours[f"{headline.attention.case} both"]
    grouped = ours[f"{headline.grouped.case} fwd"]
    swept = [
        (scan, set_scan, SCAN_SETTINGS),
        (attention, set_attention, ATTENTION_SETTINGS),
        (grouped, set_grouped, GROUPED_SETTINGS),
    ]
    found = []
    for program, apply, changes_of_op in swept:
        for changes in changes_of_op[: DRY_SETTINGS if dry else None]:
            found.append(Setting(program, label(changes), partial(apply, changes)))
    found.append(Setting(grouped, f"{AS_IT_IS}, again", partial(set_grouped, {})))
    return found


def label(changes: dict[str, Any]) -> str:
    """A setting's name in the results: "forward=64,64,4,3"."""
    parts = []
    for name, value in changes.items():
        values = value if isinstance(value, tuple) else (value,)
        parts.append(f"{name}={','.join(str(v) for v in values)}")
    return " ".join(parts) or AS_IT_IS


def sweep(options: WorkerOptions) -> None:
    """Times every setting."""
    settings = options.settings

    def measure(setting: Setting) -> None:
        setting.apply()
        record(setting, **time_program(setting.program, settings.dry))

    def failed(setting: Setting, error: Exception) -> None:
        record(setting, error=one_line(error))

    def record(setting: Setting, **fields: Any) -> None:
        append_record(
            settings.out,
            stage="sweep",
            kind="sweep",
            case=setting.program.case,
            setting=setting.label,
            **fields,
        )

    run_each(settings_of_sweep(settings.dry), measure, failed, options)


def compile_programs(options: WorkerOptions) -> None:
    """Compiles the programs of later stages into jax's cache; those of the stage "time" first.

    A program that does not compile is left to its stage, which records why.
    """
    dry = options.settings.dry
    untouched = [Setting(program, "", _nothing) for program in programs(dry)]
    wanted = [*untouched, *settings_of_sweep(dry)]

    def compile_one(setting: Setting) -> None:
        setting.apply()
        compile_program(setting.program)

    def failed(setting: Setting, error: Exception) -> None:
        """The stage that times it says so."""

    run_each(wanted, compile_one, failed, options)
    append_record(
        options.settings.out,
        stage="parallel",
        kind="compiled",
        part=options.part,
        count=len(options.own(wanted)),
    )


def _nothing() -> None:
    """Leaves the tables as they are."""
