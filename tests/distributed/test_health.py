"""A NaN, a spike, a step that hangs, data that goes away: survived, or ended with one clear line,
and counted.
"""

import os
import re
import shutil

import pytest
from processes import is_step, losses, records, run, started, steps_on_disk

FAULTY = "tests/distributed/faulty_train.py"


def faulty(place, workdir, fault, *flags):
    (process,) = run(place, workdir, *flags, script=FAULTY, devices=1, env={"FAULT": fault})
    return process


def test_a_nan_is_skipped_said_and_counted(place):
    process = faulty(place, "nan", "nan:5")
    assert process.popen.returncode == 0, process.log()
    assert any(
        line.startswith("step 5: skipped, loss nan, gradient norm nan (1 skipped")
        for line in process.out
    )
    assert [r["skipped_steps"] for r in records(place, "nan")] == [0.0] * 4 + [1.0] * 8


@pytest.mark.slow
def test_a_spike_is_skipped_said_and_counted(place):
    process = faulty(
        place, "spike", "spike:25", "--config.train.steps=27", "--config.optim.skip_factor=5.0"
    )
    assert process.popen.returncode == 0, process.log()
    assert any(
        line.startswith("step 25: skipped, loss ") and "nan" not in line for line in process.out
    ), process.log()
    assert records(place, "spike")[-1]["skipped_steps"] == 1


@pytest.mark.slow
def test_nothing_but_nan_ends_the_run_with_one_line(place):
    process = faulty(place, "nans", "nan:5-99", "--config.optim.max_skips=3")
    assert process.popen.returncode == 1, process.log()
    assert (
        "step 8: 4 steps in a row were skipped" in process.err[-1]
        and "Traceback" not in process.log()
    )
    assert steps_on_disk(place, "nans")[0] == 4


@pytest.mark.slow
def test_a_stall_that_ends_is_survived_and_counted(place):
    process = faulty(place, "stall", "stall:6")
    assert process.popen.returncode == 0, process.log()
    assert (
        records(place, "stall")[-1]["step"] == 12
        and sum(r.get("stalls", 0) for r in records(place, "stall")) >= 1
    )
    assert any(line.startswith("warning: step 6: nothing happened for") for line in process.err), (
        process.log()
    )
    stacks = (place / "stall" / "stacks-0.txt").read_text()
    assert (
        "faulty_train.py" in stacks and stacks.count("hread 0x") > 3
    )  # where it stood, and the other threads


@pytest.mark.slow
def test_a_step_that_never_ends_is_ended_with_one_line(place):
    process = faulty(place, "stuck", "stuck:6")
    assert process.popen.returncode == 1, process.log()
    assert process.err[-1].startswith("error: step 6: nothing happened for"), process.log()
    assert (place / "stuck" / "stacks-0.txt").exists() and 4 in steps_on_disk(place, "stuck")


@pytest.mark.parametrize("what", ["cut", pytest.param("deleted", marks=pytest.mark.slow)])
def test_data_that_goes_away_under_a_run(place, tmp_path, what):
    """A token cache cut short ends the run with a line; deleted with its source, the run still has
    what it opened.
    """
    shutil.copytree(place / "text", tmp_path / "text")
    (tmp_path / "xla").symlink_to(place / "xla")
    flags = ["--config.train.steps=3000", "--config.train.log_every=10"] if what == "cut" else []
    with started(tmp_path, "run", *flags, devices=1) as (process,):
        process.wait_for(is_step(1))
        (tokens,) = (tmp_path / "tokens").glob("*/train.tokens")
        if what == "cut":
            os.truncate(tokens, 100)
        else:
            shutil.rmtree(tmp_path / "tokens")
            shutil.rmtree(tmp_path / "text")
        code = process.wait()
    assert "Traceback" not in process.log()
    if what == "cut":
        assert code == 1 and re.search(
            r"train\.tokens: \d+ bytes could be read, expected 66", process.err[-1]
        ), process.log()
    else:
        assert code == 0 and max(losses(tmp_path, "run")) == 12, process.log()
        assert any(line.startswith("no picture: ") for line in process.out)


def test_a_warm_start_compiles_nothing_and_waits_are_in_the_log(place):
    programs = lambda: {p.name for p in (place / "xla").iterdir() if p.name.endswith("-cache")}
    for name in ("cold", "warm"):
        before = programs() if (place / "xla").exists() else set()
        (process,) = run(place, name, "--config.train.steps=5", devices=1)
        assert process.popen.returncode == 0, process.log()
    assert before and programs() == before
    assert losses(place, "cold") == losses(place, "warm")
    log = records(place, "warm")
    assert log[0]["first_step_s"] > 0 and all(r["data_wait_s"] >= 0 for r in log)
    assert [r["step"] for r in log if "checkpoint_s" in r] == [5], (
        "step 4 is saved after its record is written"
    )
