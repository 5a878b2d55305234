"""Which checkpoints stay: the newest ones, and the newest sound one.

A run that explodes goes on saving until the guard against bad steps gives up, and soon all the
newest checkpoints are of the broken stretch. A checkpoint is sound if no step was being skipped
when it was saved and the loss was not far above the lowest that a sound one had.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

# Nats per token above the lowest loss of a sound checkpoint. Another text may cost as much: then
# one checkpoint more stays, and nothing else comes of it.
_EXPLODED = 1.0


class HasStep(Protocol):
    """What orbax says of a checkpoint on disk."""

    step: int


class NewestAndSound:
    """orbax's `PreservationPolicy`: the `keep` newest steps and the newest sound one."""

    def __init__(self, keep: int):
        self._keep = keep
        self._sound: set[int] = set()
        self._lowest = math.inf

    def judge(self, loss: float | None, skipped_in_a_row: int) -> bool:
        """Whether a checkpoint with this loss is sound; one without a loss is."""
        if skipped_in_a_row > 0:
            return False
        if loss is None:
            return True
        # Not `loss > ...`: NaN is not sound.
        return loss <= self._lowest + _EXPLODED

    def note(self, step: int, loss: float | None, is_sound: bool) -> None:
        """Tells of a step that is on disk, or about to be."""
        self._sound.discard(step)
        if not is_sound:
            return
        self._sound.add(step)
        if loss is not None:
            self._lowest = min(self._lowest, loss)

    def newest_sound(self, steps: Sequence[int]) -> int | None:
        """Of these steps."""
        sound = self._sound.intersection(steps)
        return max(sound, default=None)

    def should_preserve(
        self,
        checkpoints: Sequence[HasStep],
        *,
        context: Any,
    ) -> Sequence[bool]:
        """For each checkpoint, oldest first, whether it stays."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(sorted(steps)[-self._keep :])
        sound = self.newest_sound(steps)
        if sound is not None:
            kept.add(sound)
        return [step in kept for step in steps]
