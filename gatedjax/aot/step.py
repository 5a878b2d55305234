"""A training step compiled for a TPU slice that is not here: does it fit, what does it send, how
fast could it be.

No parameter is ever materialized: the state is shapes and shardings, lowered as `train.py` lowers
the real one.
"""

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gatedjax import sharding
from gatedjax.aot import (
    Report,
    hlo,
    larger_products,
    libtpu,
    parse_slice,
    prefetch,
    report_compiled,
    slice_devices,
    step_time,
    unrolling,
)
from gatedjax.aot.report import size, table
from gatedjax.aot.schedule import Dump
from gatedjax.aot.targets import Slice, Tpu
from gatedjax.compiler_options import ASYNCHRONOUS_COLLECTIVES, for_training
from gatedjax.config import Config, SparseMoEConfig
from gatedjax.data import Batch
from gatedjax.errors import InputError
from gatedjax.training import given_teacher
from gatedjax.training.run import Run, describe, flops_per_token, prepare
from gatedjax.training.step import jit_train_step
from kernels_pallas import dispatch

LARGEST = 8  # arrays of the state that are listed


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Least seconds of a step on each of a chip's resources.

    model: the model's FLOPs at the chip's bfloat16 peak.
    compute: the same with the forward pass that remat "full" repeats; what "kernels" and
      "projections" repeat, a part, is not counted.
    hbm: the state and the batch read once and written once.
    network: what the collectives send over the chip's interconnect, one after another; with several
      slices also what goes over the data center network; the slower of the two.
    blocking: of `network`, the collectives that nothing runs beside.
    """

    model: float
    compute: float
    hbm: float
    network: float
    blocking: float

    @property
    def step(self) -> float:
        """A step takes at least this: what blocks adds to what is computed."""
        return max(self.compute + self.blocking, self.hbm, self.network)

    @property
    def mfu_bound(self) -> float:
        return self.model / self.step


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A step for a slice.

    run: on that slice.
    report: of the compiled step, or XLA's complaint if it needs more than the HBM.
    time: the model's, if it was asked for and libtpu wrote a schedule.
    compile_seconds: of the CPU, from the lowered step on.
    """

    run: Run
    report: Report | str
    time: step_time.StepTime | None = None
    compile_seconds: float = 0.0


def compile_step(config: Config, where: Slice, schedule: bool = False) -> CompiledStep:
    """Compiles the step of a run, and replays it if `schedule` is set.

    Raises:
      InputError: the slice or its mesh cannot be, or a schedule of several chips.
    """
    if schedule and not where.is_one_chip:
        raise InputError(
            f"--schedule: got --aot={where.topology}, expected one chip such as "
            f"--aot={where.chip.name}:1: what collectives take is not modeled"
        )
    try:
        # Before anything else touches libtpu: it reads its flags once.
        folder = libtpu.start(schedule)
        devices = slice_devices(where)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"--aot: {error}") from None
    run = given_teacher.with_teacher(prepare(config, devices))
    with jax.set_mesh(run.mesh):
        as_compiled = unrolling.by_the_rule(run.config, run.mesh)
        options = larger_products.options(run.config, run.mesh)
        step = jit_train_step(as_compiled, run.tx, run.shardings, options)
        traced = step.trace(run.abstract, abstract_batch(run), run.teacher)
        lowered = traced.lower(lowering_platforms=("tpu",))
        before = time.process_time()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return CompiledStep(run, str(error))
    seconds = time.process_time() - before
    report = report_compiled(f"tpu:{where.chip.name}", compiled, devices=len(devices))
    replayed = None
    if folder is not None:
        replayed = _replayed(run, traced, compiled, where.chip, folder)
    return CompiledStep(run, report, replayed, seconds)


def _replayed(
    run: Run,
    traced: jax.stages.Traced,
    compiled: jax.stages.Compiled,
    chip: Tpu,
    folder: Path,
) -> step_time.StepTime | None:
    """The model time of a step whose rows are one document each, and whose experts have the loads
    of `expert_loads`.
    """
    text = compiled.as_text() or ""
    scalars = prefetch.scalar_operands(traced.jaxpr, _one_document_a_row(run))
    scalars = with_loads(scalars, run.config)
    program = Dump(folder, text, chip, scalars).program()
    if program is None:
        return None
    tokens = run.config.train.batch_size * run.config.data.seq_len
    return step_time.StepTime(
        program,
        step_time.times_by_part(program, text, chip),
        model_flops=tokens * flops_per_token(run),
        chip=chip,
    )


