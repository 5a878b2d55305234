"""What a run says of itself: one `write(step, scalars)` to the console, to TensorBoard and to a JSON line per record.

`metrics.jsonl` in the run directory is the complete record; TensorBoard's files lie beside it in `tensorboard/`. The
console knows these scalars, all others go to the two files only:

  loss             nats per token                        tokens_per_s   over all devices
  bits_per_byte    of text, whatever the tokenizer       flops_per_s    of the model, forward and backward
  grad_norm        before clipping                       mfu            flops_per_s over the devices' peak, 0 to 1
  skipped_steps    by the guard, since the start         eta_s          seconds to the last step
  lr               learning rate

The two files also have data_wait_s (host seconds a step waited for its batch, mean since the last record), checkpoint_s
(seconds that saves held up the loop since the last record), first_step_s (from the start of the command to the end of
the first step), stalls (times that the watchdog found the run standing).

A scalar that is None is left out (`mfu` where the peak is not known). An array (`expert_load`) goes to the JSON line
only, as nested lists. Only process 0 writes.
"""

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import jax
import numpy as np
from tensorboardX import SummaryWriter

from gatedjax.errors import InputError

Scalars = Mapping[str, Any]  # name -> a Python, NumPy or JAX number (or array), or None for "not known"

METRICS_FILE = "metrics.jsonl"
_CLEAR_LINE = "\r\x1b[K"


class Writer(Protocol):
    """One place that scalars go to."""

    def write(self, step: int, scalars: Scalars, split: str = "train") -> None: ...

    def close(self) -> None: ...


class Writers:
    """Several writers as one; a context manager that closes them. Empty on all processes but the first."""

    def __init__(self, writers: Sequence[Writer]):
        self._writers = tuple(writers)

    def write(self, step: int, scalars: Scalars, split: str = "train") -> None:
        """Writes scalars of optimizer step `step`. `split`: "train", or "validation" and the like.

        Numbers on a device are fetched here, once, which waits for the step that computes them.
        """
        if not self._writers:
            return
        fetched = {name: x for name, x in jax.device_get(dict(scalars)).items() if x is not None}
        numbers = {name: np.asarray(x) if np.ndim(x) else float(x) for name, x in fetched.items()}
        for writer in self._writers:
            writer.write(step, numbers, split)

    def pictures(self, step: int, pictures: Iterable[tuple[str, np.ndarray]]) -> None:
        """Names and uint8 arrays [height, width, 3], to TensorBoard alone."""
        boards = [w for w in self._writers if isinstance(w, TensorBoard)]
        for name, picture in pictures if boards else ():
            boards[0].picture(step, name, picture)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()

    def __enter__(self) -> "Writers":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def make_writers(run_dir: str | os.PathLike, total_steps: int, resume_step: int = 0) -> Writers:
    """Console, JSON lines and TensorBoard for a run. Records after `resume_step`, which will come again, are dropped.

    Raises:
      InputError: the run directory cannot be written to, or its metrics file is not one of ours.
    """
    if jax.process_index() != 0:
        return Writers([])
    run_dir = Path(run_dir)
    return Writers([Console(total_steps), Jsonl(run_dir, resume_step), TensorBoard(run_dir, resume_step)])


def say(text: str, out: TextIO | None = None) -> None:
    """Prints a line on process 0, over the live progress line if there is one."""
    out = out or sys.stdout
    if jax.process_index() == 0:
        print((_CLEAR_LINE if out.isatty() else "") + text, file=out, flush=True)


class Console:
    """Progress. On a terminal, training redraws one live line; elsewhere, and for other splits, each write adds one."""

    def __init__(self, total_steps: int, out: TextIO | None = None):
        self._total, self._out = total_steps, out or sys.stdout
        self._live = False

    def write(self, step: int, scalars: Scalars, split: str = "train") -> None:
        line = format_step(step, self._total, scalars, split)
        if not self._out.isatty() or split != "train":
            say(line, self._out)
            self._live = False
            return
        width = shutil.get_terminal_size().columns - 1  # a longer line would wrap, and \r not reach its start
        self._out.write(_CLEAR_LINE + line[:width])
        self._out.flush()
        self._live = True

    def close(self) -> None:
        if self._live:
            self._out.write("\n")
            self._out.flush()


class Jsonl:
    """One JSON object per record: {"step": 120, "split": "train", "loss": 2.13, ...}. NaN and infinities are null."""

    def __init__(self, run_dir: Path, resume_step: int = 0):
        self._path = run_dir / METRICS_FILE
        with self._plain_errors():
            run_dir.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                self._keep_up_to(resume_step)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)

    def write(self, step: int, scalars: Scalars, split: str = "train") -> None:
        record = {"step": step, "split": split}
        record |= {name: _plain(x) for name, x in scalars.items()}
        with self._plain_errors():
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        with self._plain_errors():
            self._file.close()

    def _keep_up_to(self, step: int) -> None:
        kept = [r for r in read_records(self._path) if r["step"] <= step]
        new = self._path.with_suffix(".tmp")
        new.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        os.replace(new, self._path)

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise InputError(f"could not write {self._path}: {e.strerror}") from e


