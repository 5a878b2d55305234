"""What Pallas kernels declare of themselves: the sum of their `pl.CostEstimate`s over a traced
function.
"""

import dataclasses

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


def declared_cost(jaxpr) -> DeclaredCost:
    """The cost of a jaxpr's kernels. A `while` of unknown length counts once, of a `cond` the
    dearest branch counts.
    """
    total = DeclaredCost()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            total += _of_kernel(eqn.params.get("cost_estimate"))
            continue
        inner = [declared_cost(j) for p in eqn.params.values() for j in _jaxprs(p)]
        if eqn.primitive.name == "cond":
            inner = [max(inner, key=lambda c: (c.flops, c.bytes), default=DeclaredCost())]
        trips = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += sum(inner, DeclaredCost()).times(trips)
    return total


def _of_kernel(estimate) -> DeclaredCost:
    if estimate is None:
        return DeclaredCost(kernel_calls=1, undeclared=1)
    return DeclaredCost(1, 0, estimate.flops, estimate.bytes_accessed, estimate.transcendentals)


def _jaxprs(param) -> list:
    if isinstance(param, jax_core.ClosedJaxpr):
        return [param.jaxpr]
    if isinstance(param, jax_core.Jaxpr):
        return [param]
    return [j for p in param for j in _jaxprs(p)] if isinstance(param, tuple | list) else []
