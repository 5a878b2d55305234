"""From one process to a pod: starts `jax.distributed`, and notices a coming preemption.

The same command runs everywhere. Under Slurm, Open MPI, on TPU VMs and in GKE jobs jax finds the
other processes by itself; elsewhere --coordinator, --num_processes and --process_id name them;
alone, a run is its own coordinator. It is always started, for one process too: only then does
SIGTERM mean "save and stop" instead of death.
"""

import hashlib
import json
import os
import sys
import tempfile
import uuid
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from gatedjax.errors import InputError
from gatedjax.runtime import stderr_filter

# Defined on import: every command that can run on several processes has the same four.
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

_PROXIES = ("http_proxy", "https_proxy", "grpc_proxy")


class _Place(NamedTuple):
    """The place of this process in its run, as the flags give it."""

    coordinator: str
    num_processes: int
    process_id: int


def start() -> None:
    """Joins the other processes of this run; call it before anything asks jax for devices.

    Raises:
      InputError: flags that do not belong together, or a launcher started several processes that
        jax does not find.
    """
    place = _given_place()
    if place is not None:
        _start_at(place)
    elif not _found_by_jax():
        _require_alone()
        _start_alone()
    if jax.process_count() > 1:
        stderr_filter.install()


def preempted(step: int) -> bool:
    """Whether to save after this step and stop.

    True if some process got SIGTERM, and all processes agreed on this step. Every process calls it
    after each of its steps. A notice takes up to a second to be seen.
    """
    return multihost_utils.reached_preemption_sync_point(step)


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


def _given_place() -> _Place | None:
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
    if not coordinator.rpartition(":")[2].isdigit():
        raise InputError(f"--coordinator: got {coordinator!r}, expected host:port")
    return _Place(coordinator, num_processes, process_id)


def _start_at(place: _Place) -> None:
    if place.num_processes > 1:
        # Before the start: an address where nobody answers ends in pages of C++.
        stderr_filter.install()
    local = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    local_device_ids = None
    if local:
        local_device_ids = [int(i) for i in local.split(",")]
    jax.distributed.initialize(
        place.coordinator,
        place.num_processes,
        place.process_id,
        local_device_ids,
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=_HEARTBEAT.value,
    )


def _found_by_jax() -> bool:
    """Starts on what jax knows of clusters; False where it knows of none."""
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT.value)
    except ValueError as e:
        # jax's words for a coordinator, a count or an index that it could not find.
        if "should be defined" in str(e) or "must be defined" in str(e):
            return False
        raise
    return True


def _start_alone() -> None:
    """Starts with a coordinator on a socket without a port.

    Nobody else can take it, and no network is needed.
    """
    name = f"gatedjax-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    if sys.platform == "linux":
        address = f"unix-abstract:{name}"
    else:
        address = f"unix:{Path(tempfile.gettempdir(), name)}"
    # gRPC would ask a proxy for that socket, and wait for ever.
    proxies = {}
    for variable in list(os.environ):
        if variable.lower() in _PROXIES:
            proxies[variable] = os.environ.pop(variable)
    try:
        jax.distributed.initialize(
            address,
            num_processes=1,
            process_id=0,
            coordinator_bind_address=address,
            cluster_detection_method="deactivate",
        )
    finally:
        os.environ.update(proxies)


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
