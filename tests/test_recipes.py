"""The scripts of docs/launch start what they should: with commands in place of ssh, srun, gcloud
and xpk that record what they were asked, or do it here.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "docs" / "launch"
# Appends its name, its arguments and what it sees of a scheduler to a file.
RECORD = """
import json, os, sys
seen = {k: v for k, v in os.environ.items() if k.startswith("SLURM_")}
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([NAME, sys.argv[1:], seen]) + "\\n")
"""


class Place:
    """A home, and a folder of commands that come before the machine's own."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "env" / "bin").mkdir(parents=True)
        (folder / "env" / "bin" / "activate").touch()

    def script(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def recorder(self, name: str, also: str = "") -> None:
        self.script(name, f"#!{sys.executable}\nNAME = {name!r}\n{RECORD}{also}")

    def run(self, recipe: str, **variables: str) -> list[tuple[str, list[str], dict[str, str]]]:
        """What was recorded."""
        places = {
            "HOME": str(self.folder),
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "RECORD": str(self.folder / "record"),
        }
        subprocess.run(
            ["bash", LAUNCH / recipe],
            cwd=self.folder,
            env=os.environ | places | variables,
            check=True,
            capture_output=True,
            timeout=60,
        )
        return [json.loads(line) for line in (self.folder / "record").read_text().splitlines()]


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def test_ssh_starts_a_supervised_process_on_each_machine(place):
    # In the foreground: what ssh left running would outlive the test.
    place.script("ssh", '#!/bin/bash\nbash -c "${2% &}"\n')
    place.recorder("python")
    recorded = place.run("ssh.sh", HOSTS="node0 node1 node2")
    assert len(recorded) == 3
    for i, (_, arguments, _) in enumerate(recorded):
        assert arguments[:3] == ["-m", "gatedjax.runtime.supervise", "--"]
        assert arguments[3] == "gatedjax-train"
        assert arguments[-3:] == [
            "--coordinator=node0:8476",
            "--num_processes=3",
            f"--process_id={i}",
        ]
        assert (place.folder / f"run-{i}.log").exists()


def test_slurm_starts_the_command_by_srun(place):
    ranks = "for i in 0 1; do SLURM_PROCID=$i SLURM_NTASKS=2 SLURM_LOCALID=$i"
    place.script("srun", f'#!/bin/bash\nshift\n{ranks} "$@"; done\n')
    place.recorder("gatedjax-train")
    recorded = place.run("slurm.sh", SCRATCH=str(place.folder))
    assert [seen["SLURM_PROCID"] for _, _, seen in recorded] == ["0", "1"]
    assert recorded[0][1] == recorded[1][1]
    assert f"--workdir={place.folder}/runs/gla" in recorded[0][1]


def test_a_tpu_is_asked_for_set_up_and_started(place):
    place.recorder("gcloud", 'if "describe" in sys.argv: print("ACTIVE")\n')
    recorded = place.run("tpu_vm.sh", NAME="gla", ZONE="z", BUCKET="b")
    verbs = [arguments[3] for _, arguments, _ in recorded]
    assert verbs == ["create", "describe", "ssh", "ssh", "ssh"]
    on_hosts = [arguments[-1].removeprefix("--command=") for _, arguments, _ in recorded[2:]]
    for command in on_hosts:
        subprocess.run(["bash", "-n"], input=command, text=True, check=True)
    assert "gatedjax[tpu] @ git+https://" in on_hosts[0]
    words = shlex.split(on_hosts[2].replace("$", ""))
    assert "HOME/bucket" in on_hosts[2] and any(w.endswith("bin/gatedjax-train") for w in words)


def test_xpk_attaches_the_bucket_and_starts_the_command(place):
    place.recorder("xpk")
    attach, create = place.run("xpk.sh", CLUSTER="c", IMAGE="i", BUCKET="b")
    assert attach[1][:3] == ["storage", "attach", "gla-bucket"]
    assert create[1][:2] == ["workload", "create"] and "--storage=gla-bucket" in create[1]
    command = create[1][-1].removeprefix("--command=")
    # xpk's shell hands its SIGTERM to the shell around the command.
    assert shlex.split(command)[:2] == ["exec", "gatedjax-train"] and "\n" not in command


@pytest.mark.parametrize("recipe", ["ssh.sh", "tpu_vm.sh", "xpk.sh"])
def test_what_is_missing_is_named(recipe, tmp_path):
    """A script without its variables says which, and starts nothing."""
    done = subprocess.run(
        ["bash", LAUNCH / recipe], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and done.stderr.count("\n") == 1


def test_the_image_copies_and_installs_what_is_there():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    steps = [line.partition(" ") for line in lines if line and not line.startswith("#")]
    assert steps[0][2].startswith("python:3.12")
    run = next(rest for name, _, rest in steps if name == "RUN")
    assert run == 'pip install --no-cache-dir ".[$EXTRA,data,plots]"'
    command = json.loads(next(rest for name, _, rest in steps if name == "CMD"))
    assert command == ["gatedjax-train", "--config=tiny"]
    ignored = (ROOT / ".dockerignore").read_text().split()
    for needed in ("pyproject.toml", "setup.py", "configs", "gatedjax", "README.md", "LICENSE"):
        assert (ROOT / needed).exists() and needed not in ignored
