"""The stages of a run: the processes of each, and how long it may take. Imports no jax."""

import os
import time

from benchmarks.gpu import clocks, ncu, training
from benchmarks.gpu.processes import Job, run_together, worker_job
from benchmarks.gpu.settings import Settings, packed_ptxas

# Seconds. The order is that of a run without --stages: what matters most comes first.
LIMITS = {
    "versions": 40,
    "parallel": 220,
    "time": 140,
    "torch": 110,
    "train": 80,
    "tune": 180,
    "ncu": 60,
}
# Of the stage "tune": the fraction of its time in which variants are measured, and how many ops
# have rows that are timed afterwards.
OF_VARIANTS = 0.75
TUNED_OPS = 8
# These need an NVIDIA GPU, or its tools.
NOT_DRY = ("torch", "ncu")


def default_stages(dry: bool) -> list[str]:
    return [name for name in LIMITS if not (dry and name in NOT_DRY)]


def run_stage(settings: Settings, name: str, limit: float) -> None:
    """Runs a stage for at most `limit` seconds; what it finds is in the records.

    Raises:
      ValueError: there is no such stage.
    """
    match name:
        case "versions" | "time" | "torch":
            jobs = [worker_job(settings, name), *clocks.companion(settings, name)]
            run_together(settings, name, jobs, limit)
            clocks.record(settings, name)
        case "parallel":
            run_together(settings, name, parallel_jobs(settings), limit)
        case "train":
            job = training.job(settings)
            run_together(settings, name, [job, *clocks.companion(settings, name)], limit)
            training.record(settings)
            clocks.record(settings, name)
        case "tune":
            began = time.monotonic()
            jobs = tune_jobs(settings)
            run_together(settings, name, jobs, limit * OF_VARIANTS)
            jobs = _parts(settings, "tuned", min(len(jobs), TUNED_OPS))
            run_together(settings, name, jobs, limit - (time.monotonic() - began))
        case "ncu":
            jobs = ncu.jobs(settings)
            for job in jobs:
                run_together(settings, name, [job], limit / len(jobs))
            ncu.record(settings)
        case _:
            raise ValueError(f"stage: got {name!r}, expected one of {', '.join(LIMITS)}")


def parallel_jobs(settings: Settings) -> list[Job]:
    """Processes for all cores. Nothing is timed here, so they may disturb each other.

    Numerics of every kernel, with the installed ptxas and with the packed one; the programs of
    later stages, compiled into jax's cache; the candidates of fla's autotuner, into Triton's.
    """
    cores = 2 if settings.dry else os.cpu_count() or 8
    for_numerics = max(1, cores * 6 // 16)
    for_packed_ptxas = max(1, for_numerics // 2)
    for_programs = max(1, cores * 5 // 16)
    for_fla = max(1, cores * 3 // 16)

    jobs = _parts(settings, "numerics", for_numerics)
    if settings.has_packed_ptxas:
        # A cache of its own: jax's key of a program may not tell one ptxas from another.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(settings.scratch / "xla-packed-ptxas")}
        environment = packed_ptxas(settings) | cache
        jobs += _parts(settings, "numerics", for_packed_ptxas, environment, "--ptxas=packed")
    jobs += _parts(settings, "compile", for_programs)
    if not settings.dry:
        jobs += _parts(settings, "compile_fla", for_fla, {"FLA_CACHE_RESULTS": "0"})
    return jobs


def tune_jobs(settings: Settings) -> list[Job]:
    """Processes that divide the variants of the tables' rows among them."""
    cores = 2 if settings.dry else os.cpu_count() or 8
    # A CUDA graph is one launch; a profile of its kernels is not to depend on how XLA made it.
    environment = {"XLA_FLAGS": "--xla_gpu_enable_command_buffer="}
    return _parts(settings, "variants", max(1, cores - 2), environment)


def _parts(
    settings: Settings,
    name: str,
    parts: int,
    environment: dict[str, str] | None = None,
    *options: str,
) -> list[Job]:
    """Processes that divide the tasks of a worker among them."""
    jobs = []
    for part in range(parts):
        job = worker_job(
            settings,
            name,
            f"--part={part}",
            f"--parts={parts}",
            *options,
            environment=environment,
        )
        jobs.append(job)
    return jobs
