"""Which implementation of an op runs, and why.

An op's `api.py` asks its kernel backends (`tpu/op.py`, `gpu/op.py`) whether they cover the call,
and passes the answers to `choose`. None picks the best for the device that the call is compiled
for; a named implementation runs or raises. What was chosen is kept per op, for the training log and
for a person at a prompt: `last_choice("attention")`.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, get_args

from kernels_pallas.common.device import target_platform

# What `implementation` of an op may be, beside None for the best one available. Every op has the
# first two; "cudnn" is one of attention's, and never chosen by itself.
Implementation = Literal["reference", "xla", "tpu", "gpu", "cudnn"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)

_KERNEL_OF_PLATFORM: dict[str, Implementation] = {
    "tpu": "tpu",
    "gpu": "gpu",
    "cuda": "gpu",
    "rocm": "gpu",
}


class Choice(NamedTuple):
    """What one call of an op was compiled to. Recorded when it is traced, not each time it runs."""

    op: str
    implementation: Implementation
    reason: str


_choices: dict[str, Choice] = {}


def choose(
    op: str,
    implementation: Implementation | None,
    refusals: Mapping[str, str | None],
) -> Implementation:
    """Returns the implementation that runs, and records it.

    Args:
      op: the op's public name.
      implementation: None for the best available, or one of `IMPLEMENTATIONS`.
      refusals: for each kernel backend, why it cannot take this call, or None when it can.
        "reference" and "xla" take every call and need no entry.

    Returns:
      One of `IMPLEMENTATIONS`.

    Raises:
      ValueError: `implementation` is not a known name.
      NotImplementedError: a named kernel does not cover this call.
    """
    if implementation is None:
        choice = _best(op, refusals)
    elif implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{op}: implementation: got {implementation!r}, "
            f"expected None or one of {IMPLEMENTATIONS}"
        )
    else:
        refusal = None
        if implementation not in ("reference", "xla"):
            refusal = refusals.get(implementation, "is not one of this op's")
        if refusal is not None:
            raise NotImplementedError(f"{op}: implementation={implementation!r} {refusal}")
        choice = Choice(op, implementation, "asked for by name")
    _choices[op] = choice
    return choice.implementation


def _best(op: str, refusals: Mapping[str, str | None]) -> Choice:
    """The kernel of the platform that the call is compiled for, or "xla" where there is none."""
    platform = target_platform()
    kernel = _KERNEL_OF_PLATFORM.get(platform)
    if kernel is None:
        return Choice(op, "xla", f"no kernel for platform {platform!r}")
    refusal = refusals[kernel]
    if refusal is not None:
        return Choice(op, "xla", f"the {kernel} kernel {refusal}")
    return Choice(op, kernel, f"kernel for platform {platform!r}")


def last_choice(op: str) -> Choice | None:
    """What the last traced call of `op` was compiled to; None if this process never traced one."""
    return _choices.get(op)


def choices() -> tuple[Choice, ...]:
    """The last choice of every op traced so far, by op name."""
    return tuple(_choices[op] for op in sorted(_choices))


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Calls traced inside leave no record.

    For traces that no op will run as, such as those of a model whose parameters are initialized.
    """
    before = dict(_choices)
    try:
        yield
    finally:
        _choices.clear()
        _choices.update(before)
