"""From one process to a pod: starts `jax.distributed` where there are several processes.

The same command runs everywhere. Under Slurm, Open MPI, on TPU VMs and in GKE jobs jax finds the
other processes by itself; elsewhere --coordinator, --num_processes and --process_id name them.
"""

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from gatedjax import paths
from gatedjax.errors import InputError, TrainingError
from gatedjax.runtime import stderr_filter
from gatedjax.runtime.meeting import Place, meet, split_address

# Defined on import: every command that can run on several processes has them.
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, where jax does not find it by itself."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes",
    None,
    "Processes of this run.",
    lower_bound=1,
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id",
    None,
    "Which of them this is, from 0.",
    lower_bound=0,
)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds",
    100,
    "A process that is silent for so long is lost, and the others stop.",
    lower_bound=5,
)
_JOIN = flags.DEFINE_integer(
    "join_seconds",
    45,
    "How long the processes that meet at --coordinator wait for each other.",
    lower_bound=1,
)

# Set by launchers that jax does not know. A size above 1, or an index above 0: others run the same
# command.
_SIZES = (
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "WORLD_SIZE",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_COUNT",
)
_INDICES = ("PMI_RANK", "RANK", "JAX_PROCESS_ID", "JOB_COMPLETION_INDEX")

# A file that one process made is seen by the others at once, or, over NFS, when its cached
# directory is older than this.
_VISIBLE_SECONDS = 15.0
# For processes that have met: what is left is jax's own start.
_JAX_START_SECONDS = 60


def start(checkpoints: paths.Place | None = None) -> None:
    """Joins the other processes of this run; call it before anything asks jax for devices.

    Args:
      checkpoints: where this command saves steps, for the message when another process is lost.

    Raises:
      InputError: flags that do not belong together, or a launcher started several processes that
        jax does not find.
      TrainingError: another process is not there.
    """
    # Its handler of SIGTERM would take the place of ours (see stop.py).
    jax.config.update("jax_enable_preemption_service", False)
    place = _given_place()
    if checkpoints is not None:
        # What is said of a bucket when another process is lost is nothing.
        checkpoints = None if paths.is_bucket(checkpoints) else Path(checkpoints)
    if place is not None:
        _start_at(place, checkpoints)
    elif not _found_by_jax():
        _require_alone()
    if jax.process_count() > 1:
        stderr_filter.install(checkpoints)


def require_same(what: str, value: object) -> None:
    """Checks that all processes have the same JSON value: else they would train on a mixture.

    Raises:
      InputError: they have not; on all processes.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(value, sort_keys=True)
    digest = hashlib.sha256(text.encode()).digest()[:8]
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint32))
    others = []
    for process, of_process in enumerate(digests):
        if (of_process != digests[0]).any():
            others.append(str(process))
    if others:
        raise InputError(
            f"{what}: got another value on process {', '.join(others)} than on process 0, "
            "expected the same on all"
        )


def require_same_folder(what: str, folder: paths.Place) -> None:
    """Checks that all processes see the same files in a folder; it is made if it does not exist.

    Raises:
      InputError: they do not, or process 0 cannot write there; on all processes.
    """
    if jax.process_count() == 1:
        return
    random = np.frombuffer(secrets.token_bytes(8), np.uint32)
    of_first = multihost_utils.broadcast_one_to_all(random)
    mark = folder / f".process-0-{of_first.tobytes().hex()}"
    problem = ""
    if jax.process_index() == 0:
        try:
            if not paths.is_bucket(folder):
                folder.mkdir(parents=True, exist_ok=True)
            mark.write_bytes(b"")
        except OSError as e:
            problem = f"{what}: process 0 cannot write to {folder}: {e.strerror or e}"
    _raise_on_all(problem)
    if not _becomes_visible(mark):
        problem = (
            f"{what}: process {jax.process_index()} does not see in {folder} what process 0 writes "
            "there, expected one folder for all"
        )
    try:
        _raise_on_all(problem)
    finally:
        if jax.process_index() == 0:
            mark.unlink(missing_ok=True)


def _becomes_visible(file: paths.Place) -> bool:
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _raise_on_all(problem: str) -> None:
    """InputError on all processes if one of them has a problem: none goes on alone."""
    has_problem = np.asarray(bool(problem))
    everybodys = np.atleast_1d(multihost_utils.process_allgather(has_problem))
    if problem:
        raise InputError(problem)
    if everybodys.any():
        numbers = ", ".join(map(str, np.flatnonzero(everybodys)))
        raise InputError(f"process {numbers} has a problem; its own message says which")


def _given_place() -> Place | None:
    """What the three flags say, or None where none of them is given.

    Raises:
      InputError: flags that do not belong together.
    """
    coordinator = _COORDINATOR.value
    num_processes = _NUM_PROCESSES.value
    process_id = _PROCESS_ID.value
    given = [f for f in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID) if f.value is not None]
    if not given:
        return None
    if coordinator is None or num_processes is None or process_id is None:
        raise InputError(
            f"--{given[0].name}: expected --coordinator, --num_processes and --process_id together"
        )
    if process_id >= num_processes:
        raise InputError(f"--process_id: got {process_id}, expected below {num_processes}")
    if split_address(coordinator) is None:
        raise InputError(f"--coordinator: got {coordinator!r}, expected host:port")
    return Place(coordinator, num_processes, process_id)


def _start_at(place: Place, checkpoints: Path | None) -> None:
    if place.num_processes > 1:
        meet(place, _JOIN.value)
        # Before the start: a process that is lost in it ends the others in pages of C++.
        stderr_filter.install(checkpoints)
    local = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    local_device_ids = None
    if local:
        local_device_ids = [int(i) for i in local.split(",")]
    with _plain_start_errors():
        jax.distributed.initialize(
            place.coordinator,
            place.num_processes,
            place.process_id,
            local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=_JAX_START_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT.value,
            # jax would listen at all addresses of the machine.
            coordinator_bind_address=place.bind_address,
        )


def _found_by_jax() -> bool:
    """Starts on what jax knows of clusters; False where it knows of none."""
    try:
        with _plain_start_errors():
            jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT.value)
    except ValueError as e:
        # jax's words for a coordinator, a count or an index that it could not find.
        if "should be defined" in str(e) or "must be defined" in str(e):
            return False
        raise
    return True


@contextlib.contextmanager
def _plain_start_errors() -> Iterator[None]:
    """Such as a port that is in use: one line."""
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        raise TrainingError(f"jax could not join the processes of this run: {e}") from None


def _require_alone() -> None:
    """Refuses to start where a launcher's environment tells of other processes.

    Each of them would believe to be alone, and all would train the same run.

    Raises:
      InputError: naming the variable.
    """
    largest_if_alone = dict.fromkeys(_SIZES, 1) | dict.fromkeys(_INDICES, 0)
    for name, largest in largest_if_alone.items():
        value = os.environ.get(name, "0")
        if value.isdigit() and int(value) > largest:
            raise InputError(
                f"{name} is {value}, but jax finds no cluster here: "
                "give --coordinator=HOST:PORT, --num_processes and --process_id"
            )
