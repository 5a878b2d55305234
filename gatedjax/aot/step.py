"""A training step compiled for a TPU slice that is not here: does it fit, what does it send, how
fast could it be.

No parameter is ever materialized: the state is shapes and shardings, lowered as `train.py` lowers
the real one.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp

from gatedjax import sharding
from gatedjax.aot import Report, parse_slice, report_compiled, slice_devices
from gatedjax.aot.report import size, table
from gatedjax.aot.targets import Slice, Tpu
from gatedjax.config import Config
from gatedjax.data import Batch
from gatedjax.errors import InputError
from gatedjax.training.flops import train_flops_per_token
from gatedjax.training.run import Run, describe, prepare
from gatedjax.training.step import jit_train_step
from kernels_pallas import dispatch

LARGEST = 8  # arrays of the state that are listed


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Least seconds of a step on each of a chip's resources; the step takes at least the longest of
    them.

    model: the model's FLOPs at the chip's bfloat16 peak.
    compute: the same with the forward pass that remat "full" repeats; what "kernels" repeats, a
    part, is not counted.
    hbm: the state and the batch read once and written once.
    network: what the collectives send over the chip's interconnect, one after another; with several
      slices also the all-reduce of a chip's part of the gradients over the data center network; the
      slower of the two.
    """

    model: float
    compute: float
    hbm: float
    network: float

    @property
    def step(self) -> float:
        return max(self.compute, self.hbm, self.network)

    @property
    def mfu_bound(self) -> float:
        return self.model / self.step


def compile_step(config: Config, where: Slice) -> tuple[Run, Report | str]:
    """The run on that slice, and the report of its compiled step, or XLA's complaint if it needs
    more than the HBM.

    Raises:
      InputError: the slice or its mesh cannot be.
    """
    try:
        devices = slice_devices(where)
    except (ValueError, RuntimeError) as e:
        raise InputError(f"--aot: {e}") from None
    run = prepare(config, devices)
    with jax.set_mesh(run.mesh):
        step = jit_train_step(run.config, run.tx, run.shardings)
        lowered = step.trace(run.abstract, abstract_batch(run)).lower(lowering_platforms=("tpu",))
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            return run, str(e)
    return run, report_compiled(f"tpu:{where.chip.name}", compiled, devices=len(devices))


def abstract_batch(run: Run) -> Batch:
    """The shapes and placement of a batch."""
    shape = (run.config.train.batch_size, run.config.data.seq_len)
    placed = sharding.batch_sharding(run.mesh)
    array = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    return Batch(**{f.name: array(jnp.int32) for f in dataclasses.fields(Batch)}).replace(
        loss_mask=array(jnp.float32)
    )


def roofline(run: Run, report: Report, where: Slice) -> Roofline:
    """Bounds from the chip's public figures."""
    chip, c = where.chip, run.config
    tokens = c.train.batch_size * c.data.seq_len
    flops = train_flops_per_token(c.model, c.data.seq_len) * tokens
    chips = run.mesh.size
    network = sum(x.sent_bytes for x in report.collectives) / chip.ici_bytes_per_second
    if where.num_slices > 1:
        # Each chip sends and receives its part of the gradients once over the slower network.
        parts = sum(_device_bytes(p) for p in jax.tree.leaves(run.abstract.params))
        network = max(network, 2 * parts / chip.dcn_bytes_per_second)
    hbm = (report.argument_bytes + report.output_bytes) / chip.hbm_bytes_per_second
    model = flops / (chips * chip.peak_flops)
    repeated = 4 / 3 if c.model.remat == "full" else 1.0
    return Roofline(model, model * repeated, hbm, network)


def print_report(config: Config, text: str) -> bool:
    """Compiles, prints; returns whether the step fits into a chip's HBM.

    Args:
      text: a slice such as "v5p:8x8x4", or "2*v5p:8x8x4" for two.

    Raises:
      InputError: an unknown slice, or a mesh that does not divide it.
    """
    try:
        where = parse_slice(text)
    except ValueError as e:
        raise InputError(f"--aot: {e}") from None
    run, report = compile_step(config, where)
    print(describe(run))
    if isinstance(report, str):
        print("\n".join(_does_not_fit(report, where.chip)))
    else:
        print("\n".join(_fits(run, report, where)))
    print("\n".join(_largest(run)))
    return not isinstance(report, str) and report.peak_bytes <= where.chip.hbm_bytes


def _fits(run: Run, report: Report, where: Slice) -> list[str]:
    chip, bound = where.chip, roofline(run, report, where)
    room = chip.hbm_bytes - report.peak_bytes
    verdict = f"fits, {size(room)} free" if room >= 0 else f"DOES NOT FIT, {size(-room)} too much"
    choices = ", ".join(f"{c.op}: {c.implementation}" for c in dispatch.choices())
    parts = {
        "state and batch": report.argument_bytes,
        "temporaries": report.temp_bytes,
        "program": report.code_bytes,
        "outputs that reuse nothing": report.output_bytes - report.aliased_bytes,
    }
    memory = ", ".join(f"{name} {size(count)}" for name, count in parts.items())
    rows = [[c.kind, str(c.count), size(c.bytes)] for c in report.collectives]
    times = ", ".join(f"{f.name} {getattr(bound, f.name):.3f} s" for f in dataclasses.fields(bound))
    return [
        f"ops: {choices}",
        f"memory a chip: {size(report.peak_bytes)} of {size(chip.hbm_bytes)}: {verdict} ({memory})",
        "",
        *table(["collective, a step and chip", "count", "bytes"], rows),
        "",
        f"roofline (public figures, not a measurement): {times}; a step takes at least {bound.step:.3f} s, "
        f"so MFU is at most {bound.mfu_bound:.0%}",
    ]


def _does_not_fit(message: str, chip: Tpu) -> list[str]:
    """XLA's own words on what it would have needed: it gives up before there is a program to look
    into.
    """
    needed = re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", message)
    if needed is None:
        return [
            f"memory a chip: more than {size(chip.hbm_bytes)}: DOES NOT FIT ({message.splitlines()[0]})"
        ]
    wanted, there = float(needed[1]), float(needed[2])
    over = f"{wanted - there:.1f} GiB too much"
    return [
        f"memory a chip: temporaries alone take {wanted} GiB of {there} GiB: DOES NOT FIT, {over}"
    ]


def _largest(run: Run) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(run.abstract)
    leaves.sort(key=lambda item: -_device_bytes(item[1]))
    rows = [
        [
            jax.tree_util.keystr(path, simple=True, separator="."),
            str(leaf.shape),
            size(_device_bytes(leaf)),
        ]
        for path, leaf in leaves[:LARGEST]
    ]
    return ["", *table(["largest arrays of the state", "shape", "a chip"], rows)]


def _device_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
