"""What the GPU kernels of several ops share."""

from collections.abc import Iterable

from kernels_pallas.common.cost import moved as moved
from kernels_pallas.common.device import device_kind


def chip(names: Iterable[str], default: str) -> str:
    """The first of `names` that the target's device kind contains ("H200" in "NVIDIA H200").

    For tables of measured block sizes. A chip that has no line in the table gets `default`.
    """
    # The first, so a table lists "H200" before a shorter name that is part of it.
    kind = device_kind()
    for name in names:
        if name in kind:
            return name
    return default
