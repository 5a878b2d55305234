"""CPU and wall seconds from the start of `train.py --config=tiny` to its first step, on this CPU.

    python benchmarks/first_step.py [--rounds=3] [--beside=/another/clone] [--json=FILE] [FLAG ...]

No compiled program is kept from one run to the next. What the runs tokenize is: the first round
pays for it if nothing has. Other flags go to train.py. With --beside another clone of the
project runs in turns with this one.

Wall seconds want a quiet machine. CPU seconds are those of all threads; on a busy machine they are
more, by a third and more, for the same work: compare what ran in turns, and the least of the
rounds.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import cores, cpu_model, parser, table, write_json

HERE = Path(__file__).resolve().parents[1]
# What `StepLog` says.
DONE = "first step done"
HEADER = ("clone", "CPU s, least", "CPU s, median", "wall s, least", "wall s, median")


def main() -> None:
    """Clones -> starts in turns -> table."""
    flags = parser(__doc__)
    flags.add_argument("--rounds", type=int, default=3, help="starts of each clone")
    flags.add_argument("--beside", type=Path, help="another clone, in turns with this one")
    given, of_train = flags.parse_known_args()
    if given.rounds < 1:
        flags.error(f"--rounds: got {given.rounds}, expected at least 1")
    clones = {"this": HERE}
    if given.beside is not None:
        clones["beside"] = given.beside.resolve()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in clones}
    for _ in range(given.rounds):
        for name, clone in clones.items():
            found[name].append(start(clone, of_train))
    rows = []
    for name, rounds in found.items():
        cpu, wall = zip(*rounds)
        figures = (min(cpu), statistics.median(cpu), min(wall), statistics.median(wall))
        rows.append((name, *(f"{x:.1f}" for x in figures)))
    load = os.getloadavg()[0]
    print(f"{cpu_model()}, {cores()} cores, load {load:.1f}; {given.rounds} rounds")
    print(table(HEADER, rows))
    if given.json:
        write_json(given.json, {"load": load, "cpu_and_wall_seconds": found}, {})


def start(clone: Path, arguments: list[str]) -> tuple[float, float]:
    """CPU seconds of a run up to its first step, and wall seconds; then the run is ended."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(clone / "train.py"),
            "--config=tiny",
            f"--workdir={folder}/run",
            "--compile_cache=",
            *arguments,
        ]
        environment = os.environ | {"PYTHONPATH": str(clone), "PYTHONUNBUFFERED": "1"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if DONE in line:
                    wall = time.monotonic() - began
                    return cpu_seconds(process.pid), wall
        finally:
            process.kill()
            process.wait()
    sys.exit(f"{' '.join(command)}: got no line {DONE!r}, expected one")


def cpu_seconds(pid: int) -> float:
    """Of a process that runs, user and system, with the children that it has waited for."""
    after_the_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    # utime, stime, cutime, cstime are fields 14 to 17; the first after the name is the third.
    ticks = sum(int(x) for x in after_the_name[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