def expert_loads(num_rows: int, num_experts: int) -> np.ndarray:
    """How many rows each expert gets where a router is trained, but not perfectly even: the loads
    differ from the mean by about a fifth of it.
    """
    fractions = np.random.default_rng(0).dirichlet(np.full(num_experts, 20.0))
    return np.random.default_rng(1).multinomial(num_rows, fractions).astype(np.int32)


def with_loads(scalars: Sequence[prefetch.Steering], config: Config) -> list[prefetch.Steering]:
    """The steering values of kernels, with the group sizes that no trace can know.

    Left unknown where sparse layers differ: which kernel is whose is not told.
    """
    loads = set()
    for block in config.model.blocks:
        ffn = block.feed_forward
        if isinstance(ffn, SparseMoEConfig):
            tokens = config.train.batch_size * config.data.seq_len
            loads.add((tokens * ffn.experts_per_token, ffn.num_experts))
    if len(loads) != 1:
        return list(scalars)
    sizes = expert_loads(*loads.pop())

    def with_sizes(name: str, values: list[np.ndarray | None]) -> prefetch.Steering:
        # Both ops have one steering operand, the sizes.
        are_unknown = len(values) == 1 and values[0] is None
        if are_unknown and name.startswith(("expert_mlp", "grouped_matmul")):
            return name, [sizes]
        return name, values

    return [with_sizes(name, values) for name, values in scalars]


def _one_document_a_row(run: Run) -> dict[int, np.ndarray]:
    """Values of the step's arguments, by their position, that steer kernels."""
    leaves, _ = jax.tree_util.tree_flatten_with_path((run.abstract, abstract_batch(run)))
    known = {}
    for position, (path, leaf) in enumerate(leaves):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.endswith(".segment_ids"):
            known[position] = np.ones(leaf.shape, np.int32)
        elif name.endswith(".positions"):
            known[position] = np.broadcast_to(np.arange(leaf.shape[1], dtype=np.int32), leaf.shape)
    return known


def abstract_batch(run: Run) -> Batch:
    """The shapes and placement of a batch."""
    shape = (run.config.train.batch_size, run.config.data.seq_len)
    placed = sharding.batch_sharding(run.mesh)
    integers = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placed)
    floats = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placed)
    # A tree with the structure of a batch, and shapes where a batch has arrays.
    fields: dict[str, Any] = {f.name: integers for f in dataclasses.fields(Batch)}
    fields["loss_mask"] = floats
    fields["patches"] = None
    if run.config.model.task == "classify":
        of_patches = (*shape, run.config.model.patches.size)
        fields["patches"] = jax.ShapeDtypeStruct(of_patches, jnp.float32, sharding=placed)
    return Batch(**fields)


def roofline(run: Run, report: Report, where: Slice) -> Roofline:
    """Bounds from the chip's public figures."""
    chip = where.chip
    config = run.config
    tokens = config.train.batch_size * config.data.seq_len
    flops = tokens * flops_per_token(run)
    model = flops / (run.mesh.size * chip.peak_flops)
    # Full remat repeats the forward pass, a third of forward and backward.
    repeated = 4 / 3 if config.model.remat == "full" else 1.0
    state_bytes = report.argument_bytes + report.output_bytes
    inside = [c for c in report.collectives if c.kind != hlo.BETWEEN_SLICES]
    outside = [c for c in report.collectives if c.kind == hlo.BETWEEN_SLICES]
    inside_slice = sum(c.sent_bytes for c in inside) / chip.ici_bytes_per_second
    between_slices = sum(c.bytes for c in outside) / chip.dcn_bytes_per_second
    blocking = sum(c.blocking_bytes for c in inside) / chip.ici_bytes_per_second
    return Roofline(
        model=model,
        compute=model * repeated,
        hbm=state_bytes / chip.hbm_bytes_per_second,
        network=max(inside_slice, between_slices),
        blocking=blocking,
    )


def print_report(config: Config, text: str, schedule: bool = False) -> bool:
    """Compiles, prints; returns whether the step fits into a chip's HBM.

    Args:
      config: of the run.
      text: a slice such as "v5p:8x8x4", "2*v5p:8x8x4" for two, or "v5p:1" for one chip.
      schedule: whether the model time of the step is printed, too, by part.

    Raises:
      InputError: an unknown slice, or a mesh that does not divide it.
    """
    try:
        where = parse_slice(text)
    except ValueError as error:
        raise InputError(f"--aot: {error}") from None
    step = compile_step(config, where, schedule)
    run, report = step.run, step.report
    if isinstance(report, str):
        lines = _refused(report, where.chip)
        fits = False
    else:
        lines = _compiled(run, report, where, step.compile_seconds)
        fits = report.peak_bytes <= where.chip.hbm_bytes
    if step.time is not None:
        lines += ["", *step_time.lines(step.time)]
    elif schedule and not isinstance(report, str):
        lines += ["", "model time: libtpu wrote no schedule of the step"]
    if unrolling.is_asked(run.config.model):
        lines = [str(unrolling.unrolling(run.config, run.mesh)), *lines]
    if larger_products.is_possible(run.mesh):
        lines = [larger_products.line(run.config, run.mesh), *lines]
    print("\n".join([describe(run), *lines, *_largest(run)]))
    return fits


