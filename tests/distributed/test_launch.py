"""How a run finds its processes: flags, Slurm's environment, and launchers that nobody has told
about each other.
"""

import os
import random
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver
from processes import MESH, ROOT, run

from gatedjax.errors import InputError
from gatedjax.runtime import launch, stderr_filter


@pytest.fixture
def given():
    """Flags as if parsed."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["pytest"])

    def give(**values):
        return flagsaver.flagsaver(**values)

    return give


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            dict(coordinator="h:1"),
            "--coordinator: expected --coordinator, --num_processes and --process_id together",
        ),
        (dict(process_id=1), "--process_id: expected --coordinator"),
        (
            dict(coordinator="h:1", num_processes=2, process_id=2),
            "--process_id: got 2, expected below 2",
        ),
        (
            dict(coordinator="host", num_processes=2, process_id=0),
            "--coordinator: got 'host', expected host:port",
        ),
    ],
)
def test_flags_that_do_not_belong_together(given, values, message):
    with given(**values), pytest.raises(InputError, match=message):
        launch.start()


@pytest.mark.parametrize(
    ("name", "value"), [("PMI_SIZE", "4"), ("WORLD_SIZE", "2"), ("JOB_COMPLETION_INDEX", "1")]
)
def test_an_unknown_launcher_of_several_processes_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(
        InputError, match=f"{name} is {value}, but jax finds no cluster here: give --coordinator"
    ):
        launch._require_alone()


def test_one_process_of_such_a_launcher_is_alone(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    launch._require_alone()


def test_one_process_needs_no_coordinator():
    """Nothing listens that a stranger could join, and no proxy is asked."""
    code = """
import jax
from absl import flags
from gatedjax.runtime import launch
flags.FLAGS(["x"])
launch.start()
print(jax.process_count(), jax.distributed.is_initialized())
"""
    env = os.environ | {"http_proxy": "http://localhost:1", "HTTPS_PROXY": "http://localhost:1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "1 False\n"), done.stderr


@pytest.mark.slow
def test_processes_with_different_flags_are_refused(place):
    each = [["--config.data.seed=1"], ["--config.data.seed=2"]]
    running = run(place, "different", MESH, processes=2, each_flags=each)
    for process in running:
        assert process.wait() == 2, process.log()
        assert "configuration: got another value on process 1 than on process 0" in process.err[-1]


@pytest.mark.slow
def test_processes_with_different_folders_are_refused(place):
    each = [[f"--workdir={place / name}"] for name in ("folder-0", "folder-1")]
    running = run(place, "unused", MESH, processes=2, each_flags=each)
    assert [process.wait() for process in running] == [2, 2], running[0].log()
    for process in running:
        assert sum(line.startswith("error: ") for line in process.err) == 1, process.log()
    assert "--workdir: process 1 does not see in" in running[1].err[-1]
    assert not (place / "folder-0" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "codes", "message"),
    [
        ([], ["--process_id=0"], [2, 2], "--process_id: got 0 on two processes"),
        ([], ["--num_processes=3"], [2, 2], "--num_processes: got 3 on process 1"),
        ([], ["--coordinator=localhost:9"], [1, 1], "process 1 of 2 did not come"),
        (["--coordinator=192.0.2.1:7000"], [], [2, 1], "process 0 cannot listen at 192.0.2.1"),
    ],
)
def test_processes_that_do_not_meet_end_with_a_line(place, first, second, codes, message):
    """Each within seconds: jax alone waits for five minutes, and then prints a stack trace."""
    each = [["--join_seconds=20", *first], ["--join_seconds=20", *second]]
    running = run(place, "unmet", MESH, processes=2, each_flags=each)
    assert [process.wait() for process in running] == codes, running[0].log() + running[1].log()
    for process in running:
        assert len(process.err) == 1 and process.err[0].startswith("error: "), process.log()
    assert message in running[0].err[0]


# What jaxlib 0.12 writes on stderr when the coordinator is lost; shortened.
LOST = """\
W1121 09:39:56.377951   32723 preemption_sync_manager.cc:147] Failed to retrieve preemption notice: UNAVAILABLE
Additional GRPC error information from remote target coordination_service while calling /xla.Coordination/GetKeyValue:
:UNAVAILABLE:Stream removed (Socket closed)
=== Source Location Trace: ===
external/xla+/xla/tsl/distributed_runtime/rpc/grpc_util.h:89
 for task: 0
a line of Python
E1121 09:39:56.378081   32723 coordination_service_agent.cc:288] Polled an error from coordination service.
F1121 09:39:56.378091   32723 client.h:86] Terminating process because the JAX distributed service detected fatal \
errors. This most likely indicates that another task died. absl::Status: UNAVAILABLE: Failed to send RPC. Check logs.
*** Check failure stack trace: ***
    @     0x7f1ff22f81b4  absl::lts_20260526::log_internal::LogMessage::SendToLog()
"""


def test_pages_of_cpp_become_one_line():
    lines = list(stderr_filter.filtered(LOST.splitlines(keepends=True)))
    assert lines[0] == "a line of Python\n" and len(lines) == 2
    assert lines[1] == stderr_filter.LOST.format(reason="UNAVAILABLE: Failed to send RPC") + "\n"


@pytest.mark.slow
def test_slurm_is_found_in_the_environment(place):
    """What srun sets, on two processes of this machine; no flag names them."""
    job = str(random.randrange(1, 4096))
    names = {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    each = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    running = run(
        place,
        "slurm",
        MESH,
        "--config.train.steps=3",
        processes=2,
        env=names,
        each=each,
        is_named=False,
    )
    assert [process.popen.returncode for process in running] == [0, 0], (
        running[0].log() + running[1].log()
    )
    assert "8 cpu device(s) of 2 processes, mesh data 2 x fsdp 4" in running[0].out[0]
