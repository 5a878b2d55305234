"""Which file --config=NAME means."""

import sys
from pathlib import Path

import pytest

import gatedjax
from gatedjax.config import files
from gatedjax.errors import InputError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working folder that is no clone; modules found there are forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize(
    "name",
    ["tiny", "tiny.py", "configs/tiny.py", "./configs/tiny.py", "gatedjax.configs.tiny"],
)
def test_own_ones_are_found_from_any_folder(elsewhere, name):
    assert files.find(name, "--config").samefile(ROOT / "configs" / "tiny.py")


def test_studies_by_name_and_path(elsewhere):
    for name in ("mqar", "configs/studies/mqar.py", "gatedjax.configs.studies.mqar"):
        found = files.find(name, "study", "studies")
        assert found.samefile(ROOT / "configs" / "studies" / "mqar.py")


def test_a_file_that_is_there_comes_first(elsewhere):
    """So a clone's own `configs/tiny.py` is the one that was edited; a bare name is gatedjax's."""
    (elsewhere / "configs").mkdir()
    for path in (Path("configs/tiny.py"), Path("mine.py")):
        path.write_text("")
        assert files.find(str(path), "--config") == path
    Path("tiny").mkdir()
    assert files.find("tiny", "--config").parent.samefile(ROOT / "configs")


def test_modules_of_the_working_folder_and_installed_ones(elsewhere):
    (elsewhere / "their_project").mkdir()
    (elsewhere / "their_project" / "experiment.py").write_text("")
    found = files.find("their_project.experiment", "--config")
    assert found.samefile(elsewhere / "their_project" / "experiment.py")
    assert files.find("gatedjax.paths", "--config").samefile(ROOT / "gatedjax" / "paths.py")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tny", "^--config: got 'tny', expected a Python file, a module or one of .*mean 'tiny'"),
        ("none/x.py", "got 'none/x.py'"),
        ("configs/../tiny.py", "got 'configs/../tiny.py'"),
        ("gatedjax.configs..tiny", "got 'gatedjax.configs..tiny'"),
        (".", "got '.'"),
        ("", "got an empty path"),
        ("gs://bucket/tiny.py", "got gs://bucket/tiny.py"),
        ("no_such_package.experiment", "got 'no_such_package.experiment'"),
        ("sys", "got 'sys'"),
        ("broken.experiment", r"broken.experiment cannot be imported \(NameError"),
    ],
)
def test_bad_names_are_one_line(elsewhere, name, message):
    (elsewhere / "broken").mkdir()
    (elsewhere / "broken" / "__init__.py").write_text("undefined_name")
    with pytest.raises(InputError, match=message) as caught:
        files.find(name, "--config")
    assert "\n" not in str(caught.value)


def test_flags_get_the_file_and_keep_the_argument(elsewhere):
    tiny_moe = files.own_folder() / "tiny_moe.py"
    rest = ["--config.optim.lr=1e-3", "--workdir=tiny"]
    for given in (["--config=tiny_moe:bias"], ["-config=tiny_moe:bias"]):
        assert files.located([*given, *rest]) == [f"--config={tiny_moe}:bias", *rest]
    assert files.located(["--config", "tiny_moe", *rest]) == ["--config", str(tiny_moe), *rest]
    assert files.located(["--", "--config=tiny"]) == ["--", "--config=tiny"]


def test_an_installed_copy_has_them_inside(elsewhere, monkeypatch):
    inside = elsewhere / "site-packages" / "gatedjax"
    (inside / "configs").mkdir(parents=True)
    (inside / "configs" / "tiny.py").write_text("")
    monkeypatch.setattr(gatedjax, "__file__", str(inside / "__init__.py"))
    assert files.find("tiny", "--config") == inside / "configs" / "tiny.py"
    assert files.own_names() == ["tiny"]


def test_runs_have_different_folders():
    def name(argument):
        return files.run_name(Path("configs/tiny_moe.py"), argument)

    assert [name(a) for a in ("", None, "bias")] == ["tiny_moe", "tiny_moe", "tiny_moe-bias"]
    strange = ["a/b", "a-b", "a b", "a:b", "..", "x" * 100, "x" * 101, "é", "\udcff"]
    names = [name(argument) for argument in strange]
    assert len(set(names)) == len(strange)
    assert all("/" not in n and n.isascii() and len(n) < 80 for n in names)
