"""Values that steer a kernel's control flow: its scalar-prefetch operands and dynamic grid
bounds.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jax_core

# Primitives that only call another jaxpr, and the parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "eval_jaxpr": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
# Primitives that return what they are given, for all that a value is concerned.
_PLACEMENTS = ("sharding_constraint", "optimization_barrier", "reshard", "device_put")
# Loops without a known length, branches, parts of a mesh: kernels inside are listed.
_UNFOLLOWED = ("while", "cond", "shard_map")
# Larger results steer no kernel, and take long to make.
_MOST_ELEMENTS = 1 << 24

# A kernel's name, and the values that steer it: None for one that is not known.
type Steering = tuple[str, list[np.ndarray | None]]


def scalar_operands(
    closed: jax_core.ClosedJaxpr,
    concrete: Mapping[int, np.ndarray],
) -> list[Steering]:
    """(kernel name, steering values) of every `pallas_call` in order; None for values that do not
    follow.

    In a loop's body the values that the loop changes are not known.

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
        elif eqn.primitive.name in _PLACEMENTS:
            outputs = inputs
        elif eqn.primitive.name in _CALLS:
            outputs = _called(eqn.params[_CALLS[eqn.primitive.name]], inputs, found)
        elif eqn.primitive.name == "scan":
            _called(eqn.params["jaxpr"], _of_every_trip(eqn, inputs), found)
        elif eqn.primitive.name == "shard_map" and eqn.params["mesh"].size == 1:
            # What one device has is all of it.
            outputs = _called(eqn.params["jaxpr"], inputs, found)
        elif eqn.primitive.name in _UNFOLLOWED:
            for body in _bodies(eqn):
                _called(body, [None] * len(body.in_avals), found)
        elif all(x is not None for x in inputs) and _is_small(eqn):
            outputs = eqn.primitive.bind(*inputs, **eqn.params)
            if not eqn.primitive.multiple_results:
                outputs = [outputs]
            outputs = [_without_mesh(x) for x in outputs]
        remember(eqn.outvars, outputs)
    return [read(variable) for variable in jaxpr.outvars]


def _without_mesh(x: jax.Array) -> jax.Array | np.ndarray:
    """A value that can meet any other: what is made inside of a `shard_map` (an iota) remembers the
    mesh, and jax refuses to combine it with what does not.
    """
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended):
        return x  # random keys; they are no numbers to numpy
    return np.asarray(x)


def _steering(eqn: jax_core.JaxprEqn, inputs: list) -> Steering:
    """A `pallas_call`'s name and the values of its first operands, as far as they are known."""
    grid = eqn.params["grid_mapping"]
    scalars = inputs[: grid.num_dynamic_grid_bounds + grid.num_index_operands]
    name = eqn.params.get("name")
    if not name:
        name = getattr(eqn.params.get("name_and_src_info"), "name", "")
    return name or "", [None if x is None else np.asarray(x) for x in scalars]


def _called(inner: Any, inputs: Sequence, found: list[Steering]) -> list:
    """The known outputs of a jaxpr, closed or bare: some primitives hold one, some the other."""
    return _evaluate(
        getattr(inner, "jaxpr", inner),
        getattr(inner, "consts", ()),
        inputs,
        found,
    )


def _of_every_trip(eqn: jax_core.JaxprEqn, inputs: list) -> list:
    """A scan's inputs as its body sees them: what is the same in every trip, None for the rest."""
    constants, carry, _ = (len(part) for part in eqn.params["ft_in"].unpack())
    scanned = [_if_constant(x) for x in inputs[constants + carry :]]
    return [*inputs[:constants], *[None] * carry, *scanned]


def _if_constant(scanned: Any) -> np.ndarray | None:
    """The slice that all trips get, if it is one."""
    if scanned is None:
        return None
    slices = np.asarray(scanned)
    if slices.shape[0] == 0 or (slices != slices[:1]).any():
        return None
    return slices[0]


def _bodies(eqn: jax_core.JaxprEqn) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for parameter in eqn.params.values():
        parts = parameter if isinstance(parameter, tuple | list) else (parameter,)
        for part in parts:
            if isinstance(part, jax_core.ClosedJaxpr | jax_core.Jaxpr):
                yield part


def _is_small(eqn: jax_core.JaxprEqn) -> bool:
    return all(math.prod(getattr(out.aval, "shape", ())) <= _MOST_ELEMENTS for out in eqn.outvars)
