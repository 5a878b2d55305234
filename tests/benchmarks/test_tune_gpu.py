"""The tuner of GPU kernels: what it tries are fields of the tables, and it keeps what is faster."""

import math
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tuner(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tune_gpu

    rows = {op: tune_gpu.row_of(op, headline(tuner=tune_gpu, op=op)) for op in tune_gpu.VALUES}
    yield tune_gpu
    for op, row in rows.items():
        tune_gpu.put_into_table(op, row)
    sys.modules.pop("tune_gpu")


def headline(tuner, op: str):
    return tuner.shape_of(op, "", "vector", dry=True)


@pytest.mark.parametrize("op", ["linear_scan", "attention", "grouped_matmul"])
def test_the_fastest_value_of_every_field_stays(op, tuner, monkeypatch):
    """Of a clock by which smaller blocks are faster, and one value does not compile."""
    seen = []

    def milliseconds(op, row, program, dry):
        tuner.put_into_table(op, row)
        # The program would see it.
        assert tuner.row_of(op, shape) == row
        seen.append(row)
        numbers = str(row)
        if "block_k=32," in numbers and op == "attention":
            return math.inf
        return float(math.prod(int(n) for n in tuner.re.findall(r"=(\d+)", numbers)))

    monkeypatch.setattr(tuner, "milliseconds", milliseconds)
    shape = headline(tuner, op)
    best, tried = tuner.tune_by_time(op, shape, dry=False)
    assert len(tried) == len(seen) > 10
    assert min(row["ms"] for row in tried if row["ms"]) == tried_of(best, tried)["ms"]
    assert best != seen[0]


def tried_of(row, tried: list[dict]) -> dict:
    [found] = [line for line in tried if line["row"] == str(row)][:1]
    return found


def test_sizes_are_read_from_a_text(tuner):
    shape = tuner.shape_of("attention", "B2,T64,Hk1", "vector", dry=False)
    headline = tuner.cases.HEADLINE.attention
    assert shape == headline._replace(B=2, T=64, Hk=1)
    assert tuner.shape_of("linear_scan", "", "scalar", dry=True).decay == "scalar"
