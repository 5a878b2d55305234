"""The stage "tune": compiles variants of the tables' rows side by side, and picks the best kernels.

Worker "variants": its part of all variants is compiled, called, and profiled while no other process
measures. Worker "tuned": for one op it makes a row of the fastest of each kernel, and times it
beside the row as it is.
"""

import fcntl
import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.gpu.guard import WorkerOptions
from benchmarks.gpu.kernel_times import kernel_times
from benchmarks.gpu.records import append_record, one_line, read_records
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.timing import Compiled, compile_program, median_ms, random_inputs
from benchmarks.gpu.variants import Changes, Tuned, tuned

# Seconds in which variants are compiled; what is not begun by then is left out.
COMPILE_SECONDS = 95
# Random sums of each result, by which variants are compared with the row as it is.
SUMS = 8
# The largest difference of two that compute the same, as a fraction of the result.
TOLERANCE = 2e-2

Record = dict[str, Any]


class Ready(NamedTuple):
    """A variant that has run once."""

    tuned: Tuned
    changes: Changes
    call: Callable[[], Any]
    sums: list[list[float]]


def measure_variants(options: WorkerOptions) -> None:
    """The variants of this process."""
    settings = options.settings
    began = time.monotonic()
    tasks = [(one, changes) for one in tuned(settings.dry) for changes in one.variants]
    ready: list[Ready] = []
    inputs: dict[str, list[Array]] = {}
    for one, changes in options.own(tasks):
        if time.monotonic() - began > COMPILE_SECONDS and not settings.dry:
            break
        try:
            one.apply(changes)
            compiled = compile_program(one.program)
            if one.program.case not in inputs:
                inputs[one.program.case] = random_inputs(compiled.specs, seed=0)
            call = functools.partial(compiled.run, *inputs[one.program.case])
            ready.append(Ready(one, changes, call, sums(call())))
        except Exception as error:
            _record(settings, one, changes, error=one_line(error))

    with device_for_itself(settings):
        measured = _measure([variant.call for variant in ready], settings.dry)
    for variant, fields in zip(ready, measured):
        _record(
            settings,
            variant.tuned,
            variant.changes,
            sums=variant.sums,
            **fields,
        )


def _measure(calls: Sequence[Callable[[], Any]], dry: bool) -> list[Record]:
    """The times of their kernels; where no profile can be had, those of the whole calls."""
    if dry:
        # An interpreted kernel has no time of its own.
        return [{"kernels": {"interpreted": 1.0}} for _ in calls]
    try:
        return [{"kernels": times} for times in kernel_times(calls)]
    except Exception as error:
        without_profile = []
        for call in calls:
            ms, _ = median_ms(call, [()], dry)
            without_profile.append({"ms": ms, "error": one_line(error)})
        return without_profile


def time_tuned(options: WorkerOptions) -> None:
    """The best rows of the ops of this process, beside the rows as they are."""
    settings = options.settings
    records = [r for r in read_records(settings.out) if r.get("kind") == "variant"]
    for one in options.own(tuned(settings.dry)):
        of_op = [r for r in records if r["case"] == one.program.case]
        try:
            changes = best_changes(one, of_op)
            programs = []
            for row in ({}, changes):
                one.apply(row)
                programs.append(compile_program(one.program))
            before, after = _times(settings, programs)
        except Exception as error:
            append_record(
                settings.out,
                stage="tune",
                kind="tuned",
                case=one.program.case,
                error=one_line(error),
            )
            continue
        append_record(
            settings.out,
            stage="tune",
            kind="tuned",
            case=one.program.case,
            changes=as_text(changes),
            before_ms=before,
            ms=after,
        )


def _times(settings: Settings, programs: Sequence[Compiled]) -> list[float]:
    """Milliseconds of each."""
    sets = [random_inputs(programs[0].specs, seed) for seed in range(2)]
    for compiled in programs:
        jax.block_until_ready(compiled.run(*sets[0]))
    with device_for_itself(settings):
        return [median_ms(compiled.run, sets, settings.dry)[0] for compiled in programs]


