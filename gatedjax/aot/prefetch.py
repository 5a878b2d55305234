"""Values that steer a kernel's control flow: its scalar-prefetch operands and dynamic grid
bounds.
"""

from collections.abc import Mapping

import jax
import numpy as np
from jax.extend import core as jax_core

# Primitives that only call another jaxpr, and the parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}


def scalar_operands(
    closed: jax_core.ClosedJaxpr, concrete: Mapping[int, np.ndarray]
) -> list[tuple[str, list[np.ndarray]]]:
    """(kernel name, steering values) of every `pallas_call` in order; no values where they do not
    follow.

    Evaluated on the CPU, equation by equation, as far as values are known; the rest stays abstract.

    Args:
      closed: the traced function.
      concrete: values of some of its arguments by position.
    """
    found: list[tuple[str, list[np.ndarray]]] = []
    with jax.default_device(jax.devices("cpu")[0]):
        _evaluate(
            closed.jaxpr,
            closed.consts,
            [concrete.get(i) for i in range(len(closed.jaxpr.invars))],
            found,
        )
    return found


def _evaluate(jaxpr, consts, values, found) -> list:
    """The known outputs of a jaxpr, None for the others; appends to `found` on the way."""
    env = dict(zip(jaxpr.constvars, consts)) | {
        v: x for v, x in zip(jaxpr.invars, values) if x is not None
    }
    read = lambda v: v.val if isinstance(v, jax_core.Literal) else env.get(v)
    for eqn in jaxpr.eqns:
        inputs, name = [read(v) for v in eqn.invars], eqn.primitive.name
        if name == "pallas_call":
            grid = eqn.params["grid_mapping"]
            steering = inputs[: grid.num_dynamic_grid_bounds + grid.num_index_operands]
            known = steering and all(x is not None for x in steering)
            label = eqn.params.get("name") or getattr(
                eqn.params.get("name_and_src_info"), "name", ""
            )
            found.append((label or "", [np.asarray(x) for x in steering] if known else []))
            outputs = []
        elif name in _CALLS:
            inner = eqn.params[_CALLS[name]]
            outputs = _evaluate(
                getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs, found
            )
        elif all(x is not None for x in inputs):
            outputs = eqn.primitive.bind(*inputs, **eqn.params)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        else:
            outputs = []
        env |= {v: x for v, x in zip(eqn.outvars, outputs) if x is not None}
    return [read(v) for v in jaxpr.outvars]
