"""One folder of text, tokens and compiled programs for all tests here, and one undisturbed run on 2
x 4 devices.
"""

import shutil
from pathlib import Path

import pytest
from processes import MESH, run, write_text


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    write_text(folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed(place) -> str:
    """A finished run of 2 processes x 4 devices, with checkpoints of steps 4, 8 and 12."""
    for process in run(place, "undisturbed", MESH, processes=2, devices=4):
        assert process.popen.returncode == 0, process.log()
    return "undisturbed"


@pytest.fixture
def from_step_4(place, undisturbed, request) -> str:
    """A copy of that run as it was after step 4."""
    name = f"copy-{request.node.name}"
    shutil.copytree(place / undisturbed, place / name)
    for step in ("8", "12"):
        shutil.rmtree(place / name / "checkpoints" / step)
    return name
