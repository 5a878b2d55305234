"""Studies: cells train and are measured, finished runs are kept, tables and pictures say what the
runs said.
"""

import dataclasses
import json
import math

import numpy as np
import pytest
from tiny_run import ROOT, plain

from gatedjax.data.recall import RecallConfig
from gatedjax.errors import InputError
from gatedjax.study import Cell, Picture, Study, report, workers
from gatedjax.study import __main__ as command
from gatedjax.study.cell import run_cell, seeded, train
from gatedjax.study.grid import run_key

TASK = RecallConfig(
    task="copy", seq_len=8, vocab_size=4, num_pairs=3, train_examples=64, validation_examples=32
)


def config(**changes):
    return plain(
        **dict(data__seq_len=8, train__steps=60, train__eval_every=20, optim__lr=0.01) | changes
    )


def study(*cells, **changes):
    values = dict(title="t", cells=cells, seeds=(0,), measures=("recall",), columns=("accuracy",))
    return Study(**values | changes)


@pytest.mark.slow
def test_a_task_is_learned_and_training_stops_there():
    cell = Cell({"lr": 0.01}, config(), recall=TASK)
    values = run_cell(cell, 0, study(cell))
    assert values["steps"] == 60 and values["accuracy"] > 0.9, "three of two tokens, copied"
    assert train(seeded(cell, 0), stop_at=0.4).steps < 60
    untrained = dataclasses.replace(cell, config=config(optim__lr=1e-9))
    assert run_cell(untrained, 0, study(untrained))["accuracy"] < 0.7


