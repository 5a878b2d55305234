"""The supervisor: starts again after a crash, later each time; not what would fail again; passes
SIGTERM on.
"""

import signal
import subprocess
import sys
import time

from processes import ROOT

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
