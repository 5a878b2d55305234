"""The text at the end of a run, from the records alone. Imports no jax."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import OWN
from benchmarks.gpu.records import read_records

Record = dict[str, Any]

# The text is cut at the front: its end has the stages, and whether any was late.
MOST_CHARACTERS = 11_500
MOST_WRONG_CASES = 12
MOST_FAILURES = 12


def summary(out: Path, seconds: float) -> str:
    """Of all that was found so far."""
    found = read_records(out)
    lines = [f"gatedjax GPU kit: {seconds:.0f} s"]
    sections = (
        machine_lines,
        numerics_lines,
        time_lines,
        train_lines,
        tune_lines,
        ncu_lines,
        stage_lines,
        failure_lines,
    )
    for section in sections:
        lines += section(found)
    return "\n".join(lines)[-MOST_CHARACTERS:] + "\n"


def of_kind(records: list[Record], kind: str) -> list[Record]:
    return [record for record in records if record.get("kind") == kind]


def machine_lines(records: list[Record]) -> Iterator[str]:
    """Device, packages, ptxas, ceilings."""
    for r in of_kind(records, "versions"):
        packages = ", ".join(f"{name} {version}" for name, version in r["packages"].items())
        yield f"{r['device']}; {packages}"
        yield f"ptxas: {r['ptxas']}; nvidia-smi: {r['nvidia_smi']}"
    for r in of_kind(records, "clocks"):
        yield f"clocks, lowest, median, highest: {r['stage']}: {_fields(r)}"
    for r in of_kind(records, "ptxas"):
        yield f"XLA takes ({r['ptxas']}): {r['taken']}"[:200]
    for r in of_kind(records, "ceiling"):
        yield f"ceiling {r['what']}: {r['value']}"


def numerics_lines(records: list[Record]) -> Iterator[str]:
    """How many cases are right with each ptxas, and those that are not."""
    checked = of_kind(records, "numerics")
    for ptxas in sorted({r["ptxas"] for r in checked}):
        rows = [r for r in checked if r["ptxas"] == ptxas]
        wrong = [r for r in rows if not r["ok"]]
        yield f"numerics, ptxas {ptxas}: {len(rows) - len(wrong)} of {len(rows)} right"
        for r in wrong[:MOST_WRONG_CASES]:
            what = r.get("error") or r.get("errors")
            yield f"  WRONG {r['case']}: {what} deterministic={r.get('same')}"[:230]


def time_lines(records: list[Record]) -> Iterator[str]:
    """A table."""
    names = f"{'time':44} {'implementation':22}"
    yield f"{names} {'ms':>9} {'TFLOP/s':>8} {'GB/s':>7} {'spread':>7}"
    for r in of_kind(records, "time"):
        names = f"{r['case']:44} {r['implementation']:22}"
        if "ms" in r:
            rates = f"{r['tflops']:8.0f} {r['gbs']:7.0f}"
            yield f"{names} {r['ms']:9.3f} {rates} {r['spread']:7.1%}"
        else:
            verb = "FAILED" if is_failure(r) else "left out:"
            yield f"{names} {verb} {r['error'][:70]}"


def train_lines(records: list[Record]) -> Iterator[str]:
    for r in of_kind(records, "train"):
        yield f"train: {_fields(r)}"


def tune_lines(records: list[Record]) -> Iterator[str]:
    """The best row of each op, and its time beside that of the row as it is."""
    variants = of_kind(records, "variant")
    for r in of_kind(records, "tuned"):
        rows = [v for v in variants if v["case"] == r["case"]]
        measured = [v for v in rows if "kernels" in v]
        if "error" in r:
            yield f"tune {r['case']}: {r['error']}"[:230]
            continue
        yield (
            f"tune {r['case']}: {r['before_ms']:.3f} -> {r['ms']:.3f} ms by {r['changes']}; "
            f"{len(measured)} of {len(rows)} variants measured"
        )


def ncu_lines(records: list[Record]) -> Iterator[str]:
    for r in of_kind(records, "ncu"):
        yield f"ncu {r['kernel']}: {r['metrics']}"[:700]


def stage_lines(records: list[Record]) -> Iterator[str]:
    """How long each stage took, and the processes that failed or were late."""
    for r in of_kind(records, "stage"):
        yield f"stage {r['stage']}: {_fields(r)}"
    for r in of_kind(records, "process"):
        yield f"  process {r['process'][:100]}: late {r['late']}, exit code {r['exit_code']}"


def is_failure(record: Record) -> bool:
    """Whether it says that something of ours is wrong, or did not run."""
    match record.get("kind"):
        case "numerics":
            return not record["ok"]
        case "time":
            return "error" in record and record["implementation"] in OWN
        case "train":
            return "error" in record
    return False


def failure_lines(records: list[Record]) -> Iterator[str]:
    """What is wrong with our own kernels. Other libraries may be missing, or refuse a shape."""
    failed = [r for r in records if is_failure(r)]
    for r in failed[:MOST_FAILURES]:
        what = r.get("case") or r["stage"]
        yield f"  {r['kind']} {what}: {r.get('error') or r.get('errors')}"[:230]
    yield f"failures of gatedjax: {len(failed)}"


def _fields(record: Record) -> str:
    """All but what says which record it is."""
    shown = {k: v for k, v in record.items() if k not in ("stage", "kind")}
    return ", ".join(f"{name} {value}" for name, value in shown.items())
