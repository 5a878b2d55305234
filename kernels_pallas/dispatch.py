"""Which implementation of an op runs, and why.

An op's `api.py` passes to `choose` how to ask its kernel backends (`tpu/op.py`, `gpu/op.py`)
whether they cover the call; one that cannot run is not asked. None picks the best for the device
that the call is compiled for, as far as that is known while it is traced (`jax.export` for another
platform does not tell: `lowering_for` does); a named implementation runs or raises. What was chosen
is kept per op, for the training log and for a person at a prompt: `last_choice("attention")`.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from kernels_pallas.common.device import lowering_for as lowering_for
from kernels_pallas.common.device import target_platform
from kernels_pallas.common.ptxas import announce

# What `implementation` of an op may be, beside None for the best one available. Every op has the
# first two; "cudnn" and "mosaic_gpu" are attention's, and never chosen by themselves.
Implementation = Literal["reference", "xla", "tpu", "gpu", "cudnn", "mosaic_gpu"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)

_KERNEL_OF_PLATFORM: dict[str, Implementation] = {
    "tpu": "tpu",
    "gpu": "gpu",
    "cuda": "gpu",
    "rocm": "gpu",
}
# Where a kernel can be lowered that is interpreted elsewhere.
_PLATFORMS_OF_KERNEL: dict[str, tuple[str, ...]] = {
    "tpu": ("tpu",),
    "gpu": ("gpu", "cuda", "rocm"),
    "mosaic_gpu": ("gpu", "cuda"),
}


class Choice(NamedTuple):
    """What one call of an op was compiled to. Recorded when it is traced, not each time it runs."""

    op: str
    implementation: Implementation
    reason: str
    # By default, and for a platform without kernels: on another one a kernel may take the call.
    lacks_kernels: bool = False


# Asked of a backend that may run, here or where the program is lowered later: it imports what it
# needs for that.
Refusal = Callable[[], str | None]

_choices: dict[str, Choice] = {}


def choose(
    op: str,
    implementation: Implementation | None,
    refusals: Mapping[str, Refusal],
    arrays: Iterable[Array | None] = (),
) -> Implementation:
    """Returns the implementation that runs, and records it.

    Args:
      op: the op's public name.
      implementation: None for the best available, or one of `IMPLEMENTATIONS`.
      refusals: for each kernel backend, a function that tells why it cannot take this call, or
        None when it can. "reference" and "xla" take every call and need no entry.
      arrays: of the call; outside of `jit` they tell the device that it runs on.

    Returns:
      One of `IMPLEMENTATIONS`.

    Raises:
      ValueError: `implementation` is not a known name.
      NotImplementedError: a named kernel does not cover this call.
    """
    if implementation is None:
        choice = _best(op, refusals, target_platform(*arrays))
    elif implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{op}: implementation: got {implementation!r}, "
            f"expected None or one of {IMPLEMENTATIONS}"
        )
    else:
        refusal = _refusal(implementation, refusals)
        if refusal is not None:
            raise NotImplementedError(f"{op}: implementation={implementation!r} {refusal}")
        choice = Choice(op, implementation, "asked for by name")
    _choices[op] = choice
    return choice.implementation


def _refusal(implementation: Implementation, refusals: Mapping[str, Refusal]) -> str | None:
    """Why a named implementation cannot take a call."""
    if implementation in refusals:
        return refusals[implementation]()
    # The two plain ones take every call, unless an op says otherwise.
    is_plain = implementation in ("reference", "xla")
    return None if is_plain else "is not one of this op's"


def _best(op: str, refusals: Mapping[str, Refusal], platform: str) -> Choice:
    """The kernel of the platform that the call is compiled for, or "xla" where there is none."""
    kernel = _KERNEL_OF_PLATFORM.get(platform)
    if kernel is None:
        return Choice(op, "xla", f"no kernel for platform {platform!r}", lacks_kernels=True)
    refusal = refusals[kernel]()
    if refusal is not None:
        return Choice(op, "xla", f"the {kernel} kernel {refusal}")
    return Choice(op, kernel, f"kernel for platform {platform!r}")


# --- what is lowered for another platform than it was chosen for


def for_its_platform(
    op: str,
    implementation: Implementation,
    interpret: bool,
    inputs: Any,
) -> Any:
    """`inputs`, which refuse to be lowered for a platform where the kernel is not.

    An xla path that was chosen for a platform without kernels warns when it is lowered for one that
    has some.

    Args:
      op: the op's public name.
      implementation: what runs.
      interpret: whether it runs anywhere.
      inputs: the arrays of the call, a named tuple or another; the first is no None.

    Returns:
      The same arrays.

    Raises:
      NotImplementedError: when they are lowered, which is when the platform is known.
    """
    is_kernel = implementation in _PLATFORMS_OF_KERNEL and not interpret
    if not is_kernel and not _choices[op].lacks_kernels:
        return inputs
    if is_kernel and implementation == "gpu":
        announce()
    first = _lowered.bind(inputs[0], choice=_choices[op])
    others = inputs[1:]
    if hasattr(inputs, "_make"):
        return inputs._make((first, *others))
    return (first, *others)


# The identity.
_lowered = Primitive("lowered_for_its_platform")
_lowered.def_abstract_eval(lambda x, **_: x)
batching.defvectorized(_lowered)


def _derivative(primals: tuple, tangents: tuple, *, choice: Choice) -> tuple:
    return _lowered.bind(*primals, choice=choice), tangents[0]


ad.primitive_jvps[_lowered] = _derivative


@_lowered.def_impl
def _run(x: Array, *, choice: Choice) -> Array:
    """Outside of `jit`, where the arrays told the platform to `choose`."""
    if choice.implementation == "xla":
        return x
    return jax.jit(partial(_lowered.bind, choice=choice))(x)


def _lower(ctx: mlir.LoweringRuleContext, x: Any, *, choice: Choice) -> list:
    op = choice.op
    for platform in ctx.module_context.platforms:
        kernel = _KERNEL_OF_PLATFORM.get(platform)
        platforms_of_it = _PLATFORMS_OF_KERNEL.get(choice.implementation)
        if platforms_of_it is not None and platform not in platforms_of_it:
            raise NotImplementedError(
                f"{op}: implementation={choice.implementation!r} is not there on platform "
                f"{platform!r}; interpret=True runs it anywhere"
            )
        if choice.lacks_kernels and kernel is not None:
            warnings.warn(
                f"{op}: traced for another platform and now lowered for {platform!r}, it takes the "
                f"xla path; trace it inside kernels_pallas.dispatch.lowering_for({platform!r}), or "
                f"pass implementation={kernel!r}",
                stacklevel=2,
            )
    return [x]


mlir.register_lowering(_lowered, _lower)


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
