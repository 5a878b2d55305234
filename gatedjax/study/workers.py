"""Where the runs of a study are made: here one after another, in processes of this machine, or by
the machines of a Ray cluster.

Each is a context manager with the name of the device and an iterator over finished runs. A run is
made by `make`, wherever it is, and depends on nothing but the run: the table is the same.
"""

import contextlib
import glob
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import jax

from gatedjax.errors import InputError, TrainingError
from gatedjax.runtime import compile_cache
from gatedjax.study.cell import run_cell
from gatedjax.study.grid import Cell, Study, StudyFile, run_key
from gatedjax.study.study_file import load_study

# How often a run is tried whose worker dies: out of memory, a machine that is taken away.
MOST_TRIES = 3


class PlannedRun(NamedTuple):
    """A cell and a seed, under the key that names their result."""

    key: str
    cell: Cell
    seed: int


def planned_runs(study: Study) -> list[PlannedRun]:
    """All runs of a study: of each cell, one for each seed."""
    return [
        PlannedRun(run_key(cell, seed, study), cell, seed)
        for cell in study.cells
        for seed in study.seeds
    ]


class Made(NamedTuple):
    """The values of a run, and where and when it was made."""

    values: dict[str, float]
    place: dict[str, str]


class Workers(Protocol):
    """What makes runs."""

    def device_name(self) -> str: ...

    def finished(
        self,
        plan: Sequence[PlannedRun],
        study: Study,
    ) -> Iterator[tuple[PlannedRun, Made]]: ...


def make(run: PlannedRun, study: Study) -> Made:
    """Makes a run in this process."""
    values = run_cell(run.cell, run.seed, study)
    return Made(values, here_and_now())


def make_from_file(file: StudyFile, key: str, seed: int) -> Made:
    """As `make`, in a process that is told nothing but names.

    The module of a study's file is no module that other processes know, so that an experiment of
    its own cannot be pickled.

    Args:
      file: the study's.
      key: of the run.
      seed: likewise.

    Raises:
      InputError: the file has no such run; it was changed since.
    """
    study = load_study(file.path, file.small)
    for cell in study.cells:
        if run_key(cell, seed, study) == key:
            return make(PlannedRun(key, cell, seed), study)
    raise InputError(f"study: {file.path} was changed while its runs were made")


class Here:
    """One run after another, in this process."""

    def device_name(self) -> str:
        return device_name()

    def finished(
        self,
        plan: Sequence[PlannedRun],
        study: Study,
    ) -> Iterator[tuple[PlannedRun, Made]]:
        for run in plan:
            yield run, make(run, study)


class Part(NamedTuple):
    """A worker's part of the machine: CPU cores, and a GPU if there are any."""

    cores: tuple[int, ...]
    gpu: str | None


class Processes:
    """Processes of this machine, each with its own cores or GPU."""

    def __init__(self, num_workers: int):
        """Starts nothing yet.

        Args:
          num_workers: how many runs are made at a time.

        Raises:
          InputError: more workers than the machine has parts.
        """
        self._parts = parts_of_machine(num_workers, _cores(), _gpus())
        self._pool = self._new_pool()

    def device_name(self) -> str:
        # Not by this process, which would take a part of every GPU's memory.
        return self._pool.submit(device_name).result()

    def finished(
        self,
        plan: Sequence[PlannedRun],
        study: Study,
    ) -> Iterator[tuple[PlannedRun, Made]]:
        left = list(plan)
        breaks = 0
        while left:
            try:
                futures: dict[Future, PlannedRun] = {}
                for run in left:
                    futures[self._submit(run, study)] = run
                for future in as_completed(futures):
                    made = future.result()
                    run = futures[future]
                    left.remove(run)
                    breaks = 0
                    yield run, made
            except BrokenProcessPool:
                # A worker died, and the pool with it. Which of its runs was the cause is not known.
                breaks += 1
                if breaks == MOST_TRIES:
                    raise TrainingError(
                        f"a worker died {MOST_TRIES} times, and no run ended in between; "
                        f"{len(left)} runs are left"
                    ) from None
                self._pool = self._new_pool()

    def _submit(self, run: PlannedRun, study: Study) -> Future:
        if study.file is None:
            return self._pool.submit(make, run, study)
        return self._pool.submit(make_from_file, study.file, run.key, run.seed)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _new_pool(self) -> ProcessPoolExecutor:
        # A fork of a process with jax in it may hang.
        context = multiprocessing.get_context("spawn")
        parts = context.SimpleQueue()
        for part in self._parts:
            parts.put(part)
        return ProcessPoolExecutor(
            len(self._parts),
            mp_context=context,
            initializer=_take_part,
            initargs=(parts, jax.config.jax_compilation_cache_dir),
        )


