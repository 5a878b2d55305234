"""Values that steer a kernel's control flow: its scalar-prefetch operands and dynamic grid
bounds.
"""

from collections.abc import Mapping, Sequence

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

# A kernel's name, and the values that steer it, if they are known.
type Steering = tuple[str, list[np.ndarray]]


def scalar_operands(
    closed: jax_core.ClosedJaxpr,
    concrete: Mapping[int, np.ndarray],
) -> list[Steering]:
    """(kernel name, steering values) of every `pallas_call` in order; no values where they do not
    follow.

    Evaluated on the CPU, equation by equation, as far as values are known; the rest stays abstract.

    Args:
      closed: the traced function.
      concrete: values of some of its arguments by position.
    """
    found: list[Steering] = []
    values = [concrete.get(i) for i in range(len(closed.jaxpr.invars))]
    with jax.default_device(jax.devices("cpu")[0]):
        _evaluate(closed.jaxpr, closed.consts, values, found)
    return found


def _evaluate(
    jaxpr: jax_core.Jaxpr,
    consts: Sequence,
    values: Sequence,
    found: list[Steering],
) -> list:
    """The known outputs of a jaxpr, None for the others; appends to `found` on the way."""
    known = dict(zip(jaxpr.constvars, consts))

    def remember(variables: Sequence, values: Sequence) -> None:
        for variable, value in zip(variables, values):
            if value is not None:
                known[variable] = value

    def read(variable):
        if isinstance(variable, jax_core.Literal):
            return variable.val
        return known.get(variable)

    remember(jaxpr.invars, values)
    for eqn in jaxpr.eqns:
        inputs = [read(variable) for variable in eqn.invars]
        outputs = []
        if eqn.primitive.name == "pallas_call":
            found.append(_steering(eqn, inputs))
        elif eqn.primitive.name in _CALLS:
            inner = eqn.params[_CALLS[eqn.primitive.name]]
            # Some primitives hold a ClosedJaxpr, some a bare Jaxpr without constants.
            outputs = _evaluate(
                getattr(inner, "jaxpr", inner),
                getattr(inner, "consts", ()),
                inputs,
                found,
            )
        elif all(x is not None for x in inputs):
            outputs = eqn.primitive.bind(*inputs, **eqn.params)
            if not eqn.primitive.multiple_results:
                outputs = [outputs]
        remember(eqn.outvars, outputs)
    return [read(variable) for variable in jaxpr.outvars]


def _steering(eqn: jax_core.JaxprEqn, inputs: list) -> Steering:
    """A `pallas_call`'s name and the values of its first operands, if all of them are known."""
    grid = eqn.params["grid_mapping"]
    scalars = inputs[: grid.num_dynamic_grid_bounds + grid.num_index_operands]
    name = eqn.params.get("name")
    if not name:
        name = getattr(eqn.params.get("name_and_src_info"), "name", "")
    if any(x is None for x in scalars):
        return name or "", []
    return name or "", [np.asarray(x) for x in scalars]
