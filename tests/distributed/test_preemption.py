"""SIGTERM: all save the same step and exit 0. kill -9: the others stop with one line. Then on, to
the bit.
"""

import signal
import time

import pytest
from processes import MESH, is_step, losses, run, started, steps_on_disk

LONG = "--config.train.steps=100000"
# the learning rate does not depend on the number of steps
SEPARATE = "--config.optim.schedule=constant"


@pytest.mark.slow
def test_sigterm_to_any_process_saves_one_step_and_exits_0(place):
    flags = [MESH, SEPARATE, "--config.train.checkpoint_every=100000"]
    with started(place, "preempted", *flags, LONG, processes=2) as running:
        running[0].wait_for(is_step(3))
        running[1].popen.send_signal(signal.SIGTERM)
        assert [process.wait() for process in running] == [0, 0], (
            running[0].log() + running[1].log()
        )
    (step,) = steps_on_disk(place, "preempted")
    assert any(
        f"stopped by SIGTERM: step {step} of 100000 is saved" in line for line in running[0].out
    )
    assert max(losses(place, "preempted")) == step
    before = losses(place, "preempted")
    run(place, "preempted", *flags, f"--config.train.steps={step + 3}", processes=2)
    run(place, "straight", *flags, f"--config.train.steps={step + 3}", processes=2)
    assert losses(place, "preempted") == losses(place, "straight") and len(before) == step


def test_sigterm_to_a_single_process(place):
    with started(place, "alone", LONG, devices=1) as running:
        running[0].wait_for(is_step(5))
        running[0].popen.send_signal(signal.SIGTERM)
        assert running[0].wait() == 0, running[0].log()
    assert "the same command goes on from there" in running[0].out[-1]
    assert str(max(steps_on_disk(place, "alone"))) in running[0].out[-1]


def rounds(running):
    """What came of the trainings, and the step that each process saved last."""
    ends = []
    for process in running:
        lines = [line.split() for line in process.out if line.startswith("round ")]
        ends.append([(end.strip(","), int(step)) for _, _, end, step in lines])
    return ends


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_no_sigterm_is_lost(place, processes):
    """At checkpoints every four steps of milliseconds, jax's own counter lost one in three."""
    count = 30
    running = run(
        place,
        f"stops-{processes}",
        "--config.train.steps=1500",
        "--config.train.checkpoint_every=4",
        "--config.train.log_every=1000",
        script="tests/distributed/stopped_train.py",
        processes=processes,
        devices=1,
        env={"ROUNDS": str(count)},
    )
    for process in running:
        assert process.popen.returncode == 0, process.log()
    ends = rounds(running)
    assert [end for end, _ in ends[0]] == ["stopped"] * count
    assert all(of_process == ends[0] for of_process in ends)
    assert len({step for _, step in ends[0]}) > 1, "the moments differ"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([signal.SIGTERM] * 3, 0),
        ([signal.SIGHUP], 0),
        ([signal.SIGINT], 130),
        ([signal.SIGHUP, signal.SIGTERM, signal.SIGTERM], 0),
    ],
)
def test_other_signals_and_many_of_them(place, signals, code):
    name = "-".join(str(int(number)) for number in signals)
    with started(place, f"signals-{name}", LONG, devices=1) as (process,):
        process.wait_for(is_step(5))
        for number in signals:
            process.popen.send_signal(number)
        assert process.wait() == code, process.log()
    assert process.out[-1].startswith(f"stopped by {signals[0].name}: step "), process.log()
    assert not process.err, process.log()


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_the_others_within_the_heartbeat(place, victim):
    with started(
        place, f"killed-{victim}", MESH, LONG, "--heartbeat_seconds=10", processes=2
    ) as running:
        # Step 8 is saved when step 4 has been.
        running[0].wait_for(is_step(9))
        running[victim].popen.send_signal(signal.SIGKILL)
        start = time.monotonic()
        other = running[1 - victim]
        assert other.wait() not in (0, 2), other.log()
        assert time.monotonic() - start < 10 + 20  # the heartbeat, and a busy machine
    said = [line for line in other.err if line.strip()]
    assert len(said) == 1 and said[0].startswith("error: ") and "lost" in said[0], other.log()
    assert "the last checkpoint is intact" in said[0]
