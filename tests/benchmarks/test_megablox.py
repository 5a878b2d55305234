"""Which tiles the grouped matmuls of MaxText's experts visit, for given loads."""

from pathlib import Path

import numpy as np
import pytest

from gatedjax.aot.hlo import KernelCall

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"


@pytest.fixture
def megablox(monkeypatch):
    monkeypatch.syspath_prepend(str(PEERS))
    import megablox

    return megablox


def call(name: str, num_trips: int) -> KernelCall:
    types = ("s32[]", "s32[3]", f"s32[{num_trips}]", f"s32[{num_trips}]", "s32[1]", "bf16[16,8]")
    return KernelCall(name, "", tuple((kind, "{0}") for kind in types), None)


def test_a_tile_of_two_groups_is_visited_twice(megablox):
    num_trips, offsets, groups, tiles, first = megablox.steering(np.array([6, 10]), 4)
    assert num_trips == 5
    assert offsets.tolist() == [0, 6, 16]
    assert groups.tolist() == [0, 0, 1, 1, 1]
    assert tiles.tolist() == [0, 1, 1, 2, 3]
    assert first.tolist() == [0]
    # Groups that end where a tile does leave a trip that is not made.
    num_trips, _, groups, tiles, _ = megablox.steering(np.array([8, 8]), 4)
    assert num_trips == 4
    assert groups.tolist() == [0, 0, 1, 1, 1]
    assert tiles.tolist() == [0, 1, 2, 3, 3]


def test_grouped_matmuls_are_known_by_their_operands(megablox):
    loads = np.array([6, 10])
    other = KernelCall("splash.1", "", (("s32[1,4,4]", "{2,1,0}"),), None)
    found = megablox.with_loads([other, call("gmm.1", 5), call("gmm.2", 5)], loads)
    assert [name for name, _ in found] == ["gmm"]
    np.testing.assert_array_equal(found[0][1][3], [0, 1, 1, 2, 3])
    with pytest.raises(ValueError, match="tiles of 4 and 8 rows"):
        megablox.with_loads([call("gmm.1", 5), call("gmm.2", 3)], loads)
