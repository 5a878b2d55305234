"""Speed of a run, and the time that is left."""

import contextlib
import time
from collections.abc import Callable, Iterator


class Throughput:
    """Speed between readings, and time left.

    Read it after the step's numbers have arrived on the host: before, the device may still be
    computing. The first reading only starts the clock, so compilation is not counted; time spent
    `paused` is not part of the speed.

    Args:
      tokens_per_step: of the whole batch, over all devices.
      flops_per_token: of the model, forward and backward (`flops.train_flops_per_token`).
      peak_flops: FLOP/s of all devices together (`aot.targets.peak_flops`), None if not known.
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
        """tokens_per_s, flops_per_s, mfu since the last reading; eta_s from the mean since the
        first, with pauses.
        """
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
        return {
            "tokens_per_s": tokens_per_s,
            "flops_per_s": flops_per_s,
            "mfu": mfu,
            "eta_s": eta_s,
        }

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around evaluation, sampling and the like."""
        start = self._clock()
        try:
            yield
        finally:
            self._pauses += self._clock() - start
