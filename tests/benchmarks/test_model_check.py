"""What counts as slower when stored model times are made anew."""

from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def record(**figures: object) -> dict:
    return {"rows": [{"op": "a", "target": "v5p"} | figures]}


def test_times_that_grew_and_rows_that_are_gone(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from model_check import compared

    keys = ("op", "target")
    before = record(microseconds=100.0, kernels={"k.1": {"microseconds": 10.0}}, notes=3)
    fine = record(microseconds=102.9, kernels={"k.1": {"microseconds": 10.2}}, notes=9)
    assert compared(before, fine, keys) == []
    renamed = record(microseconds=90.0, kernels={"k.2": {"microseconds": 50.0}})
    assert compared(before, renamed, keys) == []
    slower = record(microseconds=103.1, kernels={"k.1": {"microseconds": 11.0}})
    first, second = compared(before, slower, keys)
    assert "microseconds 100.00 -> 103.10" in first
    assert "kernels.k.1.microseconds 10.00 -> 11.00" in second
    assert "not made" in compared(before, {"rows": []}, keys)[0]
    assert "it broke" in compared(before, record(error="it broke"), keys)[0]
