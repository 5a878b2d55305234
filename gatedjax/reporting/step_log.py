"""What the training loop reports of each step, and when it gives up.

It is between `train_step`'s metrics and the writers.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping

import jax
from jax import Array

from gatedjax.aot.targets import peak_flops
from gatedjax.errors import ExplodedError
from gatedjax.evaluation.encoder import EncoderEvaluation
from gatedjax.evaluation.probes import Probes
from gatedjax.evaluation.validation import Evaluation, tokens_per_byte
from gatedjax.reporting import console
from gatedjax.reporting.console import say
from gatedjax.reporting.probe_pictures import images
from gatedjax.reporting.throughput import Throughput
from gatedjax.reporting.writers import Writers
from gatedjax.runtime import cli
from gatedjax.runtime.watchdog import Watchdog
from gatedjax.training.optim import make_schedule
from gatedjax.training.run import Run, flops_per_token
from kernels_pallas import dispatch
from kernels_pallas.common import ptxas

Metrics = Mapping[str, Array]  # of a train step, on the device


class StepLog:
    """Turns device metrics into records.

    Adds the learning rate, bits per byte, speed and what the run waited for. One per run of the
    loop, which it tells the watchdog about.
    """

    def __init__(self, run: Run, writers: Writers, watchdog: Watchdog):
        config = run.config
        self._max_skips = config.optim.max_skips
        self._total_steps = config.train.steps
        self._writers = writers
        self._watchdog = watchdog
        self._schedule = make_schedule(config.optim, config.train.steps)
        device_peak = peak_flops(jax.devices()[0].device_kind)
        peak = None if device_peak is None else device_peak * jax.device_count()
        # From nats per token to bits per byte. An encoder predicts no text.
        self._bits_per_nat = None
        if config.model.task == "lm":
            self._bits_per_nat = tokens_per_byte(config.data) / math.log(2)
        self._throughput = Throughput(
            tokens_per_step=config.train.batch_size * config.data.seq_len,
            flops_per_token=flops_per_token(run),
            peak_flops=peak,
            total_steps=config.train.steps,
        )
        self._previous: Metrics | None = None
        self._last_examined = 0  # step
        # Since the last record: steps, and seconds that they waited.
        self._steps = 0
        self._data_wait = 0.0
        self._saving = 0.0

    def train(self, step: int, metrics: Metrics, write: bool) -> None:
        """After each step; writes a record if `write`.

        Raises:
          ExplodedError: more than `max_skips` steps in a row were skipped.
        """
        self._steps += 1
        is_first = self._previous is None
        if self._previous is None:
            chosen = dispatch.choices()
            for choice in chosen:
                say(f"{choice.op}: {choice.implementation} ({choice.reason})")
            if any(choice.implementation == "gpu" for choice in chosen):
                _, assembler = ptxas.remark()
                say(assembler)
        else:
            # The step before the one just dispatched: its numbers never make the device wait.
            self._examine(step - 1, self._previous)
            if console.is_live():
                self._show(step - 1, self._previous)
        self._previous = metrics
        if write:
            self._examine(step, metrics)
            self._write(step, metrics, is_first)

    def _show(self, step: int, metrics: Metrics) -> None:
        """On the live bar."""
        loss = float(metrics["loss"])
        scalars = {"loss": loss, **self._of_task(loss, metrics), **self._throughput.look(step)}
        console.show_step(step, self._total_steps, scalars)

    def _write(self, step: int, metrics: Metrics, is_first: bool) -> None:
        # A skipped step does not count for the schedule.
        schedule_step = step - 1 - int(metrics["skipped_steps"])
        derived = {
            **self._of_task(float(metrics["loss"]), metrics),
            "lr": float(self._schedule(schedule_step)),  # pyrefly: ignore  (optax: any number)
        }
        if is_first:
            seconds = time.monotonic() - cli.STARTED
            derived["first_step_s"] = seconds
            say(f"first step done {seconds:.1f} s after the start")
        # The loss has been read: the device is done with this step, and its speed can be.
        speed = self._throughput.read(step)
        self._writers.write(step, {**metrics, **derived, **self._waits(), **speed})

    def _of_task(self, loss: float, metrics: Metrics) -> dict[str, float]:
        """The figure of the model's task: bits per byte, or accuracy."""
        if self._bits_per_nat is not None:
            return {"bits_per_byte": loss * self._bits_per_nat}
        if "accuracy" in metrics:
            return {"accuracy": float(metrics["accuracy"])}
        return {}

    def _waits(self) -> dict[str, float | None]:
        """What the run waited for since the last record; None where it did not."""
        waits = {
            "data_wait_s": self._data_wait / self._steps,
            "checkpoint_s": self._saving or None,
            "stalls": self._watchdog.stalls or None,
        }
        self._steps = 0
        self._data_wait = 0.0
        self._saving = 0.0
        return waits

    @contextlib.contextmanager
    def reading(self, step: int) -> Iterator[None]:
        """Around the wait for a batch."""
        self._watchdog.beat(f"step {step}")
        start = time.perf_counter()
        yield
        self._data_wait += time.perf_counter() - start
        if self._previous is None:
            console.doing("compiling the step")

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Around a checkpoint: it does not count against tokens per second."""
        self._watchdog.beat(f"checkpoint of step {step}")
        console.doing(f"saving step {step}")
        start = time.perf_counter()
        with self._throughput.paused():
            yield
        self._saving += time.perf_counter() - start

    def evaluating(self, step: int) -> contextlib.AbstractContextManager[None]:
        """Around an evaluation: it does not count against tokens per second."""
        self._watchdog.beat(f"evaluation after step {step}")
        console.doing(f"evaluating after step {step}")
        return self._throughput.paused()

    def validation(self, step: int, result: Evaluation | EncoderEvaluation) -> None:
        """After an evaluation."""
        record = {"loss": result.loss}
        if isinstance(result, EncoderEvaluation):
            record["accuracy"] = result.accuracy
            record["accuracy_error"] = result.accuracy_error
        else:
            record["bits_per_byte"] = result.bits_per_byte
        record["loss_error"] = result.loss_error
        self._writers.write(step, record, "validation")

    def probes(self, step: int, probes: Probes) -> None:
        """As pictures in TensorBoard."""
        self._writers.pictures(step, images(probes))

    def _examine(self, step: int, metrics: Metrics) -> None:
        """Reports a skipped step, once; gives up after too many in a row."""
        in_a_row = int(metrics["skipped_in_a_row"])
        if in_a_row == 0 or step == self._last_examined:
            return
        self._last_examined = step
        loss = float(metrics["loss"])
        grad_norm = float(metrics["grad_norm"])
        numbers = f"loss {loss:.4g}, gradient norm {grad_norm:.4g}"
        skipped = int(metrics["skipped_steps"])
        say(f"step {step}: skipped, {numbers} ({skipped} skipped in all)")
        if in_a_row > self._max_skips:
            raise ExplodedError(
                f"step {step}: {in_a_row} steps in a row were skipped "
                f"(config.optim.max_skips = {self._max_skips}), {numbers}"
            )
