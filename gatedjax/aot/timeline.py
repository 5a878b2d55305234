"""When a replayed program's DMAs arrive: a core's clock and the chip's HBM channel.

The model is a first-in first-out channel of the chip's public bandwidth, with a fixed latency.
"""

import collections
import math

from gatedjax.aot.targets import Tpu
from gatedjax.aot.values import UNKNOWN, Value, signed, unsigned

# Between on-chip memories; a guess that no time depended on.
LOCAL_DMA_CYCLES = 100
LOCAL_DMA_BYTES_PER_CYCLE = 512


class Timeline:
    """A core's clock, its DMAs in flight, and the chip's HBM channel.

    Args:
      chip: whose bandwidth and latency.
      hbm_fraction: of the channel that this core has, where cores share it.
    """

    def __init__(self, chip: Tpu, hbm_fraction: float = 1.0):
        self.chip = chip
        self.time = 0
        self.stall = 0
        self.hbm_bytes = 0
        self.unknown = collections.Counter()
        self._hbm_free = 0.0  # when the channel has moved all that was asked of it
        bytes_per_cycle = chip.hbm_bytes_per_second / chip.clock_hz
        self._bytes_per_cycle = bytes_per_cycle * hbm_fraction
        # Semaphore -> [time done, size units] of each DMA that will raise it.
        self._in_flight: dict[Value, list[list]] = collections.defaultdict(list)

    def start(
        self,
        kind: str,
        now: int,
        size: Value,
        semaphore: Value,
        predicate: Value,
    ) -> None:
        """Issues a DMA.

        Args:
          kind: the two memories, such as "hbm_to_vmem", or "general".
          now: in cycles.
          size: in units of `chip.dma_granule` bytes.
          semaphore: which the DMA raises by its size.
          predicate: nothing is issued where it is False.
        """
        if predicate is False:
            return
        if predicate is UNKNOWN or type(size) is not int:
            self.unknown["DMA"] += 1
        units = unsigned(size) if type(size) is int else 0
        moved = units * self.chip.dma_granule
        if "hbm" in kind or kind == "general":
            self.hbm_bytes += moved
            self._hbm_free = max(self._hbm_free, now) + moved / self._bytes_per_cycle
            done = self._hbm_free + self.chip.hbm_latency_cycles
        else:
            done = now + LOCAL_DMA_CYCLES + moved / LOCAL_DMA_BYTES_PER_CYCLE
        self._in_flight[semaphore].append([done, units])

    def wait(self, now: int, semaphore: Value, size: Value, predicate: Value) -> int:
        """The time at which `size` units have arrived at `semaphore`.

        Args:
          now: in cycles.
          semaphore: which the awaited DMAs raise.
          size: in units of `chip.dma_granule` bytes.
          predicate: nothing is waited for unless it is True.

        Returns:
          `now`, if everything is there already.
        """
        if predicate is UNKNOWN:
            self.unknown["wait"] += 1
        queue = self._in_flight.get(semaphore)
        if predicate is not True or not queue or type(size) is not int:
            return now
        missing = unsigned(size)
        ready = now
        queue.sort()
        for done, units in queue:
            ready = max(ready, done)
            missing -= units
            if missing <= 0:
                break
        ready = math.ceil(ready)
        self.stall += ready - now
        return ready

    def take(self, semaphore: Value, change: Value, predicate: Value) -> None:
        """A waiter lowers the semaphore: what it waited for is no longer in flight."""
        queue = self._in_flight.get(semaphore)
        if predicate is not True or not queue or type(change) is not int:
            return
        lowered_by = signed(change)
        assert isinstance(lowered_by, int)
        taken = max(0, -lowered_by)
        while queue and taken > 0:
            first = queue[0]
            if first[1] > taken:
                first[1] -= taken
                return
            taken -= first[1]
            queue.pop(0)
