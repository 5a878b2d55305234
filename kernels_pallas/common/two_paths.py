"""The derivative of a scan with two paths: kernels, and a careful one for what is not finite.

Kernels multiply whole chunks, in which NaN and Inf of a token would reach tokens that do not see
it. They say whether there was any; then the careful path computes the call again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool

from kernels_pallas.common.derivative import once
from kernels_pallas.common.finite import if_bad


class Scanned(NamedTuple):
    """What the kernels leave on the way forward.

    Attributes:
      o: the output.
      final_state: None where it is not asked for.
      saved: what the way back needs of this one, arrays by a backend's own names.
      is_bad: whether something is not finite.
    """

    o: Array
    final_state: Array | None
    saved: Any
    is_bad: Bool[Array, ""]


class Paths(NamedTuple):
    """The four computations. `plan` is static; `inputs` and their cotangents are trees of arrays.

    Attributes:
      forward: (plan, inputs, save) -> `Scanned`, by the kernels.
      backward: (plan, inputs, saved, cotangents) -> (gradients, whether one is not finite).
      careful_forward: (plan, inputs) -> (o, final state).
      careful_backward: (plan, inputs, cotangents) -> gradients.
    """

    forward: Callable[[Any, Any, bool], Scanned]
    backward: Callable[[Any, Any, Any, Any], tuple[Any, Bool[Array, ""]]]
    careful_forward: Callable[[Any, Any], tuple[Array, Array | None]]
    careful_backward: Callable[[Any, Any, Any], Any]


def with_careful_path(
    op: str,
    paths: Paths,
    out_name: str,
    saved_name: str,
) -> Callable[[Any, Any], tuple[Array, Array | None]]:
    """(plan, inputs) -> (o, final state), with a derivative.

    Args:
      op: the name in the message that there is no second derivative.
      paths: what computes.
      out_name: of the output, for policies of `jax.checkpoint`.
      saved_name: of what is saved beside it.

    Returns:
      The function; its first argument is static, and hashable.
    """

    def checked(plan: Any, inputs: Any, save: bool) -> Scanned:
        def run(inputs: Any) -> Scanned:
            return paths.forward(plan, inputs, save)

        made = once(op, run, inputs)
        outputs = if_bad(
            made.is_bad,
            partial(once, op, partial(paths.careful_forward, plan)),
            (made.o, made.final_state),
            inputs,
        )
        return made._replace(o=outputs[0], final_state=outputs[1])

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def scan(plan: Any, inputs: Any) -> tuple[Array, Array | None]:
        made = checked(plan, inputs, save=False)
        return made.o, made.final_state

    def forward(plan: Any, inputs: Any):
        made = checked(plan, inputs, save=True)
        # The name also of the flag, or it alone would have the kernels run again.
        saved = checkpoint_name((made.saved, made.is_bad), saved_name)
        return (checkpoint_name(made.o, out_name), made.final_state), (inputs, *saved)

    def backward(plan: Any, residuals: Any, cotangents: Any) -> tuple[Any]:
        inputs, saved, was_bad = residuals
        run = partial(paths.backward, plan)
        gradients, is_bad = once(op, run, inputs, saved, cotangents)
        carefully = partial(once, op, partial(paths.careful_backward, plan))
        # What was not finite on the way forward is not counted again on the way back.
        return (if_bad(was_bad | is_bad, carefully, gradients, inputs, cotangents),)

    scan.defvjp(forward, backward)
    return scan
