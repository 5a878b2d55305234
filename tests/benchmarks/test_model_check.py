"""What counts as slower when stored model times are made anew, and which rows are made."""

import json
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_times_that_grew(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from model_check import compared

    name = ("a", "v5p")
    before = {"microseconds": 100.0, "kernels": {"k.1": {"microseconds": 10.0}}, "notes": 3}
    fine = {"microseconds": 102.9, "kernels": {"k.1": {"microseconds": 10.2}}, "notes": 9}
    assert compared(before, fine, name) == []
    renamed = {"microseconds": 90.0, "kernels": {"k.2": {"microseconds": 50.0}}}
    assert compared(before, renamed, name) == []
    slower = {"microseconds": 103.1, "kernels": {"k.1": {"microseconds": 11.0}}}
    first, second = compared(before, slower, name)
    assert "microseconds 100.00 -> 103.10" in first
    assert "kernels.k.1.microseconds 10.00 -> 11.00" in second
    assert "it broke" in compared(before, {"error": "it broke"}, name)[0]


def test_every_stored_row_of_ours_is_made(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from model_check import RESULTS, SCRIPTS, rows_of_ours

    for script in SCRIPTS:
        stored = json.loads((RESULTS / f"{script}_tpu.json").read_text())["rows"]
        made = list(rows_of_ours(script, set()))
        assert 0 < len(made) <= len(stored)
    first = [row for _, row in rows_of_ours("linear_scan", {"tpu", "tpu:v5e", "bwd"})]
    assert {(row["target"], row["pass"]) for row in first} == {("tpu:v5e", "bwd")}
    assert not any(key[0].startswith("maxtext") for key, _ in rows_of_ours("step", set()))
