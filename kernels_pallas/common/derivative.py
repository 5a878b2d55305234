"""Derivatives of kernels that have none of their own."""

from collections.abc import Callable
from typing import Any

import jax


def differentiated_as(fn: Callable, twin: Callable) -> Callable:
    """`fn`, with the derivative of `twin`, which computes the same."""

    @jax.custom_vjp
    def run(*args: Any) -> Any:
        return fn(*args)

    def forward(*args: Any):
        return fn(*args), args

    def backward(args: Any, cotangents: Any):
        _, vjp = jax.vjp(twin, *args)
        return vjp(cotangents)

    run.defvjp(forward, backward)
    return run


def once(op: str, fn: Callable, *args: Any) -> Any:
    """`fn(*args)`, a kernel of a derivative, which has none itself.

    Raises:
      NotImplementedError: a second derivative is asked for.
    """

    @jax.custom_jvp
    def run(*args: Any) -> Any:
        return fn(*args)

    @run.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            f"{op}: this kernel has no second derivative; implementation='xla' has one"
        )

    return run(*args)