def test_text_is_measured(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(4):
        (tmp_path / "text" / f"{i}.txt").write_text(
            f"the {i}. text says the same again and again\n" * 90
        )
    sources = dict(
        data__sources__main__kind="text", data__sources__main__path=str(tmp_path / "text")
    )
    text = config(
        model__vocab_size=0,
        data__cache_dir=str(tmp_path / "cache"),
        train__eval_batches=2,
        **sources,
    )
    cell = Cell({}, text, lengths=(8, 16), yarn=True)
    values = run_cell(cell, 0, study(cell, measures=("validation", "probes", "lengths")))
    assert (
        values["loss@8"] == pytest.approx(values["loss"], rel=1e-5)
        and values["loss@16"] != values["loss"]
    )
    assert (
        0 < values["gate_mean"] < 1
        and 0 < values["first_token_fraction"] < 1
        and values["bits_per_byte"] < 5
    )


def test_a_diverging_run_is_told_apart():
    cell = Cell(
        {}, config(optim__lr=1e30, optim__warmup_steps=1, optim__clip_norm=0.0), recall=TASK
    )
    values = run_cell(cell, 0, study(cell))
    assert values["diverged"] == 1.0 and "accuracy" not in values


def fake(labels, seed, diverged=0.0, **values):
    return {
        "labels": labels,
        "seed": seed,
        "values": {"diverged": diverged, "seconds": 1.0} | values,
    }


def test_the_table_gives_means_and_spreads():
    records = [
        fake({"mixer": "a", "lr": 1}, 0, accuracy=0.5),
        fake({"mixer": "a", "lr": 1}, 1, accuracy=0.7),
        fake({"mixer": "a", "lr": 2}, 0, accuracy=0.9),
        fake({"mixer": "a", "lr": 2}, 1, diverged=1.0, accuracy=None),
        fake({"mixer": "b", "lr": 1}, 0, diverged=1.0),
        fake({"mixer": "b", "lr": 1}, 1, diverged=1.0),
    ]
    every = report.rows(study(), records)
    assert every[0].mean["accuracy"] == pytest.approx(0.6)
    assert every[0].spread["accuracy"] == pytest.approx(math.sqrt(0.02))
    text = report.markdown(study(), every, ["note"])
    assert "| a | 2 | 0.9 | 2, 1 diverged |" in text and "| b | 1 | - | 2, 2 diverged |" in text
    for x in ("mixer", "lr"):
        report.draw(Picture(x, "accuracy", line="mixer"), every, "t").canvas.draw()


@dataclasses.dataclass(frozen=True)
class Doubled:
    """An experiment: twice a number, and the seed."""

    number: float

    def __call__(self, seed):
        return {"double": 2 * self.number + seed}


def test_a_cell_may_be_an_experiment():
    cells = [Cell({"number": x}, experiment=Doubled(x)) for x in (1.0, 2.0)]
    asked = study(*cells, measures=(), columns=("double",))
    values = run_cell(cells[1], 3, asked)
    assert values["double"] == 7.0 and values["diverged"] == 0 and values["seconds"] >= 0
    keys = {run_key(cell, seed, asked) for cell in cells for seed in (0, 1)}
    assert len(keys) == 4
    again = Cell({"reworded": 1}, experiment=Doubled(2.0))
    assert run_key(again, 1, asked) in keys


def test_axes_have_words_and_bars_end_where_values_do():
    records = [
        fake({"state": x, "mixer": "a"}, s, accuracy=1.0 - 0.5 * s) for x in (1, 2) for s in (0, 1)
    ]
    found = report.rows(study(), records)
    axes = report.draw(Picture("state", "accuracy", line="mixer"), found, "t").axes[0]
    assert axes.get_ylabel() == "answers that are right, fraction (higher is better)"
    assert axes.get_xlabel() == "state of a layer, numbers"
    ends = [line for line in axes.lines if line.get_marker() in ("_", 2, 3)]
    heights = np.concatenate([line.get_ydata() for line in ends])
    # The mean is 0.75 and the spread 0.35.
    assert heights.max() == 1.0 and heights.min() == pytest.approx(0.75 - math.sqrt(0.125))
    # Dots of names lie on their side: the values are the horizontal axis.
    dots = report.draw(Picture("mixer", "accuracy", line="state", log_x=True), found, "t").axes[0]
    assert dots.get_xscale() == "log" and axes.get_xscale() == "linear"


def test_a_picture_over_columns():
    columns = ("loss@16", "loss@32")
    records = [
        fake({"mixer": m}, 0, **{"loss@16": 2.0, "loss@32": y}) for m, y in (("a", 1.0), ("b", 3.0))
    ]
    found = report.rows(study(columns=columns), records)
    figure = report.draw(Picture("window", "loss@", line="mixer"), found, "t")
    drawn = {(*line.get_xdata(), *line.get_ydata()) for line in figure.axes[0].lines}
    assert drawn == {(16.0, 32.0, 2.0, 1.0), (16.0, 32.0, 2.0, 3.0)}, (
        "error bars of no height included"
    )


def test_a_picture_over_columns_with_names():
    columns = ("barrier@as it is", "barrier@permuted")
    record = fake({"model": "a"}, 0, **{columns[0]: 1e-3, columns[1]: 2.0})
    found = report.rows(study(columns=columns), [record])
    picture = Picture("second model", "barrier@", line="model")
    axes = report.draw(picture, found, "t").axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["as it is", "permuted"]
    assert list(axes.lines[0].get_xdata()) == [1e-3, 2.0]
    both = [*found, found[0]._replace(labels={"model": "b"})]
    axes = report.draw(picture, both, "t").axes[0]
    heights = {float(y) for line in axes.lines for y in line.get_ydata()}
    assert len(heights) == 4, "dots of two lines do not hide each other"


def test_a_vertical_axis_may_be_logarithmic():
    columns = ("error@30", "error@300")
    records = [fake({"k": "a"}, seed, **dict.fromkeys(columns, 10.0**-seed)) for seed in (0, 1, 9)]
    found = report.rows(study(columns=columns), records)
    for log_y, scale in ((True, "log"), (False, "linear")):
        picture = Picture("step", "error@", line="k", log_y=log_y)
        assert report.draw(picture, found, "t").axes[0].get_yscale() == scale


def test_finished_runs_are_not_run_again(tmp_path, monkeypatch):
    cells = [Cell({"lr": lr}, config(optim__lr=lr), recall=TASK) for lr in (0.01, 0.02)]
    asked = study(*cells, seeds=(0, 1), pictures=(Picture("lr", "accuracy"),))
    ran = []
    monkeypatch.setattr(
        workers,
        "run_cell",
        lambda cell, seed, _: ran.append(seed) or dict(accuracy=0.5, seconds=1.0, diverged=0.0),
    )
    command.run_missing(dataclasses.replace(asked, seeds=(0,)), tmp_path, workers.Here())
    records = command.run_missing(asked, tmp_path, workers.Here())
    assert ran == [0, 0, 1, 1] and len(records) == 4
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 4
    table, picture = command.write_report(asked, records, tmp_path, "python -m gatedjax.study x.py")
    assert (
        "0.5 ± 0" in table.read_text()
        and "seeds 0, 1" in table.read_text()
        and picture.stat().st_size > 5000
    )
    assert json.loads((tmp_path / "runs.jsonl").read_text().splitlines()[0])["labels"] == {
        "lr": 0.01
    }
    keys = {run_key(c, s, asked) for c in cells for s in (0, 1)}
    assert len(keys) == 4


def test_a_rerun_says_where_the_records_were_made(tmp_path, monkeypatch):
    """On another machine, another day and with other versions: the table is the same to the byte,
    unless a run was missing, which is then told apart.
    """
    cell = Cell({"lr": 0.01}, config(), recall=TASK)
    asked = study(cell)
    values = dict(accuracy=0.5, seconds=1.0, diverged=0.0)
    monkeypatch.setattr(workers, "run_cell", lambda *_: dict(values))

    def table(of):
        records = command.run_missing(of, tmp_path, workers.Here())
        return command.write_report(of, records, tmp_path, "command")[0].read_text()

    first = table(asked)
    elsewhere = {"machine": "8 x TPU v9", "versions": "jax 9.9", "date": "2031-02-03"}
    monkeypatch.setattr(workers, "here_and_now", lambda: elsewhere)
    assert table(asked) == first and "CPU core" in first and "jax 9.9" not in first
    more = table(dataclasses.replace(asked, seeds=(0, 1)))
    assert "2 runs, 2s: 1 on " in more
    assert more.rstrip().endswith("1 on 8 x TPU v9; jax 9.9; 2031-02-03.")


@pytest.mark.parametrize(
    "table", sorted((ROOT / "results").glob("*/*/table.md")), ids=lambda p: p.parts[-3]
)
def test_tables_of_the_repository_say_what_their_records_say(table):
    name = table.parts[-3]
    small = name.endswith("-small")
    path = ROOT / "configs" / "studies" / f"{name.removesuffix('-small')}.py"
    asked = command.load_study(path, small)
    known = command._read_runs(table.parent / "runs.jsonl")
    keys = [run_key(cell, seed, asked) for cell in asked.cells for seed in asked.seeds]
    assert set(keys) == set(known), "every record is a run of the study"
    note = table.read_text().rstrip().splitlines()[-1]
    typed = note.split("`")[1]
    assert command._note(asked, [known[key] for key in keys], typed) == note


@pytest.mark.parametrize(
    "content, message", [(None, "expected a Python file"), ("x = 1", r"no get_study\(small\)")]
)
def test_a_file_that_is_no_study_is_named(tmp_path, content, message):
    path = tmp_path / "s.py"
    if content:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        command.load_study(path, small=True)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "studies").glob("[!_]*.py")), ids=lambda p: p.stem
)
def test_the_studies_of_the_repository_can_be_made(path, small):
    found = command.load_study(path, small)
    labels = [tuple(cell.labels.items()) for cell in found.cells]
    assert len(set(labels)) == len(labels) and found.title and found.columns
    assert all(p.y.endswith("@") or p.y in found.columns for p in found.pictures)
    keys = {run_key(c, s, found) for c in found.cells for s in found.seeds}
    assert len(keys) == len(found.cells) * len(found.seeds), "no two cells have the same run"
    # A key of the configuration that is added must not make recorded runs unknown.
    folder = ROOT / "results" / (f"{path.stem}-small" if small else path.stem)
    recorded = set()
    for file in folder.rglob("runs.jsonl"):
        recorded |= {json.loads(line)["key"] for line in file.read_text().splitlines()}
    assert not recorded or keys <= recorded
