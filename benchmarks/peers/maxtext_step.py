"""MaxText's training step for TPUs that are not here: a row of `benchmarks/step.py`, which is one
chip and has a model time, or of `benchmarks/step_slices.py`, which has collectives. They call it.

    python maxtext_step.py '{"slice": "v5p:1", "flops": ..., "options": {...}}'
    python maxtext_step.py '{"slice": "v5p:2x2x4", "compiler_options": {}, "options": {...}}'

Needs MaxText and gatedjax, whose replay of schedules and reading of compiled texts it uses;
docs/performance.md says how they are installed. Says one line of JSON.
"""

import dataclasses
import json
import math
import os
import sys
import time
from importlib import metadata
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu is loaded to compile, not to run
# MaxText looks for Google Cloud at import otherwise.
os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")

from gatedjax.aot import hlo, libtpu, parse_slice, prefetch, report_compiled, slice_devices
from gatedjax.aot.report import Report
from gatedjax.aot.schedule import Dump
from gatedjax.aot.step import expert_loads
from gatedjax.aot.targets import Tpu

SPEC = json.loads(sys.argv[1]) if __name__ == "__main__" else {}
# libtpu reads its flags when it is loaded.
FOLDER = libtpu.start(schedule="flops" in SPEC)

import jax  # noqa: E402
import maxtext  # noqa: E402
import numpy as np  # noqa: E402
from flax.core.spmd import logical_axis_rules  # noqa: E402
from jax.sharding import AxisType, Mesh  # noqa: E402
from maxtext.configs import pyconfig  # noqa: E402
from maxtext.trainers.pre_train import train  # noqa: E402
from maxtext.trainers.pre_train.train_compile import get_shaped_inputs  # noqa: E402
from maxtext.utils import maxtext_utils, sharding  # noqa: E402
from megablox import with_loads  # noqa: E402


def main() -> None:
    """Configuration -> abstract state -> compiled step -> its replay, or its collectives."""
    started = time.process_time()
    where = parse_slice(SPEC["slice"])
    devices = slice_devices(where)
    config = configuration(SPEC["options"], len(devices))
    grid = maxtext_utils.create_device_mesh(config, devices)
    mesh = Mesh(grid, config.mesh_axes, axis_types=(AxisType.Auto,) * len(config.mesh_axes))
    traced = traced_step(config, mesh)
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        lowered = traced.lower(lowering_platforms=("tpu",))
        before = time.process_time()
        compiled = lowered.compile(compiler_options=SPEC.get("compiler_options"))
    compile_seconds = time.process_time() - before
    report = report_compiled(f"tpu:{where.chip.name}", compiled, devices=len(devices))
    if FOLDER is None:
        figures = sent(report, traced)
    else:
        figures = replayed(config, traced, compiled.as_text(), where.chip)
    figures |= {
        "temporary_bytes": report.temp_bytes,
        "compile_seconds": compile_seconds,
        "cpu_seconds": time.process_time() - started,
        "maxtext": metadata.version("maxtext"),
    }
    print(json.dumps(figures))


def replayed(config, traced: jax.stages.Traced, text: str, chip: Tpu) -> dict:
    """The model time of a step on one chip; experts have the loads that ours have."""
    scalars = prefetch.scalar_operands(traced.jaxpr, one_document_a_row(traced))
    if config.num_experts > 1:
        tokens = config.global_batch_size_to_train_on * config.max_target_length
        loads = expert_loads(tokens * config.num_experts_per_tok, config.num_experts)
        # The first of a name is the one that is used.
        scalars = [*with_loads(hlo.kernel_calls(text), loads), *scalars]
    program = Dump(FOLDER, text, chip, scalars).program()
    seconds = program.cycles / chip.clock_hz
    return {
        "milliseconds": 1e3 * seconds,
        "utilization": SPEC["flops"] / chip.peak_flops / seconds,
        "missing": len(program.missing),
        "unknown_branches": program.unknown_branches,
    }


def sent(report: Report, traced: jax.stages.Traced) -> dict:
    """The collectives of a step on a slice, and how many parameters it has."""
    arguments, _ = jax.tree_util.tree_flatten_with_path(traced.args_info)
    sizes = [
        math.prod(leaf.shape)
        for path, leaf in arguments
        if is_parameter(jax.tree_util.keystr(path))
    ]
    return {
        "parameters": sum(sizes),
        "collectives": [dataclasses.asdict(kind) for kind in report.collectives],
    }


def configuration(options: dict, num_devices: int):
    """MaxText's, of a run on synthetic data."""
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    fixed = dict(
        run_name="step",
        base_output_directory="unused",
        enable_checkpointing=False,
        dataset_type="synthetic",
        skip_jax_distributed_system=True,
        log_config=False,
        hardware="tpu",
        # How many devices it counts for the batch; what is compiled for is the mesh's. Names of v5p
        # count two cores a chip.
        compile_topology="v5e-1" if num_devices == 1 else f"v5p-{2 * num_devices}",
        compile_topology_num_slices=1,
    )
    pairs = [f"{name}={value}" for name, value in (fixed | options).items()]
    return pyconfig.initialize(["train_compile.py", str(base), *pairs])


def traced_step(config, mesh: Mesh) -> jax.stages.Traced:
    """As MaxText's own train_compile.py lowers it."""
    arguments, keywords, state_shardings, _, model = get_shaped_inputs(mesh, config)
    params_shardings, state_shardings = sharding.maybe_update_params_sharding_with_opt(
        config,
        state_shardings,
    )
    state_shardings = sharding.build_zero1_input_state_mesh_shardings(
        config,
        state_shardings,
        params_shardings,
    )
    step, inputs, outputs, static, donated = maxtext_utils.get_functional_train_with_signature(
        train.train_step,
        sharding.get_input_data_sharding(config, mesh),
        state_shardings,
        model,
        config,
        params_shardings,
    )
    jitted = jax.jit(
        step,
        in_shardings=inputs,
        out_shardings=outputs,
        static_argnums=static,
        donate_argnums=donated,
    )
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        return jitted.trace(*arguments, **keywords)


def is_parameter(path: str) -> bool:
    """Whether an argument of the step is one: the model holds states of random numbers, too."""
    return "['model']" in path and "['rngs']" not in path


def one_document_a_row(traced: jax.stages.Traced) -> dict[int, np.ndarray]:
    """Values of the step's arguments, by their position, that steer kernels."""
    arguments, _ = jax.tree_util.tree_flatten_with_path(traced.args_info)
    known = {}
    for position, (path, leaf) in enumerate(arguments):
        if "segmentation" in jax.tree_util.keystr(path):
            known[position] = np.ones(leaf.shape, np.int32)
    return known


if __name__ == "__main__":
    main()
