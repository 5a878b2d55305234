"""What Pallas kernels declare of themselves: the sum of their `pl.CostEstimate`s over a traced
function.
"""

import dataclasses
from typing import Any

from jax.extend import core as jax_core


@dataclasses.dataclass(frozen=True)
class DeclaredCost:
    """Sums over every call, those in loops once a trip; `undeclared`: calls of kernels without an
    estimate.
    """

    kernel_calls: int = 0
    undeclared: int = 0
    flops: int = 0
    bytes: int = 0
    transcendentals: int = 0

    def __add__(self, other: "DeclaredCost") -> "DeclaredCost":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other))
        return DeclaredCost(*(a + b for a, b in pairs))

    def times(self, count: int) -> "DeclaredCost":
        return DeclaredCost(*(count * x for x in dataclasses.astuple(self)))


def declared_cost(jaxpr: jax_core.Jaxpr) -> DeclaredCost:
    """The cost of a jaxpr's kernels. A `while` of unknown length counts once, a `cond` as its
    most expensive branch.
    """
    total = DeclaredCost()
    for eqn in jaxpr.eqns:
        total += _of_equation(eqn)
    return total


def _of_equation(eqn: jax_core.JaxprEqn) -> DeclaredCost:
    name = eqn.primitive.name
    # A kernel of Mosaic GPU is the second.
    if name in ("pallas_call", "mpmd_map"):
        return _of_kernel(eqn.params.get("cost_estimate"))
    inner = []
    for param in eqn.params.values():
        inner += [declared_cost(jaxpr) for jaxpr in _jaxprs(param)]
    if name == "cond":
        return max(inner, key=lambda cost: (cost.flops, cost.bytes), default=DeclaredCost())
    total = sum(inner, DeclaredCost())
    if name == "scan":
        return total.times(eqn.params["length"])
    return total


def _of_kernel(estimate: Any) -> DeclaredCost:
    """`estimate`: a `pl.CostEstimate` or None."""
    if estimate is None:
        return DeclaredCost(kernel_calls=1, undeclared=1)
    return DeclaredCost(
        kernel_calls=1,
        flops=estimate.flops,
        bytes=estimate.bytes_accessed,
        transcendentals=estimate.transcendentals,
    )


def _jaxprs(param: Any) -> list[jax_core.Jaxpr]:
    """Those in a primitive's parameter, which may be a tuple of them or something else."""
    if isinstance(param, jax_core.ClosedJaxpr):
        return [param.jaxpr]
    if isinstance(param, jax_core.Jaxpr):
        return [param]
    if isinstance(param, tuple | list):
        return [jaxpr for item in param for jaxpr in _jaxprs(item)]
    return []
