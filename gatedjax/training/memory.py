"""Whether a run can fit, told from shapes alone: before anything is allocated."""

import math
import os
from pathlib import Path

import jax
from jaxtyping import PyTree

from gatedjax.errors import InputError
from gatedjax.sharding import parts
from gatedjax.training.run import Run

# Limits of a container, of either version of Linux's control groups.
_CGROUP_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def require_memory(run: Run) -> None:
    """Refuses what could not fit, whatever the compiler did.

    Two bounds from below: parameters, optimizer state, averages and a teacher's parameters, which
    are there all the time; and with them the last hidden states of one micro-batch, which every
    step holds.

    Raises:
      InputError: naming the key, what is needed and what there is.
    """
    device = jax.local_devices()[0]
    available = device_memory(device)
    if available is None:
        return
    # Simulated devices share the memory of the host.
    sharing = jax.local_device_count() if device.platform == "cpu" else 1
    own = sharing * _total(run.abstract)
    of_teacher = 0 if run.teacher is None else sharing * _total(run.teacher.params)
    state = own + of_teacher
    there_is = f"at most the {size(available)} of this machine's {device.device_kind}"
    if state > available:
        got = f"got parameters and optimizer state of {size(own)}"
        if of_teacher:
            got += f" and a teacher's parameters of {size(of_teacher)}"
        raise InputError(f"config.model: {got}, expected {there_is}")
    hidden = sharing * _hiddenbytes_on_a_device(run)
    if state + hidden > available:
        got = f"got hidden states of {size(hidden)} beside a state of {size(state)}"
        raise InputError(
            f"config.train.batch_size: {got}, expected {there_is}; "
            "accumulation_steps cuts the batch into smaller pieces"
        )


def _total(tree: PyTree) -> int:
    """Bytes of abstract arrays on one device."""
    return sum(bytes_on_a_device(x) for x in jax.tree.leaves(tree))


def device_memory(device: jax.Device) -> int | None:
    """Bytes of a device; for a CPU those of the machine or the container. None if nobody says."""
    statistics = device.memory_stats() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"]
    if device.platform != "cpu":
        return None
    return host_memory()


def host_memory() -> int:
    """Bytes of the machine, or of the container that this runs in."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in map(Path, _CGROUP_LIMITS):
        text = file.read_text().strip() if file.is_file() else ""
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def size(count: int) -> str:
    """Bytes in GiB, as a person reads them."""
    return f"{count / 2**30:,.2f} GiB"


def bytes_on_a_device(x: jax.ShapeDtypeStruct) -> int:
    """Of an abstract array, the part that one device holds."""
    assert x.sharding is not None, "the abstract state is placed"
    shard = x.sharding.shard_shape(x.shape)
    return math.prod(shard) * x.dtype.itemsize


def _hiddenbytes_on_a_device(run: Run) -> int:
    config = run.config
    rows = config.train.batch_size // config.train.accumulation_steps
    with jax.set_mesh(run.mesh):
        ways = parts("batch") * parts("length")
    tokens = rows * config.data.seq_len // ways
    bytes_of_number = 2 if config.model.dtype == "bfloat16" else 4
    return tokens * config.model.width * bytes_of_number
