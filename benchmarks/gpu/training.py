"""The stage "train": a real training run for as long as the stage lasts. Imports no jax."""

import json
import sys
import time
from typing import Any

from benchmarks.gpu.processes import Job
from benchmarks.gpu.records import append_record
from benchmarks.gpu.settings import Settings

# The rate is the best of so many last lines of the log: an earlier one may hold a compilation.
LAST_LINES = 5
RECORDED = ("step", "tokens_per_s", "mfu", "loss", "bits_per_byte")

# Nothing but training: the run is killed at the limit.
GPU_FLAGS = [
    "--config=configs/gla_340m.py",
    "--config.train.batch_size=16",
    "--config.train.steps=100000",
]
DRY_FLAGS = [
    "--config=configs/tiny.py",
    "--config.model.num_layers=2",
    "--config.model.width=32",
    "--config.data.seq_len=64",
    "--config.train.eval_batches=1",
    "--config.train.sample_tokens=4",
    "--config.optim.warmup_steps=5",
    "--config.train.steps=15",
]
COMMON_FLAGS = [
    "--config.train.log_every=5",
    "--config.train.eval_every=100000",
    "--config.train.checkpoint_every=100000",
]


def job(settings: Settings) -> Job:
    """train.py, in a new folder."""
    workdir = settings.scratch / f"run-{time.time_ns()}"
    flags = DRY_FLAGS if settings.dry else GPU_FLAGS
    command = [sys.executable, "train.py"]
    command += flags
    command += COMMON_FLAGS
    command += [f"--workdir={workdir}", f"--compile_cache={settings.scratch / 'xla'}"]
    return Job(f"train.py {flags[0]}", command)


def record(settings: Settings) -> None:
    """Tokens a second of the newest run, from its metrics."""
    lines = _newest_metrics(settings)
    rows = [line for line in lines if line.get("tokens_per_s")]
    if not rows:
        error = "metrics.jsonl: got no line with tokens_per_s, expected at least one"
        append_record(settings.out, stage="train", kind="train", error=error)
        return
    best = max(rows[-LAST_LINES:], key=lambda row: row["tokens_per_s"])
    found = {name: best.get(name) for name in RECORDED}
    first_step_s = lines[0].get("first_step_s")
    append_record(
        settings.out,
        stage="train",
        kind="train",
        first_step_s=first_step_s,
        **found,
    )


def _newest_metrics(settings: Settings) -> list[dict[str, Any]]:
    """The log of the newest run; the last line of a killed run may be unfinished."""
    runs = sorted(settings.scratch.glob("run-*/metrics.jsonl"))
    if not runs:
        return []
    found = []
    for line in runs[-1].read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
