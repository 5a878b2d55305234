"""What a run says of itself: one `write(step, scalars)` to the console, to TensorBoard and to a
JSON line per record.

`metrics.jsonl` in the run directory is the complete record; TensorBoard's files lie beside it in
`tensorboard/`. The console knows these scalars, all others go to the two files only:

  loss             nats per token                        tokens_per_s   over all devices
  bits_per_byte    of text, whatever the tokenizer       flops_per_s    of the model, forward and backward
  grad_norm        before clipping                       mfu            flops_per_s over the devices' peak, 0 to 1
  skipped_steps    by the guard, since the start         eta_s          seconds to the last step
  lr               learning rate

The two files also have data_wait_s (host seconds a step waited for its batch, mean since the last
record), checkpoint_s (seconds that saves held up the loop since the last record), first_step_s
(from the start of the command to the end of the first step), stalls (times that the watchdog found
the run standing).

A scalar that is None is left out (`mfu` where the peak is not known). An array (`expert_load`) goes
to the JSON line only, as nested lists. Only process 0 writes.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from tensorboardX import SummaryWriter

from gatedjax.errors import InputError
from gatedjax.reporting.console import Console, Scalars

METRICS_FILE = "metrics.jsonl"


class Writer(Protocol):
    """One place that scalars go to."""

    def write(self, step: int, scalars: Scalars, split: str = "train") -> None: ...

    def close(self) -> None: ...


class Writers:
    """Several writers as one; a context manager that closes them. Empty on all processes but the
    first.
    """

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
    """Console, JSON lines and TensorBoard for a run. Records after `resume_step`, which will come
    again, are dropped.

    Raises:
      InputError: the run directory cannot be written to, or its metrics file is not one of ours.
    """
    if jax.process_index() != 0:
        return Writers([])
    run_dir = Path(run_dir)
    return Writers(
        [Console(total_steps), Jsonl(run_dir, resume_step), TensorBoard(run_dir, resume_step)]
    )


class Jsonl:
    """One JSON object per record: {"step": 120, "split": "train", "loss": 2.13, ...}. NaN and
    infinities are null.
    """

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
            raise InputError(
                f"{path}, line {number}: got {line[:60]!r}, expected a JSON object with a step"
            )
    return records


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
