"""Trained models that are adapted, joined and split, as a person meets it: commands from end to end
in real processes; bad input is one line and exit code 2.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gatedjax.errors import InputError
from gatedjax.reporting.texts import parsed_texts

ROOT = Path(__file__).parents[1]
SMALL = [
    "--config.data.seq_len=32",
    "--config.optim.warmup_steps=2",
    "--config.train.steps=8",
    "--config.train.eval_every=8",
    "--config.train.eval_batches=2",
    "--config.train.sample_tokens=0",
]


def test_texts_of_a_flag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = parsed_texts(["a=x", "b=/y"])
    assert found == {"a": str(tmp_path / "x"), "b": "/y"}
    wrong = {
        ("a=x",): "two or more",
        ("a=x", "b"): "got 'b', expected NAME=PATH",
        ("a=x", "=y"): "got '=y', expected NAME=PATH",
        ("a=x", "a=y"): "got 'a', expected names that differ",
        ("a=x", "base=y"): "got 'base', expected names that differ",
    }
    for values, message in wrong.items():
        with pytest.raises(InputError, match=message):
            parsed_texts(list(values), "base")


def python(place: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(place / "xla"),
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two texts and a trained base."""
    folder = tmp_path_factory.mktemp("combining")
    for name in ("numbers", "letters"):
        (folder / name).mkdir()
        for i in range(8):
            lines = [f"{j * i}\n" if name == "numbers" else "a" * (j % 7) for j in range(200)]
            (folder / name / f"{i}.txt").write_text("".join(lines))
    arguments = ["train.py", "--config=xlora:base", f"--workdir={folder / 'base'}", *SMALL]
    arguments.append("--config.data.sources.main.kind=text")
    arguments.append(f"--config.data.sources.main.path={folder / 'numbers'}")
    trained = python(folder, *arguments)
    assert trained.returncode == 0, trained.stderr
    return folder


def texts(place: Path) -> str:
    return f"--texts=numbers={place / 'numbers'},letters={place / 'letters'}"


@pytest.mark.slow
def test_phatgoose(place):
    """Twice: what is there is not done again."""
    arguments = ["-m", "gatedjax.phatgoose", f"--from={place / 'base'}", texts(place)]
    arguments += [f"--workdir={place / 'phatgoose'}", "--steps=4,3"]
    arguments += ["--set=optim.warmup_steps=1", "--set=train.batch_size=4"]
    for _ in range(2):
        done = python(place, *arguments)
        assert done.returncode == 0, done.stderr
    rows = json.loads((place / "phatgoose" / "table.json").read_text())["rows"]
    names = ["base", "expert numbers", "expert letters", "stacked"]
    assert [row["model"] for row in rows] == names
    assert set(rows[0]) == {"model", "numbers", "letters", "base"}
    # An expert is best on its own text.
    assert min(rows[:3], key=lambda row: row["letters"])["model"] == "expert letters"


@pytest.mark.slow
def test_cache_to_cache(place):
    """A fuser that has not learned leaves the target as it is, to the bit of the loss."""
    base = place / "base"
    arguments = ["-m", "gatedjax.cache_to_cache", f"--source={base}", f"--target={base}"]
    arguments += ["--hidden=16", "--batches=2"]
    done = python(place, *arguments, f"--workdir={place / 'f0'}", "--steps=1", "--lr=0")
    assert done.returncode == 0, done.stderr
    rows = json.loads((place / "f0" / "table.json").read_text())["rows"]
    assert rows[1]["loss"] == rows[2]["loss"]
    assert set(rows[2]["gates"].values()) == {0.0}
    again = f"--fuser={place / 'f0' / 'fuser.npz'}"
    done = python(place, *arguments, again, f"--workdir={place / 'f1'}")
    assert done.returncode == 0, done.stderr
    assert json.loads((place / "f1" / "table.json").read_text())["rows"] == rows
    wrong = python(place, *arguments, again, f"--workdir={place / 'f2'}", "--hidden=8")
    assert wrong.returncode == 2
    assert "--fuser: " in wrong.stderr and "expected" in wrong.stderr
    assert not (place / "f2").exists()


@pytest.mark.slow
def test_split_experts(place):
    arguments = ["-m", "gatedjax.split_experts", f"--from={place / 'base'}", texts(place)]
    arguments += [f"--workdir={place / 'split'}", "--rounds=1", "--batches=2"]
    done = python(place, *arguments, "--router_steps=3", "--expert_steps=3")
    assert done.returncode == 0, done.stderr
    found = json.loads((place / "split" / "table.json").read_text())
    assert found["computed"] == 0.5
    assert [row["experts"] for row in found["rows"]][:2] == ["dense", "routed"]
    (row,) = found["loads"]
    assert row["ahead"] <= row["recent"]
    # The result is a run like any other; the text of its configuration is the base's.
    split = f"--checkpoint={place / 'split'}"
    measured = python(place, "eval.py", split, "--json", "--batches=2")
    assert measured.returncode == 0, measured.stderr
    loss = json.loads(measured.stdout)["evaluations"][0]["loss"]
    np.testing.assert_allclose(loss, found["rows"][1]["numbers"], rtol=1e-5)
    written = python(place, "-m", "gatedjax.generate", split, "--prompt=12", "--tokens=4")
    assert written.returncode == 0, written.stderr
    to_train = ["train.py", f"--config=from_run:{place / 'split'}", *SMALL]
    trained = python(place, *to_train, f"--workdir={place / 'further'}")
    assert trained.returncode == 0, trained.stderr
    wrong = {
        "--texts=a=x,b=y": f"--workdir={place / 'other'}",
        texts(place): f"--workdir={place / 'split'}",
    }
    for text, workdir in wrong.items():
        refused = python(place, *arguments[:3], text, workdir)
        assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1
