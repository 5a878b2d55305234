"""Speed of a run, and the time that is left."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple


class _Reading(NamedTuple):
    """A step, and when its numbers were on the host."""

    step: int
    seconds: float


class Throughput:
    """Speed between readings, and time left.

    Read it after the step's numbers have arrived on the host: before, the device may still be
    computing. The first reading only starts the clock, so compilation is not counted; time spent
    `paused` is not part of the speed.
    """

    def __init__(
        self,
        tokens_per_step: float,
        flops_per_token: float,
        peak_flops: float | None,
        total_steps: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Starts without a reading.

        Args:
          tokens_per_step: of the whole batch, over all devices.
          flops_per_token: of the model, forward and backward (`flops.train_flops_per_token`).
          peak_flops: FLOP/s of all devices together (`aot.targets.peak_flops`), None if not known.
          total_steps: the last step of the run.
          clock: seconds.
        """
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._total_steps = total_steps
        self._clock = clock
        self._first: _Reading | None = None
        self._last: _Reading | None = None
        self._pauses = 0.0  # seconds since the last reading

    def grew(self, tokens_per_step: float) -> None:
        """From the next step on the batch is another one."""
        self._tokens_per_step = tokens_per_step

    def read(self, step: int) -> dict[str, float | None]:
        """tokens_per_s, flops_per_s and mfu since the last reading; eta_s.

        The time left goes by the mean since the first reading, with pauses. Empty at the first
        reading.
        """
        now = _Reading(step, self._clock())
        rates = self._rates(now)
        self._last = now
        self._pauses = 0.0
        if self._first is None:
            self._first = now
        return rates

    def look(self, step: int) -> dict[str, float | None]:
        """As `read`, but the next reading counts from where this one would have."""
        return self._rates(_Reading(step, self._clock()))

    def _rates(self, now: _Reading) -> dict[str, float | None]:
        first = self._first
        last = self._last
        step = now.step
        if first is None or last is None or step <= last.step:
            return {}

        seconds = max(now.seconds - last.seconds - self._pauses, 1e-9)
        tokens_per_s = (step - last.step) * self._tokens_per_step / seconds
        flops_per_s = tokens_per_s * self._flops_per_token
        mfu = flops_per_s / self._peak_flops if self._peak_flops else None
        seconds_per_step = (now.seconds - first.seconds) / (step - first.step)
        steps_left = max(self._total_steps - step, 0)
        return {
            "tokens_per_s": tokens_per_s,
            "flops_per_s": flops_per_s,
            "mfu": mfu,
            "eta_s": seconds_per_step * steps_left,
        }

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around evaluation, sampling and the like."""
        start = self._clock()
        try:
            yield
        finally:
            self._pauses += self._clock() - start
