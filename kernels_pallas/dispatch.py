"""Which implementation of an op runs, and why.

An op's `api.py` asks its kernel rooms (`tpu.py`, `gpu.py`) whether they cover the call, and hands the answers to
`choose`. None picks the best for the device that the call is compiled for; a named implementation runs or raises.
What was chosen is kept per op, for the training log and for a person at a prompt: `last_choice("attention")`.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from kernels_pallas.common.device import target_platform

IMPLEMENTATIONS = ("reference", "xla", "tpu", "gpu")
_KERNEL_OF_PLATFORM = {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu", "rocm": "gpu"}


class Choice(NamedTuple):
    """What one call of an op was compiled to. Recorded when the call is traced, not each time it runs."""

    op: str
    implementation: str
    reason: str


_choices: dict[str, Choice] = {}


def choose(op: str, implementation: str | None, refusals: Mapping[str, str | None]) -> str:
    """Returns the implementation that runs, and records it.

    Args:
      op: the op's public name.
      implementation: None for the best available, or one of `IMPLEMENTATIONS`.
      refusals: for each kernel room, why it cannot take this call, or None when it can. "reference" and "xla" take
        every call and need no entry.

    Raises:
      ValueError: `implementation` is not a known name.
      NotImplementedError: a named kernel does not cover this call.
    """
    if implementation is None:
        implementation, reason = _best(refusals)
    elif implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{op}: implementation: got {implementation!r}, expected None or one of {IMPLEMENTATIONS}"
        )
    else:
        reason = "asked for by name"
        if (refusal := refusals.get(implementation)) is not None:
            raise NotImplementedError(f"{op}: implementation={implementation!r} {refusal}")
    _choices[op] = Choice(op, implementation, reason)
    return implementation


def _best(refusals: Mapping[str, str | None]) -> tuple[str, str]:
    platform = target_platform()
    kernel = _KERNEL_OF_PLATFORM.get(platform)
    if kernel is None:
        return "xla", f"no kernel room for platform {platform!r}"
    refusal = refusals[kernel]
    if refusal is None:
        return kernel, f"kernel for platform {platform!r}"
    return "xla", f"the {kernel} kernel {refusal}"


def last_choice(op: str) -> Choice | None:
    """What the most recently traced call of `op` was compiled to; None if it was never traced in this process."""
    return _choices.get(op)


def choices() -> tuple[Choice, ...]:
    """The last choice of every op traced so far, by op name."""
    return tuple(_choices[op] for op in sorted(_choices))


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Calls traced inside leave no record: of a model whose parameters are only being made, no op will run so."""
    before = dict(_choices)
    try:
        yield
    finally:
        _choices.clear()
        _choices.update(before)
