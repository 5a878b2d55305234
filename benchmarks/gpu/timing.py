"""Compiles and times a program of jax: the stage "time"; tuning and ncu use it too."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.gpu import cases
from benchmarks.gpu.guard import WorkerOptions, run_each
from benchmarks.gpu.programs import Cost, Program, Specs, programs
from benchmarks.gpu.records import append_record, one_line
from benchmarks.gpu.samples import SAMPLES, calls_of_sample, median_and_spread

# Two sets of inputs take turns, so that no call finds its own in the device's cache. Very large
# inputs exist once.
MOST_BYTES_TWICE = 2**31
DRY_SAMPLES = 2


class Compiled(NamedTuple):
    run: Callable
    specs: Specs
    cost: Cost


def time_programs(options: WorkerOptions) -> None:
    """The stage "time"."""
    settings = options.settings

    def measure(program: Program) -> None:
        measured = time_program(program, settings.dry)
        _record(program, **measured)

    def failed(program: Program, error: Exception) -> None:
        _record(program, error=one_line(error))

    def _record(program: Program, **fields: Any) -> None:
        append_record(
            settings.out,
            stage="time",
            kind="time",
            case=program.case,
            implementation=program.implementation,
            **fields,
        )

    run_each(programs(settings.dry), measure, failed, options)


def compile_programs(options: WorkerOptions) -> None:
    """Compiles the programs of the stage "time" into jax's cache.

    A program that does not compile is left to its stage, which records why.
    """
    wanted = programs(options.settings.dry)

    def failed(program: Program, error: Exception) -> None:
        """The stage that times it says so."""

    run_each(wanted, compile_program, failed, options)
    append_record(
        options.settings.out,
        stage="parallel",
        kind="compiled",
        part=options.part,
        count=len(options.own(wanted)),
    )


def call_once(options: WorkerOptions) -> None:
    """One call of our program of a case, for a profiler."""
    for program in programs(options.settings.dry):
        if (program.case, program.implementation) == (options.case, cases.OURS):
            compiled = compile_program(program)
            arrays = random_inputs(compiled.specs, seed=0)
            jax.block_until_ready(compiled.run(*arrays))
            return
    raise ValueError(f"case: got {options.case!r}, expected one that is timed")


def time_program(program: Program, dry: bool) -> dict[str, Any]:
    """The fields of a record: milliseconds, their spread, the rates that follow."""
    compiled = compile_program(program)
    leaves = jax.tree.leaves(compiled.specs)
    input_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    seeds = range(2 if input_bytes < MOST_BYTES_TWICE else 1)
    sets = [random_inputs(compiled.specs, seed) for seed in seeds]
    ms, spread = median_ms(compiled.run, sets, dry)
    return {
        "ms": ms,
        "spread": spread,
        "tflops": compiled.cost.flops / ms / 1e9,
        "gbs": compiled.cost.bytes / ms / 1e6,
        "sets": len(sets),
    }


def compile_program(program: Program) -> Compiled:
    """Traces afresh: tuning changes tables that a trace has read."""
    jax.clear_caches()
    function, specs, cost = program.build()

    def run(*arguments: Array) -> Any:
        return function(*arguments)

    return Compiled(jax.jit(run).lower(*specs).compile(), specs, cost)


def median_ms(
    run: Callable,
    sets: Sequence[Sequence[Array]],
    dry: bool,
) -> tuple[float, float]:
    """Milliseconds of a call, and the spread of the samples.

    Args:
      run: the compiled program.
      sets: arguments; the calls take them in turn.
      dry: one call a sample, and two samples.

    Returns:
      The median of the samples, and the distance between quartiles as a fraction of it.
    """

    def seconds_of_call(calls: int) -> float:
        start = time.perf_counter()
        for index in range(calls):
            result = run(*sets[index % len(sets)])
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls

    for arguments in sets:
        jax.block_until_ready(run(*arguments))
    calls = 1 if dry else calls_of_sample(seconds_of_call(2))
    samples = DRY_SAMPLES if dry else SAMPLES
    milliseconds = [1e3 * seconds_of_call(calls) for _ in range(samples)]
    return median_and_spread(milliseconds)


def random_inputs(specs: Specs, seed: int) -> list[Array]:
    """On the device. float32: log decays as in GLA; int32: unequal group sizes; bool: all true."""
    leaves = jax.tree.leaves(specs)
    rows = leaves[0].shape[0]
    found = []
    for place, spec in enumerate(leaves):
        if spec.dtype == jnp.int32:
            array = jnp.asarray(_group_sizes(rows, spec.shape[0], seed))
        elif spec.dtype == jnp.bool_:
            array = jnp.ones(spec.shape, bool)
        else:
            key = jax.random.key(100 * seed + place)
            array = jax.random.normal(key, spec.shape, spec.dtype)
        if spec.dtype == jnp.float32:
            array = jax.nn.log_sigmoid(array) / 16
        found.append(array)
    return found


def _group_sizes(rows: int, groups: int, seed: int) -> np.ndarray:
    """Sizes that differ by about a third, whose sum is `rows`."""
    random = np.random.default_rng(seed)
    fractions = random.dirichlet(np.full(groups, 8.0))
    sizes = np.floor(fractions * rows).astype(np.int32)
    sizes[0] += rows - sizes.sum()
    return sizes
