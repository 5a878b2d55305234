"""A run's records: one `write(step, scalars)` to the console, TensorBoard and a JSON line.

`metrics.jsonl` in the run directory is the complete record; TensorBoard's files lie beside it in
`tensorboard/`. The console knows these scalars, all others go to the two files only:

  loss             nats per token
  bits_per_byte    of text, whatever the tokenizer
  accuracy         of an encoder, in place of bits per byte: 0 to 1
  grad_norm        before clipping
  skipped_steps    by the guard, since the start
  lr               learning rate
  tokens_per_s     over all devices
  flops_per_s      of the model, forward and backward
  mfu              flops_per_s over the devices' peak, 0 to 1
  eta_s            seconds to the last step

Only the two files have these:

  data_wait_s      host seconds a step waited for its batch, mean since the last record
  checkpoint_s     seconds that saves held up the loop since the last record
  first_step_s     from the start of the command to the end of the first step
  stalls           times that the watchdog found the run stalled

A scalar that is None is left out (`mfu` where the peak is not known). An array (`expert_load`) goes
to the JSON line only, as nested lists. Only process 0 writes.
"""

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from tensorboardX import SummaryWriter

from gatedjax.errors import InputError
from gatedjax.paths import Place
from gatedjax.reporting.console import Console, Scalars
from gatedjax.reporting.trackers import TRACKERS, run_id_of

METRICS_FILE = "metrics.jsonl"


@runtime_checkable
class Writer(Protocol):
    """One place that scalars go to."""

    def write(self, step: int, scalars: Scalars, split: str = "train") -> None: ...

    def close(self) -> None: ...


class Writers:
    """Several writers as one; a context manager that closes them.

    Empty on all processes but the first.
    """

    def __init__(self, writers: Sequence[Writer]):
        self._writers = tuple(writers)

    def write(self, step: int, scalars: Scalars, split: str = "train") -> None:
        """Writes scalars of optimizer step `step`.

        Numbers on a device are fetched here, once, which waits for the step that computes them.

        Args:
          step: the optimizer step.
          scalars: name -> number, array, or None for one that is not known.
          split: "train", or "validation" and the like.
        """
        if not self._writers:
            return
        numbers: dict[str, float | np.ndarray] = {}
        for name, value in jax.device_get(dict(scalars)).items():
            if value is None:
                continue
            numbers[name] = np.asarray(value) if np.ndim(value) else float(value)
        for writer in self._writers:
            writer.write(step, numbers, split)

    def pictures(self, step: int, pictures: Iterable[tuple[str, np.ndarray]]) -> None:
        """Names and uint8 arrays [height, width, 3], to TensorBoard alone.

        Drawing takes time: a lazy `pictures` is not touched where there is no TensorBoard.
        """
        boards = [writer for writer in self._writers if isinstance(writer, TensorBoard)]
        if not boards:
            return
        for name, picture in pictures:
            for board in boards:
                board.picture(step, name, picture)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()

    def __enter__(self) -> "Writers":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def make_writers(
    run_dir: str | os.PathLike,
    total_steps: int,
    resume_step: int = 0,
    config: Mapping[str, Any] = MappingProxyType({}),
    trackers: Sequence[str] = (),
    place: Place | None = None,
) -> Writers:
    """Console, JSON lines and TensorBoard for a run, and the trackers that it names.

    Args:
      run_dir: where the files go; made if it does not exist.
      total_steps: the last step of the run.
      resume_step: the step that the run goes on from. Records after it will be written again, and
        are dropped.
      config: of the run, for TensorBoard and the trackers.
      trackers: names of `trackers.TRACKERS`.
      place: what the trackers know the run by, if not by `run_dir`.

    Returns:
      The writers; none on processes other than the first.

    Raises:
      InputError: a tracker is not known or not installed, the run directory cannot be written to,
        or its metrics file is not one of ours.
    """
    if jax.process_index() != 0:
        return Writers([])
    run_dir = Path(run_dir)
    for name in trackers:
        if name not in TRACKERS:
            raise InputError(f"--trackers: got {name!r}, expected some of {', '.join(TRACKERS)}")
    writers: list[Writer] = [
        Console(total_steps),
        Jsonl(run_dir, resume_step),
        TensorBoard(run_dir, resume_step, config),
    ]
    for name in trackers:
        writers.append(TRACKERS[name](run_dir, config, run_id_of(place or run_dir)))
    return Writers(writers)


class Jsonl:
    """One JSON object per record: {"step": 120, "split": "train", "loss": 2.13, ...}.

    NaN and infinities are null.
    """

    def __init__(self, run_dir: Path, resume_step: int = 0):
        self._path = run_dir / METRICS_FILE
        with self._naming_errors():
            run_dir.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                self._drop_after(resume_step)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (open for the run)

    def write(self, step: int, scalars: Scalars, split: str = "train") -> None:
        record = {"step": step, "split": split}
        for name, value in scalars.items():
            record[name] = _json_value(value)
        line = json.dumps(record, allow_nan=False)
        with self._naming_errors():
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        with self._naming_errors():
            self._file.close()

    def _drop_after(self, step: int) -> None:
        """Replaces the file by one without the records after `step`; a kill leaves one or other."""
        lines = []
        for record in read_records(self._path):
            if record["step"] <= step:
                lines.append(json.dumps(record) + "\n")
        new = self._path.with_suffix(".tmp")
        new.write_text("".join(lines), encoding="utf-8")
        os.replace(new, self._path)

    @contextlib.contextmanager
    def _naming_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise InputError(f"could not write {self._path}: {e.strerror}") from e


def _json_value(x: Any) -> Any:
    """A number, or nested lists of numbers to 5 significant digits; None where not finite."""
    if np.ndim(x):
        return [_json_value(row) for row in np.asarray(x)]
    if not math.isfinite(x):
        return None
    if isinstance(x, np.floating):
        # An entry of an array. Scalars are written in full.
        return float(f"{x:.5g}")
    return x


class TensorBoard:
    """Event files, with the configuration as a text.

    On resume, TensorBoard hides what was written after the restored step.
    """

    def __init__(
        self,
        run_dir: Path,
        resume_step: int = 0,
        config: Mapping[str, Any] = MappingProxyType({}),
    ):
        folder = run_dir / "tensorboard"
        # It warns of every number that is not finite; the step log says so once, in one line.
        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
        try:
            self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)
        except OSError as e:
            raise InputError(f"could not write {folder}: {e.strerror}") from e
        if config:
            # Markdown, which keeps lines that are indented as they are.
            lines = json.dumps(dict(config), indent=2).splitlines()
            indented = "\n".join(f"    {line}" for line in lines)
            self._writer.add_text("config", indented, resume_step)

    def write(self, step: int, scalars: Scalars, split: str = "train") -> None:
        for name, value in scalars.items():
            if np.ndim(value) == 0:
                self._writer.add_scalar(f"{split}/{name}", value, step)
        self._writer.flush()

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        self._writer.add_image(
            f"probes/{name}",
            picture,
            step,
            dataformats="HWC",
        )

    def close(self) -> None:
        self._writer.close()


def read_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a metrics file. A last line that a kill cut short is left out.

    Raises:
      InputError: no such file, or a line before the last that is not a record.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as e:
        raise InputError(f"could not read {path}: {e.strerror}") from e
    lines = text.splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise InputError(
                f"{path}, line {number}: got {line[:60]!r}, expected a JSON object with a step"
            )
    return records


def _parse(line: str) -> dict[str, Any] | None:
    """The record of a line, or None if it is not one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    return record
