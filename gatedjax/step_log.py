"""What the loop reports of each step, and when it gives up: between `train_step`'s metrics and the writers."""

import contextlib
import math

from gatedjax.errors import TrainingError
from gatedjax.evaluate import Evaluation, tokens_per_byte
from gatedjax.flops import peak_flops, train_flops_per_token
from gatedjax.metrics import Throughput, Writers, say
from gatedjax.optim import make_schedule
from gatedjax.probe_pictures import images
from gatedjax.probes import Probes
from gatedjax.setup import Run
from kernels_pallas import dispatch


class StepLog:
    """Turns device metrics into records: adds the learning rate, bits per byte and speed. One per run of the loop."""

    def __init__(self, run: Run, writers: Writers):
        c = run.config
        self._config, self._writers = c, writers
        self._schedule = make_schedule(c.optim, c.train.steps)
        self._bits = tokens_per_byte(c.data) / math.log(2)
        tokens = c.train.batch_size * c.data.seq_len
        flops = train_flops_per_token(c.model, c.data.seq_len)
        self._throughput = Throughput(tokens, flops, peak_flops(), c.train.steps)
        self._previous: dict | None = None

    def train(self, step: int, metrics: dict, write: bool) -> None:
        """After each step; writes a record if `write`.

        Raises:
          TrainingError: more than `max_skips` steps in a row were skipped.
        """
        if self._previous is None:
            for op, implementation, reason in dispatch.choices():
                say(f"{op}: {implementation} ({reason})")
        else:
            # Looking at the step before the one just dispatched never makes the device wait.
            self._give_up_if_stuck(step - 1, self._previous)
        self._previous = metrics
        if write:
            self._give_up_if_stuck(step, metrics)
            skipped = int(metrics["skipped_steps"])
            loss = float(metrics["loss"])
            derived = {"bits_per_byte": loss * self._bits, "lr": float(self._schedule(step - 1 - skipped))}
            self._writers.write(step, metrics | derived | self._throughput.read(step))

    def validation(self, step: int, result: Evaluation) -> None:
        """After an evaluation."""
        record = {"loss": result.loss, "bits_per_byte": result.bits_per_byte, "loss_error": result.loss_error}
        self._writers.write(step, record, "validation")

    def probes(self, step: int, probes: Probes) -> None:
        """As pictures in TensorBoard."""
        self._writers.pictures(step, images(probes))

    def paused(self) -> contextlib.AbstractContextManager:
        """Around what is not training: it does not count against tokens per second."""
        return self._throughput.paused()

    def _give_up_if_stuck(self, step: int, metrics: dict) -> None:
        in_a_row, limit = int(metrics["skipped_in_a_row"]), self._config.optim.max_skips
        if in_a_row > limit:
            norm = float(metrics["grad_norm"])
            raise TrainingError(
                f"step {step}: {in_a_row} steps in a row were skipped (config.optim.max_skips = {limit}), "
                f"loss {float(metrics['loss']):.4g}, gradient norm {norm:.4g}; the last checkpoint is intact"
            )