def _plain(x: Any) -> Any:
    """A number, or nested lists of numbers to 5 significant digits; None where not finite."""
    if np.ndim(x):
        return [_plain(row) for row in np.asarray(x)]
    if not math.isfinite(x):
        return None
    return float(f"{x:.5g}") if isinstance(x, np.floating) else x


class TensorBoard:
    """Event files. On resume, TensorBoard is told to hide what came after the restored step."""

    def __init__(self, run_dir: Path, resume_step: int = 0):
        try:
            self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)
        except OSError as e:
            raise InputError(f"could not write {run_dir / 'tensorboard'}: {e.strerror}") from e

    def write(self, step: int, scalars: Scalars, split: str = "train") -> None:
        for name, x in scalars.items():
            if np.ndim(x) == 0:
                self._writer.add_scalar(f"{split}/{name}", x, step)
        self._writer.flush()

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        self._writer.add_image(f"probes/{name}", picture, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


def read_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a metrics file. A last line that a kill cut short is left out.

    Raises:
      InputError: no such file, or a line before the last that is not a record.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as e:
        raise InputError(f"could not read {path}: {e.strerror}") from e
    records = []
    for number, line in enumerate(lines, 1):
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise InputError(f"{path}, line {number}: {line[:60]!r} came, wanted a JSON object with a step")
    return records


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


class Throughput:
    """Speed between readings, and time left.

    Read it after the step's numbers have arrived on the host: before, the device may still be computing. The first
    reading only starts the clock, so compilation is not counted; time spent `paused` is not part of the speed.

    Args:
      tokens_per_step: of the whole batch, over all devices.
      flops_per_token: of the model, forward and backward (`flops.train_flops_per_token`).
      peak_flops: FLOP/s of all devices together (`flops.peak_flops`), None if not known.
      total_steps: the last step of the run.
      clock: seconds.
    """

    def __init__(
        self,
        tokens_per_step: float,
        flops_per_token: float,
        peak_flops: float | None,
        total_steps: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._tokens_per_step, self._flops_per_token = tokens_per_step, flops_per_token
        self._peak_flops, self._total_steps, self._clock = peak_flops, total_steps, clock
        self._first: tuple[int, float] | None = None  # step and time of the first reading
        self._last: tuple[int, float] | None = None
        self._pauses = 0.0  # since the last reading

    def read(self, step: int) -> dict[str, float | None]:
        """tokens_per_s, flops_per_s, mfu since the last reading; eta_s from the mean since the first, with pauses."""
        now, pauses, last = self._clock(), self._pauses, self._last
        self._last, self._pauses = (step, now), 0.0
        if last is None or step <= last[0]:
            self._first = self._first or (step, now)
            return {}
        seconds = max(now - last[1] - pauses, 1e-9)
        tokens_per_s = (step - last[0]) * self._tokens_per_step / seconds
        flops_per_s = tokens_per_s * self._flops_per_token
        mfu = flops_per_s / self._peak_flops if self._peak_flops else None
        eta_s = (now - self._first[1]) / (step - self._first[0]) * max(self._total_steps - step, 0)
        return {"tokens_per_s": tokens_per_s, "flops_per_s": flops_per_s, "mfu": mfu, "eta_s": eta_s}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around evaluation, sampling and the like."""
        start = self._clock()
        try:
            yield
        finally:
            self._pauses += self._clock() - start


def format_step(step: int, total_steps: int, scalars: Scalars, split: str = "train") -> str:
    """A line such as "step  120/600  loss 2.134  bpb 3.080  41.2k tok/s  mfu 12.3%  eta 2m10s  grad 0.71".

    Scalars that are absent or None are left out. Without an MFU, the model's FLOP/s; skipped steps only if there are.
    """
    has = {name: x for name, x in scalars.items() if x is not None}
    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
    parts += [] if split == "train" else [split]
    shown = {
        "loss": lambda x: f"loss {x:.3f}",
        "bits_per_byte": lambda x: f"bpb {x:.3f}",
        "tokens_per_s": lambda x: f"{format_si(x)} tok/s",
        "mfu": lambda x: f"mfu {100 * x:.1f}%",
        "flops_per_s": lambda x: "" if "mfu" in has else f"{format_si(x, ' ')}FLOP/s",
        "eta_s": lambda x: f"eta {format_duration(x)}",
        "grad_norm": lambda x: f"grad {x:.2f}",
        "skipped_steps": lambda x: f"skipped {x:.0f}" if x else "",
    }
    parts += [show(has[name]) for name, show in shown.items() if name in has]
    return "  ".join(p for p in parts if p)


def format_si(x: float, space: str = "") -> str:
    """Three significant digits and a prefix: 41234 -> "41.2k"; with space " ", 1.2e11 -> "120 G"."""
    if not math.isfinite(x):
        return f"{x}{space}"
    mantissa, exponent = f"{x:.2e}".split("e")
    power = min(max(int(exponent) // 3, 0), 5)
    tens = int(exponent) - 3 * power
    return f"{float(mantissa) * 10.0**tens:.{min(max(2 - tens, 0), 2)}f}{space}{['', *'kMGTP'][power]}"


def format_duration(seconds: float) -> str:
    """The two largest units: 45s, 2m10s, 3h05m, 2d04h."""
    if not math.isfinite(seconds):
        return "?"
    s = round(max(seconds, 0.0))
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02}m"
    return f"{s // 86400}d{s % 86400 // 3600:02}h"