def best_changes(one: Tuned, records: Sequence[Record]) -> Changes:
    """The changes that make the fastest row, by the times of single kernels.

    Args:
      one: the op.
      records: of its variants.

    Returns:
      Of the variants that agree in what is of all kernels, the fastest of each kernel; of such
      rows the one whose kernels take least together.

    Raises:
      ValueError: the row as it is was not measured.
    """
    measured = {r["changes"]: r for r in records if "kernels" in r}
    as_it_is = measured.get(as_text({}))
    if as_it_is is None:
        raise ValueError("variants: got none of the row as it is, expected its times")
    of_all: dict[str, list[Changes]] = defaultdict(list)
    for changes in one.variants:
        record = measured.get(as_text(changes))
        if record is not None and difference(record["sums"], as_it_is["sums"]) < TOLERANCE:
            of_all[as_text(one.of_all(changes))].append(changes)

    fastest = math.inf
    best: Changes = {}
    for variants in of_all.values():
        row = dict(one.of_all(variants[0]))
        total = 0.0
        by_field = {kernels.fields: kernels for kernels in one.kernels}
        for kernels in by_field.values():
            times = [of_fields(one, kernels.fields, measured[as_text(v)]) for v in variants]
            place = times.index(min(times))
            row |= kernels.own(variants[place])
            total += times[place]
        # What belongs to no kernel of the table.
        total += min(of_fields(one, None, measured[as_text(v)]) for v in variants)
        if total < fastest:
            fastest = total
            best = row
    return best


def of_fields(one: Tuned, fields: tuple[str, ...] | None, record: Record) -> float:
    """Microseconds of the kernels that fields belong to; None: of those that have none."""
    total = 0.0
    for name, time_of_kernel in record["kernels"].items():
        owners = [kernels.fields for kernels in one.kernels if kernels.name in name]
        owner = owners[0] if owners else None
        if owner == fields:
            total += time_of_kernel
    return total


def sums(results: Any) -> list[list[float]]:
    """Of each array: the root of its mean square; sums with random signs, over its root length."""
    found = []
    for leaf in jax.tree.leaves(results):
        compiled = _compiled_sums(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        found.append([float(x) for x in compiled(leaf)])
    return found


@functools.cache
def _compiled_sums(spec: jax.ShapeDtypeStruct) -> Callable[[Array], Array]:
    """Compiled once: every variant clears jax's own cache."""
    return jax.jit(_sums_of).lower(spec).compile()


def _sums_of(array: Array) -> Array:
    flat = array.astype(jnp.float32).reshape(-1)
    found = [jnp.sqrt(jnp.mean(flat**2))]
    for seed in range(SUMS):
        signs = jax.random.rademacher(jax.random.key(seed), flat.shape, jnp.float32)
        found.append(jnp.sum(flat * signs) / jnp.sqrt(flat.size))
    return jnp.stack(found)


def difference(left: list[list[float]], right: list[list[float]]) -> float:
    """About the relative error between two sets of results: the largest of an array."""
    largest = 0.0
    for a, b in zip(left, right, strict=True):
        between = math.sqrt(sum((x - y) ** 2 for x, y in zip(a[1:], b[1:])) / SUMS)
        error = between / max(b[0], 1e-30)
        # NaN is not equal to anything.
        largest = max(largest, error) if error == error else math.inf
    return largest


def as_text(changes: Changes) -> str:
    """A name of a variant: "chunk=32 intra_warps=4"."""
    parts = []
    for name, value in changes.items():
        values = value if isinstance(value, tuple) else (value,)
        parts.append(f"{name}={','.join(str(v) for v in values)}")
    return " ".join(parts) or "as it is"


@contextmanager
def device_for_itself(settings: Settings) -> Iterator[None]:
    """One process at a time measures."""
    with open(settings.scratch / "device.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _record(settings: Settings, one: Tuned, changes: Changes, **fields: Any) -> None:
    append_record(
        settings.out,
        stage="tune",
        kind="variant",
        case=one.program.case,
        changes=as_text(changes),
        **fields,
    )