def _compiled(run: Run, report: Report, where: Slice, seconds: float) -> list[str]:
    """Of a program that was compiled; it may still need more than a chip has."""
    choices = ", ".join(f"{c.op}: {c.implementation}" for c in dispatch.choices())
    rows = [
        [
            c.kind,
            str(c.count),
            size(c.bytes),
            str(c.asynchronous_count),
            size(c.asynchronous_bytes),
        ]
        for c in report.collectives
    ]
    bound = roofline(run, report, where)
    header = ["collective, a step and chip", "count", "bytes", "beside computing", "bytes"]
    times = [f"{name} {time:.3f} s" for name, time in dataclasses.asdict(bound).items()]
    return [
        f"ops: {choices}",
        _memory(report, where.chip),
        f"compiled in {seconds:.0f} s of CPU",
        "",
        *table(header, rows),
        *_sent(run, report),
        "",
        f"roofline (public figures, not a measurement): {', '.join(times)}; "
        f"a step takes at least {bound.step:.3f} s, so MFU is at most {bound.mfu_bound:.0%}",
    ]


def _sent(run: Run, report: Report) -> list[str]:
    """What a chip sends for each parameter, and whether the compiler was asked for collectives that
    nothing waits for.
    """
    if run.mesh.size == 1:
        return []
    inside = sum(c.sent_bytes for c in report.collectives if c.kind != hlo.BETWEEN_SLICES)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.abstract.params))
    options = for_training(run.mesh, run.config.mesh.async_collectives)
    options = options.keys() & ASYNCHRONOUS_COLLECTIVES.keys()
    how = f"{len(options)} options of libtpu ask for it (mesh.async_collectives)"
    if not options and run.config.mesh.async_collectives:
        how = "this chip has no SparseCores to run collectives"
    elif not options:
        how = "not asked for (mesh.async_collectives)"
    return [
        f"sent by a chip: {size(inside)}, {inside / parameters:.1f} bytes a parameter "
        "(parameters gathered twice and gradients scattered once, in bfloat16, are 6)",
        f"beside computing: {how}",
    ]


def _memory(report: Report, chip: Tpu) -> str:
    """What the step needs of a chip's memory, and what for."""
    free = chip.hbm_bytes - report.peak_bytes
    if free >= 0:
        verdict = f"fits, {size(free)} free"
    else:
        verdict = f"DOES NOT FIT, {size(-free)} too much"
    parts = {
        "state and batch": report.argument_bytes,
        "temporaries": report.temp_bytes,
        "program": report.code_bytes,
        "outputs that reuse nothing": report.output_bytes - report.aliased_bytes,
    }
    shown = ", ".join(f"{name} {size(count)}" for name, count in parts.items())
    total = f"{size(report.peak_bytes)} of {size(chip.hbm_bytes)}"
    return f"memory a chip: {total}: {verdict} ({shown})"


def _refused(message: str, chip: Tpu) -> list[str]:
    """XLA's own words on what it would have needed: it gives up before there is a program to look
    into.
    """
    found = re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", message)
    if found is None:
        first_line = message.splitlines()[0]
        return [f"memory a chip: more than {size(chip.hbm_bytes)}: DOES NOT FIT ({first_line})"]
    needed = float(found[1])
    available = float(found[2])
    over = f"{needed - available:.1f} GiB too much"
    return [
        f"memory a chip: temporaries alone take {needed} GiB of {available} GiB: "
        f"DOES NOT FIT, {over}"
    ]


def _largest(run: Run) -> list[str]:
    """A table of the state's largest arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(run.abstract)
    leaves.sort(key=lambda item: -_device_bytes(item[1]))
    rows = []
    for path, leaf in leaves[:LARGEST]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        rows.append([name, str(leaf.shape), size(_device_bytes(leaf))])
    return ["", *table(["largest arrays of the state", "shape", "a chip"], rows)]


def _device_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Of one device's part of an array."""
    assert leaf.sharding is not None
    local_shape = leaf.sharding.shard_shape(leaf.shape)
    return math.prod(local_shape) * leaf.dtype.itemsize
