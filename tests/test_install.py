"""A wheel built from the tree, in an environment of its own and a folder that is no clone."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
from pathlib import Path

import pytest

import gatedjax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Two layers of width 32, windows of 32 bytes: seconds.
SMALL = [
    "--config.model.num_layers=2",
    "--config.model.width=32",
    "--config.model.ffns.mlp.hidden=32",
    "--config.model.ffns.moe.hidden=16",
    "--config.data.seq_len=32",
    "--config.optim.warmup_steps=2",
    "--config.train.steps=10",
    "--config.train.eval_batches=2",
    "--config.train.sample_tokens=8",
]
COMMANDS = ["gatedjax-train", "gatedjax-eval", "gatedjax-generate", "gatedjax-study"]


def test_the_version_and_the_address_are_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {gatedjax.__version__}\n" in citation
    assert f"repository-code: {PROJECT['urls']['Repository']}\n" in citation


def test_every_command_has_its_function():
    for name, target in PROJECT["scripts"].items():
        module, _, function = target.partition(":")
        path = ROOT / f"{module.replace('.', '/')}.py"
        assert re.search(rf"^def {function}\(", path.read_text(), re.M), name


def test_messages_name_extras_that_exist():
    extras = set(PROJECT["optional-dependencies"])
    for package in ("gatedjax", "kernels_pallas"):
        for path in (ROOT / package).rglob("*.py"):
            for named in re.findall(r"gatedjax\[([\w,-]+)\]", path.read_text()):
                assert set(named.split(",")) <= extras, path


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The source distribution, and the wheel that is built from it."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (source,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    return source, wheel


@pytest.fixture(scope="module")
def place(distributions, tmp_path_factory):
    """An empty folder, with an environment beside it that holds the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=True)
    install = [folder / "venv" / "bin" / "pip", "install", "--quiet", distributions[1]]
    subprocess.run(install, check=True)
    (folder / "work").mkdir()
    return folder


def run(place: Path, command: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    environment |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(place / "cache")}
    return subprocess.run(
        [place / "venv" / "bin" / command, *arguments],
        cwd=place / "work",
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.mark.slow
def test_the_source_distribution_holds_what_git_does(distributions):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a clone")
    with tarfile.open(distributions[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    missing = set(listed.stdout.splitlines()) - held - {".gitignore"}
    assert not missing


@pytest.mark.slow
def test_trains_evaluates_and_generates(place):
    result = run(place, "gatedjax-train", "--config=tiny", *SMALL)
    assert result.returncode == 0, result.stderr
    assert "step 10/10" in result.stdout
    assert (place / "work" / "runs" / "tiny" / "config.json").exists()
    checkpoint = "--checkpoint=runs/tiny"
    few = ["--batches=2", "--prompt_tokens=16", "--decode_tokens=4"]
    result = run(place, "gatedjax-eval", checkpoint, *few)
    assert result.returncode == 0 and "bits per byte" in result.stdout, result.stderr
    result = run(place, "gatedjax-generate", checkpoint, "--prompt=def ", "--tokens=8")
    assert result.returncode == 0 and result.stdout.startswith("def "), result.stderr


@pytest.mark.slow
def test_configurations_by_name_path_and_module(place):
    for name in ("tiny_moe:bias", "configs/tiny_moe.py:bias", "gatedjax.configs.tiny_moe:bias"):
        result = run(place, "gatedjax-train", f"--config={name}", "--print")
        assert result.returncode == 0, result.stderr
        assert "config.model.ffns.moe.router.bias_rule = 'sign'\n" in result.stdout
    mine = place / "work" / "mine"
    mine.mkdir()
    (mine / "base.py").write_text("STEPS = 70\n")
    (mine / "experiment.py").write_text(
        "from gatedjax.configs import tiny\n"
        "from mine.base import STEPS\n\n\n"
        "def get_config():\n"
        "    c = tiny.get_config()\n"
        "    c.train.steps = STEPS\n"
        "    return c\n"
    )
    for name in ("mine.experiment", "mine/experiment.py"):
        result = run(place, "gatedjax-train", f"--config={name}", "--print")
        assert result.returncode == 0 and "config.train.steps = 70\n" in result.stdout, (
            result.stderr
        )
    result = run(place, "gatedjax-train", "--config=tny", "--print")
    assert result.returncode == 2 and result.stderr.startswith("error: --config: got 'tny'")


@pytest.mark.slow
def test_every_command_helps_and_refuses_in_one_line(place):
    for command in COMMANDS:
        result = run(place, command, "--help")
        assert result.stdout.count("\n") > 10, f"{command}: {result.stdout}{result.stderr}"
        result = run(place, command, "--no_such_flag=1")
        assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert run(place, "gatedjax-aot", "--help").returncode == 0
    result = run(place, "gatedjax-papers", "show", "softpick")
    assert result.returncode == 0 and "singlepass.py" in result.stdout, result.stderr
    result = run(place, "gatedjax-papers", "show", "softpik")
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    result = run(place, "gatedjax-study", "nothing")
    assert result.returncode == 2 and "one of gate_positions" in result.stderr
