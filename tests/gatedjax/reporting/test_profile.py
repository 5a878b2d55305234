"""A trace of some steps is written, however the loop ends."""

import pytest

from gatedjax.reporting import profile


@pytest.fixture
def profiler(monkeypatch):
    """Notes starts and stops in place of jax's profiler."""
    events = []
    monkeypatch.setattr(profile.jax.profiler, "start_trace", lambda _: events.append("start"))
    monkeypatch.setattr(profile.jax.profiler, "stop_trace", lambda: events.append("stop"))
    return events


@pytest.mark.parametrize(
    ("first", "start", "last", "events"),
    [
        (0, 0, 20, []),
        (3, 0, 20, [3, "start", 8, "stop"]),
        # The first step compiles.
        (1, 0, 20, [2, "start", 7, "stop"]),
        (3, 10, 20, [12, "start", 17, "stop"]),
        # The run ends before the trace does.
        (18, 0, 20, [18, "start", "stop"]),
        (20, 0, 20, [20, "start", "stop"]),
        (16, 0, 20, [16, "start", 21, "stop"]),
        (21, 0, 20, []),
        (99, 0, 20, []),
        (19, 20, 20, []),
    ],
)
def test_which_steps_are_traced(profiler, tmp_path, first, start, last, events):
    said = []
    with profile.StepTrace(first, start, last, tmp_path, said.append) as trace:
        for step in range(start + 1, last + 1):
            before = len(profiler)
            trace.after(step)
            if len(profiler) > before:
                profiler.insert(before, step + 1)
    assert profiler == events
    assert len(said) == (first > 0)


@pytest.mark.parametrize("at", [3, 5])
def test_a_run_that_fails_leaves_its_trace(profiler, tmp_path, at):
    trace = profile.StepTrace(3, 0, 20, tmp_path, str)
    with pytest.raises(ValueError, match="diverged"), trace:
        for step in range(1, at + 1):
            trace.after(step)
        raise ValueError("diverged")
    assert profiler == ["start", "stop"]
