"""How often each computation of a compiled program runs, from its HLO text."""

import math
import re

NAME = r"%([\w.\-]+)"
ASSIGNED = rf"\s*(?:ROOT )?{NAME} = "
COMPUTATION = re.compile(rf"^(?:ENTRY )?{NAME} \(.*\{{$")
_WHILE = re.compile(rf" while\(.*condition={NAME}, body={NAME}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLEE = re.compile(
    rf"(?:to_apply|calls|branch_computations|true_computation)=\{{?{NAME}",
)
_CONSTANT = re.compile(rf"\s*{NAME} = [su]32\[\]\S* constant\((\d+)\)")
_LESS_THAN = re.compile(
    rf"\s*ROOT %\S+ = pred\S* compare\({NAME}, {NAME}\), direction=LT",
)
# Groups: the name, the place in the tuple.
_ELEMENT = re.compile(rf"{ASSIGNED}[su]32\[\]\S* get-tuple-element\(.*?\), index=(\d+)")
# Groups: the operands.
_RETURNED = re.compile(r"\s*ROOT %\S+ = \(.*\) tuple\((.*?)\)")
# Groups: the name, the operands.
_SUM = re.compile(rf"{ASSIGNED}[su]32\[\]\S* add\({NAME}, {NAME}\)")


def trips(lines: list[str]) -> dict[str, int]:
    """How often each computation runs: a loop's body up to the limit of its counter, times the loop
    around it.
    """
    computations = _computations(lines)
    loop_trips: dict[str, int] = {}  # of a loop's body, in one run of the loop
    caller: dict[str, str] = {}
    for computation, inside in computations.items():
        for line in inside:
            loop = _WHILE.search(line)
            if loop is not None:
                condition, body = loop.groups()
                known = _TRIP_COUNT.search(line)
                if known:
                    loop_trips[body] = int(known[1])
                else:
                    loop_trips[body] = _counted(computations[condition], computations[body])
                caller[body] = computation
                continue
            for callee in _CALLEE.findall(line):
                caller.setdefault(callee, computation)
    found: dict[str, int] = {}

    def times(name: str) -> int:
        """The loop's trips times those of its caller; remembered, as callers repeat."""
        if name not in found:
            outer = times(caller[name]) if name in caller else 1
            found[name] = loop_trips.get(name, 1) * outer
        return found[name]

    return {name: times(name) for name in {*loop_trips, *caller}}


def _computations(lines: list[str]) -> dict[str, list[str]]:
    """The lines of each computation, by its name."""
    found: dict[str, list[str]] = {}
    inside: list[str] = []
    for line in lines:
        head = COMPUTATION.match(line)
        if head is not None:
            inside = found.setdefault(head[1], [])
        inside.append(line)
    return found


def _counted(condition: list[str], body: list[str]) -> int:
    """The trips of a loop "while counter < constant", whose counter starts at 0; 1 if it is another
    one.

    A scan's counter grows by 1. A product between whose pieces other pieces are sent
    ("windowed_dot_general") has an unsigned one, that grows by 2 where the body is unrolled.
    """
    less_than = next(filter(None, map(_LESS_THAN.match, condition)), None)
    if less_than is None:
        return 1
    counter, limit_name = less_than.groups()
    limit = _constants(condition).get(limit_name)
    if limit is None:
        return 1
    places = {match[1]: int(match[2]) for match in map(_ELEMENT.match, condition) if match}
    step = _step(body, places.get(counter))
    return math.ceil(limit / step)


def _constants(lines: list[str]) -> dict[str, int]:
    return {match[1]: int(match[2]) for match in map(_CONSTANT.match, lines) if match}


def _step(body: list[str], place: int | None) -> int:
    """What a loop's body adds to the counter at this place of its tuple; 1 if the text has no such
    sum.
    """
    returned = next(filter(None, map(_RETURNED.match, body)), None)
    if place is None or returned is None:
        return 1
    after = re.findall(NAME, returned[1])[place]
    constants = _constants(body)
    for match in filter(None, map(_SUM.match, body)):
        name, *operands = match.groups()
        if name == after:
            return next((constants[x] for x in operands if constants.get(x)), 1)
    return 1
