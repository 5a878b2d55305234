"""MaxText's training step for one TPU that is not here, in the same compiler's model: a row of
`benchmarks/step.py`, which calls it.

    python maxtext_step.py '{"target": "v5p", "flops": ..., "options": {...}}'

Needs MaxText and gatedjax, whose replay of schedules it uses; docs/performance.md says how they are
installed. Says one line of JSON.
"""

import json
import os
import sys
import time
from importlib import metadata
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu is loaded to compile, not to run
# MaxText looks for Google Cloud at import otherwise.
os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")

from gatedjax.aot import libtpu, parse_slice, prefetch, report_compiled, slice_devices
from gatedjax.aot.schedule import Dump

# libtpu reads its flags when it is loaded.
FOLDER = libtpu.start(schedule=True)

import jax  # noqa: E402
import maxtext  # noqa: E402
import numpy as np  # noqa: E402
from flax.core.spmd import logical_axis_rules  # noqa: E402
from jax.sharding import AxisType, Mesh  # noqa: E402
from maxtext.configs import pyconfig  # noqa: E402
from maxtext.trainers.pre_train import train  # noqa: E402
from maxtext.trainers.pre_train.train_compile import get_shaped_inputs  # noqa: E402
from maxtext.utils import maxtext_utils, sharding  # noqa: E402


def main() -> None:
    """Configuration -> abstract state -> compiled step -> its replay."""
    spec = json.loads(sys.argv[1])
    started = time.process_time()
    where = parse_slice(f"{spec['target']}:1")
    devices = slice_devices(where)[:1]
    config = configuration(spec["options"])
    grid = np.asarray(devices).reshape((1,) * len(config.mesh_axes))
    mesh = Mesh(grid, config.mesh_axes, axis_types=(AxisType.Auto,) * len(config.mesh_axes))
    traced = traced_step(config, mesh)
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        lowered = traced.lower(lowering_platforms=("tpu",))
        before = time.process_time()
        compiled = lowered.compile()
    compile_seconds = time.process_time() - before
    report = report_compiled(f"tpu:{where.chip.name}", compiled, devices=1)
    scalars = prefetch.scalar_operands(traced.jaxpr, one_document_a_row(traced))
    program = Dump(FOLDER, compiled.as_text(), where.chip, scalars).program()
    seconds = program.cycles / where.chip.clock_hz
    figures = {
        "milliseconds": 1e3 * seconds,
        "utilization": spec["flops"] / where.chip.peak_flops / seconds,
        "missing": len(program.missing),
        "unknown_branches": program.unknown_branches,
        "temporary_bytes": report.temp_bytes,
        "compile_seconds": compile_seconds,
        "cpu_seconds": time.process_time() - started,
        "maxtext": metadata.version("maxtext"),
    }
    print(json.dumps(figures))


def configuration(options: dict):
    """MaxText's, of a run on synthetic data on one device."""
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    fixed = dict(
        run_name="step",
        base_output_directory="unused",
        enable_checkpointing=False,
        dataset_type="synthetic",
        skip_jax_distributed_system=True,
        log_config=False,
        hardware="tpu",
        # How many devices it counts for the batch; what is compiled for is the mesh's.
        compile_topology="v5e-1",
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
