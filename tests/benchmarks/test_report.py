"""Rows of a record: made once, kept, written one by one."""

import json

from benchmarks.report import each_row

KEYS = ("op", "rows")
VERSIONS = {"libtpu": "1"}


def stored(path) -> dict:
    """Figures by the values that name a row."""
    rows = json.loads(path.read_text())["rows"]
    return {tuple(row[key] for key in KEYS): row["us"] for row in rows if "us" in row}


def test_rows_that_a_file_has_are_not_made_again(tmp_path):
    path = tmp_path / "record.json"
    made = []

    def make(op: str, rows: int) -> dict:
        made.append((op, rows))
        return {"error": "no memory"} if op == "large" else {"us": rows / 2}

    def run(wanted: list, versions=VERSIONS) -> list:
        made.clear()
        return list(each_row(str(path), KEYS, versions, wanted, make, width=8))

    assert run([("small", 4), ("large", 4)]) == [
        (("small", 4), {"us": 2.0}),
        (("large", 4), {"error": "no memory"}),
    ]
    assert json.loads(path.read_text())["width"] == 8
    # One is there, one failed, one is new; what nobody wants now stays.
    run([("small", 6), ("large", 4)])
    assert made == [("small", 6), ("large", 4)]
    assert run([("small", 4)]) == [(("small", 4), {"us": 2.0})] and made == []
    assert stored(path) == {("small", 4): 2.0, ("small", 6): 3.0}
    # Of another compiler, none.
    run([("small", 4)], {"libtpu": "2"})
    assert made == [("small", 4)]
    assert stored(path) == {("small", 4): 2.0}


def test_a_run_that_is_cut_short_leaves_the_rows_it_made(tmp_path):
    path = tmp_path / "record.json"
    rows = each_row(str(path), KEYS, VERSIONS, [("a", 1), ("b", 2)], lambda op, n: {"us": n})
    next(rows)
    assert stored(path) == {("a", 1): 1}
