"""The supervisor: starts again after a crash, later each time; not what would fail again; passes
signals on, and leaves nothing running.
"""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import ROOT

from gatedjax.runtime import supervise as supervisor

pytestmark = pytest.mark.usefixtures("signals_of_a_terminal")

COUNTING = """
import pathlib, sys, time
log = pathlib.Path(sys.argv[1])
log.write_text((log.read_text() if log.exists() else "") + f"{time.time()}\\n")
codes = [int(c) for c in sys.argv[2].split(",")]
n = len(log.read_text().split())
sys.exit(codes[min(n, len(codes)) - 1])
"""


def supervise(tmp_path, codes, *flags):
    log = tmp_path / "starts"
    command = [
        sys.executable,
        "-m",
        "gatedjax.runtime.supervise",
        *flags,
        "--",
        sys.executable,
        "-c",
        COUNTING,
        log,
        codes,
    ]
    result = subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    return result, [float(t) for t in log.read_text().split()]


def test_crashes_are_started_again_with_growing_pauses(tmp_path):
    result, starts = supervise(tmp_path, "1,134,0", "--wait=0.3")
    assert result.returncode == 0 and len(starts) == 3
    assert starts[1] - starts[0] >= 0.3 and starts[2] - starts[1] >= 0.6
    assert "supervise: exit code 1; crash 1 in a row, starting again in 0.3 s" in result.stderr
    assert (
        "supervise: signal 6 (SIGABRT); crash 2 in a row, starting again in 0.6 s" in result.stderr
    )


def test_a_command_that_begins_anew_each_time_is_refused(monkeypatch, capsys):
    command = ["supervise", "--", "gatedjax-train", "--config=tiny", "--fresh"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        supervisor.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("supervise: --fresh: every start would begin")
    assert error.count("\n") == 1


def test_it_gives_up_and_keeps_the_code(tmp_path):
    result, starts = supervise(tmp_path, "7", "--wait=0.05", "--tries=2", "--longest_wait=0.05")
    assert (result.returncode, len(starts)) == (
        7,
        3,
    ) and "3 crashes in a row, giving up" in result.stderr


def test_bad_input_is_not_tried_again(tmp_path):
    result, starts = supervise(tmp_path, "2")
    assert (result.returncode, len(starts), result.stderr) == (2, 1, "")


def test_sigterm_goes_on_to_the_command_and_ends_both(tmp_path):
    child = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(0)); "
        "print('up', flush=True); time.sleep(99)"
    )
    command = [
        sys.executable,
        "-m",
        "gatedjax.runtime.supervise",
        "--",
        sys.executable,
        "-c",
        child,
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    process.stdout.close()


def started_supervisor(child, *flags, **how):
    command = [sys.executable, "-m", "gatedjax.runtime.supervise", *flags, "--"]
    process = subprocess.Popen(
        [*command, sys.executable, "-c", child],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **how,
    )
    return process


# Tells its number, then what signal ended it; after 99 s it ends by itself.
TELLING = """
import os, signal, sys, time
def end(number, _):
    print(signal.Signals(number).name, flush=True)
    sys.exit(0)
for number in (1, 2, 15):
    signal.signal(number, end)
print(os.getpid(), flush=True)
time.sleep(99)
"""


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def ends_soon(pid):
    deadline = time.monotonic() + 30
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (255, "exit code 255"),
        (200, "exit code 200"),
        (193, "exit code 193"),
        (168, "signal 40 (SIGRTMIN+6)"),
        (3, "exit code 3"),
    ],
)
def test_any_exit_code_is_a_crash_that_is_started_again(tmp_path, code, said):
    result, starts = supervise(tmp_path, f"{code}", "--wait=0.01", "--tries=1")
    assert (result.returncode, len(starts)) == (code, 2), result.stderr
    assert f"supervise: {said}; crash 1 in a row, starting again" in result.stderr


@pytest.mark.parametrize("number", [9, 11, 34, 40, 50, 64])
def test_any_signal_may_end_the_command(number):
    process = started_supervisor(
        f"import os; os.kill(os.getpid(), {number})", "--wait=0.01", "--tries=1"
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err.count(f"signal {number} (SIG") == 2 and "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stop_signals_go_on_to_the_command_once(number):
    process = started_supervisor(TELLING)
    pid = int(process.stdout.readline())
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, f"{number.name}\n", "")
    assert not is_alive(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_the_command_ends_with_a_killed_supervisor():
    process = started_supervisor(TELLING)
    pid = int(process.stdout.readline())
    process.kill()
    assert process.stdout.readline() == "SIGTERM\n" and ends_soon(pid)
    process.communicate(timeout=60)


def test_what_a_shell_started_gets_the_signal_too(tmp_path):
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {TELLING!r}])"
    process = started_supervisor(script)
    pid = int(process.stdout.readline())
    process.terminate()
    assert process.stdout.readline() == "SIGTERM\n" and ends_soon(pid)
    process.communicate(timeout=60)


def test_a_signal_while_the_command_is_being_started(monkeypatch):
    """It reaches the command all the same; earlier it killed the supervisor alone."""
    popen = subprocess.Popen

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return popen(*args, **kwargs)

    monkeypatch.setattr(supervisor.subprocess, "Popen", interrupted)
    start = time.monotonic()
    code = supervisor.supervise([sys.executable, "-c", "import time; time.sleep(99)"], 5, 1, 1)
    assert code == 128 + signal.SIGTERM and time.monotonic() - start < 60


def test_a_signal_between_two_starts_ends_it():
    process = started_supervisor("raise SystemExit(7)", "--wait=90")
    assert "starting again" in process.stderr.readline()
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 7


def test_nohup_is_respected():
    process = started_supervisor(
        "import signal; print(signal.getsignal(1) == signal.SIG_IGN)",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert process.communicate(timeout=60)[0] == "True\n"


def test_a_start_that_may_work_later_is_tried_again(monkeypatch, capsys):
    popen = subprocess.Popen
    problems = [OSError(errno.EIO, "Input/output error"), OSError(errno.EAGAIN, "try again")]

    def troubled(*args, **kwargs):
        if problems:
            raise problems.pop(0)
        return popen(*args, **kwargs)

    monkeypatch.setattr(supervisor.subprocess, "Popen", troubled)
    assert supervisor.supervise([sys.executable, "-c", ""], 5, 0.01, 1) == 0
    assert "supervise: exit code 126; crash 2 in a row" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag",
    ["--wait=nan", "--wait=-1", "--wait=inf", "--longest_wait=nan", "--tries=-1", "--tries=x"],
)
def test_numbers_that_make_no_sense_are_refused(tmp_path, flag):
    command = [sys.executable, "-m", "gatedjax.runtime.supervise", flag, "--", "true"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert f"got '{flag.partition('=')[2]}', expected" in result.stderr


def test_a_command_that_is_not_there_is_one_line():
    command = [sys.executable, "-m", "gatedjax.runtime.supervise", "--", "/nowhere/command"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)


def test_nobody_reads_what_the_supervisor_says(tmp_path):
    process = started_supervisor("raise SystemExit(1)", "--wait=0.3", "--tries=2")
    process.stderr.close()
    assert process.wait(60) == 1
    process.stdout.close()