def parts_of_machine(
    num_workers: int,
    cores: Sequence[int],
    gpus: Sequence[str],
) -> list[Part]:
    """The machine cut into equal parts.

    Args:
      num_workers: how many.
      cores: numbers of the CPU cores.
      gpus: names of the GPUs; where there are some, each worker has one.

    Raises:
      InputError: fewer cores or GPUs than workers.
    """
    most = len(gpus) or len(cores)
    if not 1 <= num_workers <= most:
        kind = "GPUs" if gpus else "CPU cores"
        raise InputError(f"--workers: got {num_workers}, expected 1 to {most}, the {kind} here")
    each = max(1, len(cores) // num_workers)
    parts = []
    for worker in range(num_workers):
        # With more GPUs than cores some share a core.
        first = worker * each % len(cores)
        gpu = gpus[worker] if gpus else None
        parts.append(Part(tuple(cores[first : first + each]), gpu))
    return parts


def _take_part(parts: Any, cache: str | None) -> None:
    """Begins a worker: before jax looks at the machine."""
    part = parts.get()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, part.cores)
    if part.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = part.gpu
    if cache is not None:
        compile_cache.use(Path(cache))


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _gpus() -> list[str]:
    """The NVIDIA GPUs that this process may use, found without starting jax."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    numbers = [path.removeprefix("/dev/nvidia") for path in glob.glob("/dev/nvidia[0-9]*")]
    return sorted(numbers, key=int)


class RayCluster:
    """The machines of a Ray cluster: each run is a task with its resources."""

    def __init__(self, address: str, num_cpus: float, num_gpus: float):
        """Connects.

        Args:
          address: of the cluster, such as "auto" or "ray://head:10001"; "local" starts one here.
          num_cpus: CPU cores of a run.
          num_gpus: GPUs of a run.

        Raises:
          InputError: Ray is not installed, or nobody answers at the address.
        """
        self._ray = _ray()
        self._resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        try:
            self._ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"--ray: could not connect to {address!r}: {reason}") from None

    def device_name(self) -> str:
        return self._ray.get(self._task(device_name).remote())

    def finished(
        self,
        plan: Sequence[PlannedRun],
        study: Study,
    ) -> Iterator[tuple[PlannedRun, Made]]:
        task = self._task(make)
        runs = {task.remote(run, study): run for run in plan}
        left = list(runs)
        while left:
            (done,), left = self._ray.wait(left)
            try:
                made = self._ray.get(done)
            except self._ray.exceptions.RayTaskError as error:
                # As if it had been raised here.
                raise error.cause from None
            except self._ray.exceptions.RayError as error:
                reason = str(error).splitlines()[0]
                raise TrainingError(f"a run was tried {MOST_TRIES} times: {reason}") from None
            yield runs[done], made

    def close(self) -> None:
        self._ray.shutdown()

    def _task(self, function: Any) -> Any:
        # A task whose worker dies is run again, by another one; one that raises is not.
        return self._ray.remote(max_retries=MOST_TRIES - 1, **self._resources)(function)


def _ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        hint = "pip install 'gatedjax[ray]' brings it"
        raise InputError(f"--ray: ray cannot be imported ({error}); {hint}") from None
    return ray


def workers(
    num_workers: int,
    ray_address: str | None,
    ray_cpus: float,
    ray_gpus: float,
) -> contextlib.AbstractContextManager[Workers]:
    """What the flags ask for.

    Args:
      num_workers: processes of this machine; 1 for this process.
      ray_address: of a Ray cluster, or None.
      ray_cpus: CPU cores of a run on the cluster.
      ray_gpus: GPUs of a run on the cluster.

    Raises:
      InputError: both kinds are asked for, or one that is not there.
    """
    if ray_address is not None and num_workers != 1:
        raise InputError(f"--workers: got {num_workers} and --ray, expected one of them")
    if ray_address is not None:
        return contextlib.closing(RayCluster(ray_address, ray_cpus, ray_gpus))
    if num_workers != 1:
        return contextlib.closing(Processes(num_workers))
    return contextlib.nullcontext(Here())


# --- where a run is made


def here_and_now() -> dict[str, str]:
    """Where and when a run is made, as its record keeps it."""
    versions = []
    for package in ("jax", "jaxlib", "flax", "optax"):
        versions.append(f"{package} {metadata.version(package)}")
    python = sys.version.split()[0]
    versions.append(f"Python {python}")
    return {
        "machine": machine(),
        "versions": ", ".join(versions),
        "date": datetime.now(UTC).date().isoformat(),
    }


def device_name() -> str:
    """Of this process's first device, as a folder's name."""
    return re.sub(r"\W+", "_", jax.devices()[0].device_kind.lower())


def machine() -> str:
    """The devices of this process, in words."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    cores = len(_cores())
    return "1 CPU core" if cores == 1 else f"{cores} CPU cores"
