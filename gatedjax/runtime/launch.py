"""From one process to a pod: starts `jax.distributed`, and hears when the machine is about to be
taken away.

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

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from gatedjax.errors import InputError
from gatedjax.runtime import stderr_filter

_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, where jax does not find it by itself."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Processes of this run.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this is, from 0.", lower_bound=0
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


def start() -> None:
    """Joins the other processes of this run; call it before anything asks jax for devices.

    Raises:
      InputError: flags that do not belong together, or a launcher started several processes that
        jax does not find.
    """
    given = {
        f.name: f.value for f in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID) if f.value is not None
    }
    if given:
        _start_as_given(given)
    elif not _found_by_jax():
        _require_alone()
        _start_alone()
    if jax.process_count() > 1:
        stderr_filter.install()


def preempted(step: int) -> bool:
    """Whether to save after this step and stop: some process got SIGTERM, and all processes agreed
    on this step.

    Every process calls it after each of its steps. A notice takes up to a second to be seen.
    """
    return multihost_utils.reached_preemption_sync_point(step)


def require_same(what: str, value: object) -> None:
    """InputError, on all processes, unless all of them came with the same JSON value: they would
    train on a mixture.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()[:8]
    everybodys = multihost_utils.process_allgather(np.frombuffer(digest, np.uint32))
    others = [str(i) for i, theirs in enumerate(everybodys) if (theirs != everybodys[0]).any()]
    if others:
        raise InputError(
            f"{what}: process {', '.join(others)} came with another one than process 0"
        )


def _start_as_given(given: dict) -> None:
    if len(given) < 3:
        raise InputError(
            f"--{next(iter(given))}: expected --coordinator, --num_processes and --process_id together"
        )
    if given["process_id"] >= given["num_processes"]:
        raise InputError(
            f"--process_id: got {given['process_id']}, expected below {given['num_processes']}"
        )
    if not given["coordinator"].rpartition(":")[2].isdigit():
        raise InputError(f"--coordinator: got {given['coordinator']!r}, expected host:port")
    if given["num_processes"] > 1:
        # here already: an address where nobody answers ends in pages of C++
        stderr_filter.install()
    names = given["coordinator"], given["num_processes"], given["process_id"]
    local = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    jax.distributed.initialize(
        *names,
        [int(i) for i in local.split(",")] if local else None,
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=_HEARTBEAT.value,
    )


def _found_by_jax() -> bool:
    """Starts on what jax knows of clusters; False where it knows of none."""
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT.value)
    except ValueError as e:
        if "should be defined" in str(e) or "must be defined" in str(e):
            return False
        raise
    return True


def _start_alone() -> None:
    """A coordinator on a socket without a port: nobody else can take it, and no network is
    needed.
    """
    name = f"gatedjax-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    address = (
        f"unix-abstract:{name}"
        if sys.platform == "linux"
        else f"unix:{Path(tempfile.gettempdir(), name)}"
    )
    # gRPC would ask a proxy for that socket, and wait for ever.
    proxies = {
        v: os.environ.pop(v)
        for v in list(os.environ)
        if v.lower() in ("http_proxy", "https_proxy", "grpc_proxy")
    }
    try:
        jax.distributed.initialize(
            address, 1, 0, coordinator_bind_address=address, cluster_detection_method="deactivate"
        )
    finally:
        os.environ.update(proxies)


def _require_alone() -> None:
    """Several processes that each believe to be alone would train the same run several times
    over.
    """
    alone = dict.fromkeys(_SIZES, 1) | dict.fromkeys(_INDICES, 0)
    for name, most in alone.items():
        value = os.environ.get(name, "0")
        if value.isdigit() and int(value) > most:
            raise InputError(
                f"{name} is {value}, but jax finds no cluster here: give --coordinator=HOST:PORT, --num_processes "
                "and --process_id"
            )
