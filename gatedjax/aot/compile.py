"""Compiles a function for an accelerator that is not there, and reports what the compiler and its
schedule tell.

    x = jax.ShapeDtypeStruct((4, 4096), jnp.bfloat16)
    compiled, report = compile_for("tpu:v5e", fn, x)

Needs libtpu for TPUs, jax's CUDA plugin for GPUs; no driver, no device. Executables are printed and
forgotten: none is ever loaded from a file, because jax's form of a stored executable is unpickled,
and runs whatever was put into it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import topologies
from jax.extend import core as jax_core
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gatedjax.aot import gpu, hlo, libtpu, prefetch
from gatedjax.aot.cost import DeclaredCost, declared_cost
from gatedjax.aot.replay import Schedule
from gatedjax.aot.report import GpuKernel, HloTime, Report, TpuKernel
from gatedjax.aot.schedule import Called, Dump, ProgramRun
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
    """Compiles `fn(*args)` for one device of a target.

    Args:
      target_name: "tpu:v5e", "tpu:v5p", "tpu:v6e", "tpu:v7x", "cuda:a100", "cuda:h100" or
        "cuda:h200".
      fn: what is compiled.
      args: arrays or `jax.ShapeDtypeStruct`s, in any pytree.
      donate_argnums: as of `jax.jit`.
      concrete: values of arguments (by their position among the leaves) that steer a kernel's
        control flow, such as group sizes; without them the replay calls those branches unknown.
      schedule: also replay the schedule (TPU). The dump that it needs slows large compilations down
        several times, and has to be on from a process's first compilation.

    Returns:
      The program, which cannot run here, and a report.

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
    """Compiles once and replays the schedule for each of several sets of steering values.

    Args:
      target_name, fn, args, donate_argnums, schedule: as of `compile_for`.
      concretes: by name, values of arguments as `concrete` of `compile_for`.

    Returns:
      The program, and one report for each name in `concretes`.

    Raises:
      ValueError, RuntimeError: as `compile_for`.
    """
    chip = target(target_name)
    # Before anything else touches libtpu: it reads its flags once.
    folder = libtpu.start(schedule) if isinstance(chip, Tpu) else None
    traced, lowered = _lower(chip, jax.jit(fn, donate_argnums=donate_argnums), args)
    kernels: tuple[GpuKernel, ...] = ()
    if isinstance(chip, Gpu):
        compiled, kernels = gpu.compile_lowered(lowered, chip)
    else:
        compiled = lowered.compile()
    report = report_compiled(target_name, compiled, traced.jaxpr.jaxpr, kernels=kernels)
    if folder is None or isinstance(chip, Gpu):
        return compiled, dict.fromkeys(concretes, report)
    text = compiled.as_text() or ""
    reports = {}
    for name, concrete in concretes.items():
        scalars = prefetch.scalar_operands(traced.jaxpr, concrete)
        dump = Dump(folder, text, chip, scalars)
        reports[name] = _with_schedule(report, dump, chip, text)
    return compiled, reports


def _lower(
    chip: Tpu | Gpu,
    fn: jax.stages.Wrapped,
    args: tuple,
) -> tuple[jax.stages.Traced, jax.stages.Lowered]:
    """Traces and lowers `fn(*args)` for a mesh of one absent device."""
    devices = np.array(_devices(chip)[:1])
    mesh = Mesh(devices, ("device",), axis_types=(AxisType.Auto,))
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(x) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated)

    placed = jax.tree.map(place, args)
    with jax.sharding.set_mesh(mesh):
        traced = fn.trace(*placed)
        lowered = traced.lower(lowering_platforms=(chip.platform,))
    return traced, lowered


def slice_devices(where: Slice) -> list:
    """The devices of a slice that is not there, for a mesh.

    Raises:
      ValueError: libtpu knows no such shape.
      RuntimeError: libtpu is not installed.
    """
    libtpu.quieten()
    devices = _tpu_devices(where.topology, where.num_slices)
    return devices[:1] if where.is_one_chip else devices


def report_compiled(
    target_name: str,
    compiled: jax.stages.Compiled,
    jaxpr: jax_core.Jaxpr | None = None,
    kernels: Sequence[TpuKernel | GpuKernel] = (),
    devices: int = 1,
) -> Report:
    """What a compiled program tells without its schedule.

    Args:
      target_name: of the report.
      compiled: the program.
      jaxpr: what it was compiled from, for the costs that its kernels declare.
      kernels: of the report.
      devices: on which the program runs.

    Returns:
      A report without model times.
    """
    memory = compiled.memory_analysis()
    assert memory is not None, "the compiler gave no memory analysis"
    cost = compiled.cost_analysis() or {}
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
        collectives=hlo.collectives(compiled.as_text() or ""),
        kernels=tuple(kernels),
        program_seconds=None,
        program_hbm_bytes=None,
        slowest=(),
        notes=(),
    )


def _with_schedule(report: Report, dump: Dump, chip: Tpu, text: str) -> Report:
    """The report with the model's times of the kernels and of the whole program."""
    kernels = []
    notes = []
    for call in hlo.kernel_calls(text):
        run = dump.kernel(call.name)
        if run is None:
            notes.append(f"no schedule of kernel {call.name} was written")
        else:
            kernels.append(_tpu_kernel(call, run, chip))
    program = dump.program()
    if program is None:
        notes.append("no schedule of the program was written")
        return dataclasses.replace(report, kernels=tuple(kernels), notes=tuple(notes))
    notes += _program_notes(program)
    slowest = sorted(program.called.items(), key=lambda item: -item[1].cycles)
    return dataclasses.replace(
        report,
        kernels=tuple(kernels),
        program_seconds=program.cycles / chip.clock_hz,
        program_hbm_bytes=program.hbm_bytes,
        slowest=tuple(_hlo_time(name, called, chip) for name, called in slowest[:SLOWEST]),
        notes=tuple(notes),
    )


def _program_notes(program: ProgramRun) -> list[str]:
    """What makes the program's time a lower bound."""
    notes = []
    if program.missing:
        missing = ", ".join(program.missing)
        notes.append(f"not in the model time, for want of a schedule: {missing}")
    if program.unknown_branches:
        notes.append(
            f"{program.unknown_branches} branches follow data and count as not taken: the time is "
            "a lower bound"
        )
    return notes


def _hlo_time(name: str, called: Called, chip: Tpu) -> HloTime:
    return HloTime(
        name=name,
        calls=called.calls,
        seconds=called.cycles / chip.clock_hz,
        stall_seconds=called.stall / chip.clock_hz,
        hbm_bytes=called.hbm_bytes,
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
    if isinstance(chip, Tpu):
        return _tpu_devices(chip.topology)
    return gpu.devices(chip)


def _tpu_devices(topology: str, num_slices: int = 1) -> list:
    if not libtpu.installed():
        raise RuntimeError("aot: libtpu is not installed; pip install 'gatedjax[aot]' (Linux)")
    options = {} if num_slices == 1 else {"num_slices": num_slices}
    try:
        description = topologies.get_topology_desc(topology, platform="tpu", **options)
    except Exception as error:  # libtpu's complaints have no type of their own
        first_line = str(error).splitlines()[0]
        raise ValueError(
            f"slice: got {topology!r}, which libtpu refuses: {first_line}",
        ) from None
    return list(description.devices)
