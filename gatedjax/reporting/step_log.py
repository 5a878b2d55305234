"""What the loop reports of each step, and when it gives up: between `train_step`'s metrics and the
writers.
"""

import contextlib
import math
import time
from collections.abc import Iterator

import jax

from gatedjax.aot.targets import peak_flops
from gatedjax.errors import TrainingError
from gatedjax.evaluation.probes import Probes
from gatedjax.evaluation.validation import Evaluation, tokens_per_byte
from gatedjax.reporting.console import say
from gatedjax.reporting.probe_pictures import images
from gatedjax.reporting.throughput import Throughput
from gatedjax.reporting.writers import Writers
from gatedjax.runtime import cli
from gatedjax.runtime.watchdog import Watchdog
from gatedjax.training.flops import train_flops_per_token
from gatedjax.training.optim import make_schedule
from gatedjax.training.run import Run
from kernels_pallas import dispatch


class StepLog:
    """Turns device metrics into records: adds the learning rate, bits per byte, speed and what the
    run waited for.

    One per run of the loop, which it tells the watchdog about.
    """

    def __init__(self, run: Run, writers: Writers, watchdog: Watchdog):
        c = run.config
        self._config, self._writers = c, writers
        self._schedule = make_schedule(c.optim, c.train.steps)
        self._bits = tokens_per_byte(c.data) / math.log(2)
        tokens = c.train.batch_size * c.data.seq_len
        flops = train_flops_per_token(c.model, c.data.seq_len)
        device_peak = peak_flops(jax.devices()[0].device_kind)
        peak = None if device_peak is None else device_peak * jax.device_count()
        self._throughput = Throughput(tokens, flops, peak, c.train.steps)
        self._previous: dict | None = None
        self._watchdog, self._looked_at = watchdog, 0
        self._steps, self._data_wait, self._saving = 0, 0.0, 0.0  # since the last record

    def train(self, step: int, metrics: dict, write: bool) -> None:
        """After each step; writes a record if `write`.

        Raises:
          TrainingError: more than `max_skips` steps in a row were skipped.
        """
        self._steps += 1
        if self._previous is None:
            for op, implementation, reason in dispatch.choices():
                say(f"{op}: {implementation} ({reason})")
        else:
            # Looking at the step before the one just dispatched never makes the device wait.
            self._look_at(step - 1, self._previous)
        first, self._previous = self._previous is None, metrics
        if write:
            self._look_at(step, metrics)
            skipped = int(metrics["skipped_steps"])
            loss = float(metrics["loss"])
            derived = {
                "bits_per_byte": loss * self._bits,
                "lr": float(self._schedule(step - 1 - skipped)),
            }
            if first:
                derived["first_step_s"] = time.monotonic() - cli.STARTED
                say(f"first step done {derived['first_step_s']:.1f} s after the start")
            self._writers.write(
                step, metrics | derived | self._waits() | self._throughput.read(step)
            )

    def _waits(self) -> dict[str, float | None]:
        waits = {
            "data_wait_s": self._data_wait / self._steps,
            "checkpoint_s": self._saving or None,
            "stalls": self._watchdog.stalls or None,
        }
        self._steps, self._data_wait, self._saving = 0, 0.0, 0.0
        return waits

    @contextlib.contextmanager
    def reading(self, step: int) -> Iterator[None]:
        """Around the wait for a batch."""
        self._watchdog.beat(f"step {step}")
        start = time.perf_counter()
        yield
        self._data_wait += time.perf_counter() - start

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Around a checkpoint: it does not count against tokens per second."""
        self._watchdog.beat(f"checkpoint of step {step}")
        start = time.perf_counter()
        with self._throughput.paused():
            yield
        self._saving += time.perf_counter() - start

    def validation(self, step: int, result: Evaluation) -> None:
        """After an evaluation."""
        record = {
            "loss": result.loss,
            "bits_per_byte": result.bits_per_byte,
            "loss_error": result.loss_error,
        }
        self._writers.write(step, record, "validation")

    def probes(self, step: int, probes: Probes) -> None:
        """As pictures in TensorBoard."""
        self._writers.pictures(step, images(probes))

    def evaluating(self, step: int) -> contextlib.AbstractContextManager:
        """Around an evaluation: it does not count against tokens per second."""
        self._watchdog.beat(f"evaluation after step {step}")
        return self._throughput.paused()

    def _look_at(self, step: int, metrics: dict) -> None:
        """Says of a skipped step that it was, once; gives up after too many in a row."""
        in_a_row, limit = int(metrics["skipped_in_a_row"]), self._config.optim.max_skips
        if step == self._looked_at or not in_a_row:
            return
        self._looked_at = step
        what = f"loss {float(metrics['loss']):.4g}, gradient norm {float(metrics['grad_norm']):.4g}"
        say(f"step {step}: skipped, {what} ({int(metrics['skipped_steps'])} skipped in all)")
        if in_a_row > limit:
            raise TrainingError(
                f"step {step}: {in_a_row} steps in a row were skipped (config.optim.max_skips = {limit}), {what}; "
                "the last checkpoint is intact"
            )
