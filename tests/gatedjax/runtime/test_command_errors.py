"""What ends a command with a line, what is a bug and keeps its traceback, and what is said of
checkpoints.
"""

import errno
import signal

import jax
import pytest

from gatedjax.errors import InputError, StorageError, TrainingError
from gatedjax.runtime import cli, stderr_filter
from gatedjax.runtime.stop import Stopped
from gatedjax.training.run_directory import plain_errors


class Ended(BaseException):
    pass


@pytest.fixture
def ended(monkeypatch, capsys):
    """Runs a call that raises, as a command; gives exit code and stderr."""

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(cli.os, "_exit", end)
    monkeypatch.setattr(cli, "_checkpoints", None)
    monkeypatch.setattr(cli, "_LEAVE_LAST_SECONDS", 0.0)

    def run(exception):
        def call():
            raise exception

        with pytest.raises(Ended) as caught:
            cli._guarded(call)
        return caught.value.args[0], capsys.readouterr().err

    return run


@pytest.fixture
def of_several(monkeypatch):
    monkeypatch.setattr(cli, "_processes", lambda: 2)


@pytest.fixture
def saved(tmp_path):
    (tmp_path / "40").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("exception", "code"),
    [
        (InputError("bad"), 2),
        (StorageError("bad"), 1),
        (TrainingError("bad"), 1),
        (FileNotFoundError(errno.ENOENT, "bad", "file"), 2),
        (PermissionError(errno.EACCES, "bad", "file"), 2),
        (OSError(errno.ENOSPC, "bad"), 2),
        (OSError(errno.EIO, "bad"), 1),
        (OSError(errno.ESTALE, "bad"), 1),
        (OSError(errno.EDQUOT, "bad"), 2),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(errno.EPIPE, "bad"), 141),
    ],
)
def test_one_line_and_a_code(ended, monkeypatch, exception, code):
    monkeypatch.setattr(cli.streams, "connect_to_nothing", lambda _: None)
    ended_with, err = ended(exception)
    assert ended_with == code
    assert err.count("\n") == (code != 141) and "checkpoint" not in err


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGINT, 130)]
)
def test_a_signal_outside_the_steps(ended, number, code):
    assert ended(Stopped(number)) == (code, f"stopped by {number.name}\n")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("of_tensorstore", [False, True])
def test_a_disk_that_may_work_again_is_no_bad_input(number, of_tensorstore):
    said = ValueError(f"write failed [os_error_code='{number}']")
    with pytest.raises(StorageError, match="could not save: "), plain_errors("could not save"):
        raise said if of_tensorstore else OSError(number, "bad")
    for final in (PermissionError(errno.EACCES, "bad"), OSError(errno.ENOSPC, "full")):
        with pytest.raises(InputError) as caught, plain_errors("could not save"):
            raise final
        assert not isinstance(caught.value, StorageError)


OURS = [
    ValueError("the barrier of step 3 has no name"),
    RuntimeError("nccl is not what this mesh needs"),
    KeyError("heartbeat"),
    AssertionError("gloo: connection closed"),
    jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile: barrier semaphore misused"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory in nccl all-reduce buffers"),
]


@pytest.mark.parametrize("bug", OURS, ids=str)
@pytest.mark.usefixtures("of_several", "ended")
def test_a_bug_that_mentions_other_processes_keeps_its_traceback(bug):
    def call():
        raise bug

    with pytest.raises(type(bug)):
        cli._guarded(call)


LOSSES = [
    "UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:4242",
    "DEADLINE_EXCEEDED: Barrier timed out. Id: save::3",
    "UNAVAILABLE: Failed to send RPC to coordination service. Socket closed",
    "INTERNAL: NCCL operation failed: unhandled system error",
    "INTERNAL: NCCL operation ncclAllReduce failed: remote process exited",
]


@pytest.mark.parametrize("words", LOSSES)
@pytest.mark.usefixtures("of_several")
def test_a_lost_process_is_one_line(ended, words, saved):
    code, err = ended(jax.errors.JaxRuntimeError(words))
    assert code == 1 and err.count("\n") == 1 and "another process of this run was lost" in err
    assert "checkpoint" not in err
    cli.saves_to(saved)
    assert ended(jax.errors.JaxRuntimeError(words))[1].endswith("; the last checkpoint is intact\n")


@pytest.mark.usefixtures("of_several")
def test_a_lost_process_behind_another_error_is_found(ended):
    """As orbax raises it: an OSError without an errno."""
    error = TimeoutError("Timeout waiting at barrier 'save'")
    error.__cause__ = jax.errors.JaxRuntimeError(LOSSES[1])
    code, err = ended(error)
    assert code == 1 and "another process of this run was lost" in err


@pytest.mark.parametrize("end", [TrainingError("diverged"), KeyboardInterrupt(), StorageError("x")])
def test_only_who_has_a_checkpoint_says_so(ended, saved, tmp_path, end):
    """Of training: a folder without steps, or with half of one, is none."""
    assert "checkpoint" not in ended(end)[1]
    cli.saves_to(tmp_path / "not yet")
    assert "checkpoint" not in ended(end)[1]
    (tmp_path / "begun" / "4.orbax-checkpoint-tmp").mkdir(parents=True)
    cli.saves_to(tmp_path / "begun")
    assert "checkpoint" not in ended(end)[1]
    cli.saves_to(saved)
    assert ended(end)[1].endswith("; the last checkpoint is intact\n")
    assert "checkpoint" not in ended(InputError("bad"))[1]


FATAL = (
    "F1121 09:39:56.378091   32723 client.h:86] Terminating process because the JAX distributed "
    "service detected fatal errors. absl::Status: UNAVAILABLE: Failed to send RPC. Check logs.\n"
)


def test_the_filter_says_so_too(saved):
    (without,) = stderr_filter.filtered([FATAL])
    (with_one,) = stderr_filter.filtered([FATAL], saved)
    assert with_one == without.removesuffix("\n") + "; the last checkpoint is intact\n"


@pytest.mark.parametrize("folder", ["~/xla", "~nobody-at-all/xla"])
def test_a_compilation_cache_without_a_home_is_none(monkeypatch, capsys, folder):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError()))
    before = jax.config.jax_compilation_cache_dir
    cli.use_compilation_cache(folder)
    assert jax.config.jax_compilation_cache_dir == before
    assert "warning: no compiled programs are kept: --compile_cache" in capsys.readouterr().err
