"""Compiles a function for an accelerator that is not there, and reports what the compiler and its
schedule tell.

    compiled, report = compile_for("tpu:v5e", fn, jax.ShapeDtypeStruct((4, 4096), jnp.bfloat16), ...)

Needs libtpu for TPUs, jax's CUDA plugin for GPUs; no driver, no device. Executables are printed and
forgotten: none is ever loaded from a file, because jax's form of a stored executable is unpickled,
and runs whatever was put into it.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gatedjax.aot import gpu, hlo, libtpu, prefetch
from gatedjax.aot.cost import DeclaredCost, declared_cost
from gatedjax.aot.replay import Schedule
from gatedjax.aot.report import HloTime, Report, TpuKernel
from gatedjax.aot.schedule import Dump
from gatedjax.aot.targets import Gpu, Slice, Tpu, target

SLOWEST = 12  # HLOs that a report lists by their time


def compile_for(
    target_name: str,
    fn: Callable,
    *args,
    donate_argnums: tuple[int, ...] = (),
    concrete: Mapping[int, np.ndarray] | None = None,
    schedule: bool = True,
) -> tuple[jax.stages.Compiled, Report]:
    """Compiles `fn(*args)` for one device of a target; returns the program, which cannot run here,
    and a report.

    Args:
      target_name: "tpu:v5e", "tpu:v5p", "tpu:v6e", "tpu:v7x", "cuda:a100", "cuda:h100" or
        "cuda:h200".
      args: arrays or `jax.ShapeDtypeStruct`s, in any pytree.
      concrete: values of arguments (by their position among the leaves) that steer a kernel's
        control flow, such as group sizes; without them the replay calls those branches unknown.
      schedule: also replay the schedule (TPU). The dump that it needs slows large compilations down
        several times, and has to be on from a process's first compilation.

    Raises:
      ValueError: an unknown target.
      RuntimeError: libtpu or the CUDA plugin is not installed, or libtpu was loaded without
        schedules before.
    """
    compiled, reports = compile_and_replay(
        target_name,
        fn,
        *args,
        donate_argnums=donate_argnums,
        concretes={"": concrete or {}},
        schedule=schedule,
    )
    return compiled, reports[""]


def compile_and_replay(
    target_name: str,
    fn: Callable,
    *args,
    concretes: Mapping[str, Mapping[int, np.ndarray]],
    donate_argnums: tuple[int, ...] = (),
    schedule: bool = True,
) -> tuple[jax.stages.Compiled, dict[str, Report]]:
    """As `compile_for`, with one report for each set of steering values: compiled once, replayed
    for each.
    """
    chip = target(target_name)
    folder = libtpu.start(schedule) if isinstance(chip, Tpu) else None
    mesh = Mesh(np.array(_devices(chip)[:1]), ("device",), axis_types=(AxisType.Auto,))
    place = lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec())
    )
    placed = jax.tree.map(place, args)
    with jax.sharding.set_mesh(mesh):
        traced = jax.jit(fn, donate_argnums=donate_argnums).trace(*placed)
        lowered = traced.lower(lowering_platforms=(chip.platform,))
        compiled, kernels = (
            gpu.compile_lowered(lowered, chip) if isinstance(chip, Gpu) else (lowered.compile(), ())
        )
    report = report_compiled(target_name, compiled, traced.jaxpr.jaxpr, kernels=kernels)
    if folder is None:
        return compiled, dict.fromkeys(concretes, report)
    text, reports = compiled.as_text(), {}
    for name, concrete in concretes.items():
        scalars = prefetch.scalar_operands(traced.jaxpr, concrete)
        reports[name] = _with_schedule(report, Dump(folder, text, chip, scalars), chip, text)
    return compiled, reports


def slice_devices(where: Slice) -> list:
    """The devices of a slice that is not there, for a mesh.

    Raises:
      ValueError: libtpu knows no such shape.
      RuntimeError: libtpu is not installed.
    """
    libtpu.start(schedule=False)
    return _tpu_devices(where.topology, where.num_slices)


def report_compiled(
    target_name: str, compiled: jax.stages.Compiled, jaxpr=None, kernels=(), devices: int = 1
) -> Report:
    """What a compiled program tells without its schedule."""
    memory, cost, text = (
        compiled.memory_analysis(),
        compiled.cost_analysis() or {},
        compiled.as_text(),
    )
    return Report(
        target=target_name,
        devices=devices,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        compiler_flops=cost.get("flops"),
        compiler_bytes=cost.get("bytes accessed"),
        declared=DeclaredCost() if jaxpr is None else declared_cost(jaxpr),
        collectives=hlo.collectives(text),
        kernels=tuple(kernels),
        program_seconds=None,
        program_hbm_bytes=None,
        slowest=(),
        notes=(),
    )


def _with_schedule(report: Report, dump: Dump, chip: Tpu, text: str) -> Report:
    calls = hlo.kernel_calls(text)
    runs = {call: dump.kernel(call.name) for call in calls}
    kernels = tuple(_tpu_kernel(call, run, chip) for call, run in runs.items() if run is not None)
    notes = [
        f"no schedule of kernel {call.name} was written"
        for call, run in runs.items()
        if run is None
    ]
    program = dump.program()
    if program is None:
        return dataclasses.replace(
            report, kernels=kernels, notes=(*notes, "no schedule of the program was written")
        )
    if program.missing:
        notes.append(f"not in the model time, for want of a schedule: {', '.join(program.missing)}")
    if program.unknown_branches:
        notes.append(
            f"{program.unknown_branches} branches follow data and count as not taken: the time is a lower bound"
        )
    slowest = sorted(program.called.items(), key=lambda item: -item[1].cycles)[:SLOWEST]
    return dataclasses.replace(
        report,
        kernels=kernels,
        program_seconds=program.cycles / chip.clock_hz,
        program_hbm_bytes=program.hbm_bytes,
        slowest=tuple(
            HloTime(name, c.calls, c.cycles / chip.clock_hz, c.stall / chip.clock_hz, c.hbm_bytes)
            for name, c in slowest
        ),
        notes=tuple(notes),
    )


def _tpu_kernel(call: hlo.KernelCall, run: Schedule, chip: Tpu) -> TpuKernel:
    return TpuKernel(
        name=call.name,
        vmem_bytes=call.vmem_bytes,
        seconds=run.cycles / chip.clock_hz,
        schedule_seconds=run.bundles / chip.clock_hz,
        bundles=run.bundles,
        matrix_busy=run.matrix_busy,
        vector_spills=run.spills,
        hbm_bytes=run.hbm_bytes,
        slots=run.slots,
        unknown=run.unknown,
    )


def _devices(chip: Tpu | Gpu) -> list:
    return _tpu_devices(chip.topology) if isinstance(chip, Tpu) else gpu.devices(chip)


def _tpu_devices(topology: str, num_slices: int = 1) -> list:
    if not libtpu.installed():
        raise RuntimeError("aot: libtpu is not installed; pip install 'gatedjax[aot]' (Linux)")
    try:
        slices = {} if num_slices == 1 else {"num_slices": num_slices}
        return list(topologies.get_topology_desc(topology, platform="tpu", **slices).devices)
    except Exception as e:  # libtpu's complaints have no type of their own
        raise ValueError(
            f"slice: got {topology!r}, which libtpu refuses: {str(e).splitlines()[0]}"
        ) from None
