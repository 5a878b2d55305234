"""Runs of train.py as real processes: started together, watched line by line, signaled,
compared.
"""

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIG = "tests/distributed/small_config.py"
MESH = "--config.mesh.fsdp=4"  # with data 2 over eight devices
PATIENCE = 900.0  # seconds; the machine may be busy with other things


def environment(devices: int, cache: Path) -> dict[str, str]:
    """For a process with so many simulated devices; compiled programs are shared and not
    optimized.
    """
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    ours = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(ROOT),
    }
    saved = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return os.environ | ours | saved


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


class Process:
    """One process of a run. `lines` collects what it prints, stdout and stderr apart."""

    def __init__(self, command: Sequence[str], env: dict[str, str]):
        self.popen = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._news: queue.Queue[str | None] = queue.Queue()
        self._readers = [
            threading.Thread(
                target=self._read, args=(self.popen.stdout, self.out, True), daemon=True
            ),
            threading.Thread(
                target=self._read, args=(self.popen.stderr, self.err, False), daemon=True
            ),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream, lines: list[str], is_news: bool) -> None:
        for line in stream:
            lines.append(line.rstrip("\n"))
            if is_news:
                self._news.put(lines[-1])
        if is_news:
            self._news.put(None)

    def wait_for(self, matches: Callable[[str], bool]) -> str:
        """The first line on stdout from now on for which `matches` holds."""
        deadline = time.monotonic() + PATIENCE
        while True:
            line = self._news.get(timeout=max(deadline - time.monotonic(), 0.01))
            assert line is not None, "ended before its time:\n" + self.log()
            if matches(line):
                return line

    def wait(self) -> int:
        code = self.popen.wait(PATIENCE)
        for reader in self._readers:
            reader.join(PATIENCE)
        return code

    def log(self) -> str:
        return "\n".join([*self.out, "--- stderr", *self.err])


@contextlib.contextmanager
def started(
    place: Path, workdir: str, *flags: str, processes: int = 1, devices: int = 4, **how
) -> Iterator[list]:
    """The processes of one run; whatever is left of them is killed at the end.

    how: `script`; `env` on top, `each` a list of more of it by process, `each_flags` of flags;
    `is_named=False`: no flags name the processes.
    """
    port, running = free_port(), []
    env = environment(devices, place / "xla") | how.get("env", {})
    is_named = processes > 1 and how.get("is_named", True)
    try:
        for i in range(processes):
            names = [
                f"--coordinator=localhost:{port}",
                f"--num_processes={processes}",
                f"--process_id={i}",
            ]
            own = [*(names if is_named else []), *how.get("each_flags", [[]] * processes)[i]]
            command = train_command(place, workdir, *flags, *own, **how)
            running.append(Process(command, env | (how["each"][i] if "each" in how else {})))
        yield running
    finally:
        for process in running:
            process.popen.kill()
            process.wait()


def train_command(
    place: Path, workdir: str, *flags: str, script: str = "train.py", **_
) -> list[str]:
    sources = [
        f"--config.data.sources.main.path={place / 'text'}",
        f"--config.data.cache_dir={place / 'tokens'}",
    ]
    ours = [
        f"--config={CONFIG}",
        *sources,
        f"--workdir={place / workdir}",
        f"--compile_cache={place / 'xla'}",
    ]
    return [sys.executable, *script.split(), *(ours if "eval" not in script else []), *flags]


def run(place: Path, workdir: str, *flags: str, **how) -> list[Process]:
    """From start to end."""
    with started(place, workdir, *flags, **how) as running:
        for process in running:
            process.wait()
        return running


def write_text(place: Path) -> None:
    """Eight small documents."""
    (place / "text").mkdir(parents=True)
    for i in range(8):
        (place / "text" / f"{i}.txt").write_text(
            "".join(f"line {j} of file {i}: {j * i}\n" for j in range(80))
        )


def records(place: Path, workdir: str, split: str = "train") -> list[dict]:
    path = place / workdir / "metrics.jsonl"
    return [r for r in map(json.loads, path.read_text().splitlines()) if r["split"] == split]


def losses(place: Path, workdir: str) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in records(place, workdir)}


def is_step(at_least: int) -> Callable[[str], bool]:
    """Whether a line is the log of that step, or of a later one."""
    return lambda line: line.startswith("step") and int(line.split()[1].split("/")[0]) >= at_least


def steps_on_disk(place: Path, workdir: str) -> list[int]:
    return sorted(
        int(p.name) for p in (place / workdir / "checkpoints").iterdir() if p.name.isdigit()
    )
