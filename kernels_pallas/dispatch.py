"""Which implementation of an op runs, and why.

An op's `api.py` asks its kernel backends (`tpu/op.py`, `gpu/op.py`) whether they cover the call,
and passes the answers to `choose`. None picks the best for the device that the call is compiled
for, as far as that is known while it is traced (`jax.export` for another platform does not tell:
`lowering_for` does); a named implementation runs or raises. What was chosen is kept per op, for the
training log and for a person at a prompt: `last_choice("attention")`.
"""

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from kernels_pallas.common.device import lowering_for as lowering_for
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
    # The kernels that would take the call on their platforms, where it has none.
    instead: tuple[str, ...] = ()


_choices: dict[str, Choice] = {}


def choose(
    op: str,
    implementation: Implementation | None,
    refusals: Mapping[str, str | None],
    arrays: Iterable[Array | None] = (),
) -> Implementation:
    """Returns the implementation that runs, and records it.

    Args:
      op: the op's public name.
      implementation: None for the best available, or one of `IMPLEMENTATIONS`.
      refusals: for each kernel backend, why it cannot take this call, or None when it can.
        "reference" and "xla" take every call and need no entry.
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
        # The two plain ones take every call, unless an op says otherwise.
        always = implementation in ("reference", "xla")
        refusal = refusals.get(implementation, None if always else "is not one of this op's")
        if refusal is not None:
            raise NotImplementedError(f"{op}: implementation={implementation!r} {refusal}")
        choice = Choice(op, implementation, "asked for by name")
    _choices[op] = choice
    return choice.implementation


def _best(op: str, refusals: Mapping[str, str | None], platform: str) -> Choice:
    """The kernel of the platform that the call is compiled for, or "xla" where there is none."""
    kernel = _KERNEL_OF_PLATFORM.get(platform)
    if kernel is None:
        instead = tuple(name for name in ("tpu", "gpu") if refusals[name] is None)
        return Choice(op, "xla", f"no kernel for platform {platform!r}", instead)
    refusal = refusals[kernel]
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
    has a kernel for the call.

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
    is_kernel = implementation in ("tpu", "gpu") and not interpret
    if not is_kernel and not _choices[op].instead:
        return inputs
    first = _checked_when_lowered(_choices[op], inputs[0])
    others = inputs[1:]
    if hasattr(inputs, "_make"):
        return inputs._make((first, *others))
    return (first, *others)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _checked_when_lowered(choice: Choice, x: Array) -> Array:
    return _lowered.bind(x, choice=choice)


@_checked_when_lowered.defjvp
def _derivative(choice: Choice, primals: tuple, tangents: tuple):
    return _checked_when_lowered(choice, *primals), tangents[0]


# The identity.
_lowered = Primitive("lowered_for_its_platform")
_lowered.def_abstract_eval(lambda x, **_: x)
batching.defvectorized(_lowered)


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
        if choice.implementation != "xla" and kernel != choice.implementation:
            raise NotImplementedError(
                f"{op}: implementation={choice.implementation!r} is not there on platform "
                f"{platform!r}; interpret=True runs it anywhere"
            )
        if kernel in choice.instead:
            warnings.warn(
                f"{op}: traced for another platform and now lowered for {platform!r}, it takes the "
                f"xla path; pass implementation={kernel!r}, or trace it inside "
                f"kernels_pallas.dispatch.lowering_for({platform!r})",
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
