"""What steers the grouped matmuls of megablox, which MaxText's experts are computed with."""

from collections.abc import Iterable

import numpy as np

from gatedjax.aot.hlo import KernelCall
from gatedjax.aot.prefetch import Steering


def with_loads(calls: Iterable[KernelCall], loads: np.ndarray) -> list[Steering]:
    """Values that steer each grouped matmul among the calls of a program, for these rows a group.

    Such a kernel is known by its first operands: a number of tiles, where each group starts and
    ends, the group and the tile of each trip, and the first group of a shard.

    Raises:
      ValueError: kernels of one name have tiles of different sizes: which is meant is not told.
    """
    num_groups = len(loads)
    found: dict[str, tuple[int, list[np.ndarray | None]]] = {}
    for call in calls:
        types = [kind for kind, _ in call.operands[:5]]
        if len(types) < 5 or types[:2] != ["s32[]", f"s32[{num_groups + 1}]"]:
            continue
        num_trips = int(types[2].removeprefix("s32[").removesuffix("]"))
        rows_a_tile = int(loads.sum()) // (num_trips - num_groups + 1)
        name = call.name.partition(".")[0]
        before, _ = found.setdefault(name, (rows_a_tile, steering(loads, rows_a_tile)))
        if before != rows_a_tile:
            raise ValueError(f"{name}: got tiles of {before} and {rows_a_tile} rows, expected one")
    return [(name, values) for name, (_, values) in found.items()]


def steering(loads: np.ndarray, rows_a_tile: int) -> list[np.ndarray | None]:
    """A tile that two groups share is visited once for each of them. All groups have rows."""
    ends = np.cumsum(loads)
    starts = ends - loads
    groups: list[int] = []
    tiles: list[int] = []
    for group, (start, end) in enumerate(zip(starts, ends)):
        visited = range(start // rows_a_tile, -(-end // rows_a_tile))
        groups += [group] * len(visited)
        tiles += visited
    # The arrays have room for the most trips there could be; the last ones are not made.
    num_trips = len(tiles)
    room = ends[-1] // rows_a_tile + len(loads) - 1 - num_trips
    integers = (
        num_trips,
        [0, *ends],
        [*groups, *groups[-1:] * room],
        [*tiles, *tiles[-1:] * room],
        [0],
    )
    return [np.asarray(values, np.int32) for values in integers]
