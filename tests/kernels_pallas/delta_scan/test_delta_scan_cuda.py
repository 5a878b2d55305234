"""delta_scan's GPU kernels compiled for GPUs that are not here: no register spills, no warnings of
the assembler, types checked on a mesh.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda_plugin import needs_cuda_plugin
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gatedjax.aot import compile_for
from gatedjax.aot.cases import make_case
from gatedjax.aot.gpu import devices, find_ptxas
from gatedjax.aot.targets import GPUS
from kernels_pallas import dispatch
from kernels_pallas.common import two_paths
from kernels_pallas.ops import delta_scan

pytestmark = needs_cuda_plugin
needs_ptxas = pytest.mark.skipif(
    not find_ptxas(), reason="there is no ptxas (pip install nvidia-cuda-nvcc)"
)
STAGES = {"scores", "inverse", "forward", "backward", "backward_changes", "backward_terms"}
MAPS = {"forward_from_zeros", "forward_map", "backward_from_zeros", "backward_map"}


@pytest.fixture
def without_recurrence(monkeypatch):
    """The kernels of a training step, without what is beside them and takes long to compile."""
    monkeypatch.setattr(two_paths, "if_bad", lambda is_bad, careful, fast, *args: fast)


# Of Hopper's way back through vector decays: an H200 takes a sixth longer for the best cut of those
# that spill nothing.
SPILLS = {"delta_scan_vector_backward_terms": 600}


def clean_stages(target: str, fn, *args) -> set[str]:
    """The stages compiled; none of them spills, and ptxas has nothing to say of any."""
    _, report = compile_for(target, fn, *args)
    kernels = [k for k in report.kernels if k.name.startswith("delta_scan")]
    allowed = {} if "a100" in target else SPILLS
    spilled = {k.name: k.spill_bytes for k in kernels if k.spill_bytes > allowed.get(k.name, 0)}
    assert spilled == {}
    assert {k.name: k.warnings for k in kernels if k.warnings} == {}
    assert all(k.wgmma + k.mma > 0 and k.blocks_per_core >= 1 for k in kernels)
    return {re.sub(r"^delta_scan_(vector_|scalar_|none_)?|__\d+$", "", k.name) for k in kernels}


@needs_ptxas
@pytest.mark.parametrize("target", ["cuda:h100", "cuda:a100"])
@pytest.mark.parametrize("decay", ["vector", "scalar"])
@pytest.mark.parametrize("D", [64, 96, 128, 192, 256])
def test_no_size_that_is_claimed_spills(D, decay, target, without_recurrence):
    case = make_case("delta_scan", f"B4,T1024,H16,K{D},V{D}", "bfloat16", {"decay": decay})
    assert clean_stages(target, case.backward(), *case.backward_args()) == STAGES
    assert dispatch.last_choice("delta_scan").implementation == "gpu"


@needs_ptxas
def test_a_long_sequence_of_few_heads_is_cut(without_recurrence):
    """The whole program, by the schedule of an H200: the maps of the segments, then the scan."""
    case = make_case("delta_scan", "B1,T32768,H4,K128,V128", "bfloat16", {"decay": "vector"})
    assert clean_stages("cuda:h200", case.backward(), *case.backward_args()) == STAGES | MAPS


@needs_ptxas
@pytest.mark.parametrize("decay", ["vector", "scalar", "none"])
def test_no_kernel_spills_with_every_option(decay, without_recurrence):
    """Packed, grouped, an initial and a final state, own erase keys and weights of values."""
    B, T, H, K = 2, 1024, 8, 128

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    logs = {"vector": (B, T, H, K), "scalar": (B, T, H)}
    floats = {
        "q": array(B, T, H // 2, K),
        "k": array(B, T, H // 4, K),
        "v": array(B, T, H, K),
        "erase": array(B, T, H, K),
        "write": array(B, T, H, K),
        "initial_state": array(B, H, K, K, dtype=jnp.float32),
    }
    if decay != "none":
        floats["log_decay"] = array(*logs[decay], dtype=jnp.float32)

    def both(segment_ids, floats):
        def loss(floats):
            kept = dict(segment_ids=segment_ids, l2_norm=True, return_final_state=True)
            o, state = delta_scan(**floats, **kept, implementation="gpu")
            return o.astype(jnp.float32).sum() + state.sum()

        return jax.grad(loss)(floats)

    stages = clean_stages("cuda:h100", both, array(B, T, dtype=jnp.int32), floats)
    assert stages >= STAGES


def test_with_the_recurrence_beside_the_kernels():
    """The program that runs: all of it compiles, and is not cut off from other dtypes."""
    case = make_case("delta_scan", "B1,T256,H2,K64,V64", "float32", {"decay": "scalar"})
    _, report = compile_for("cuda:h200", case.backward(), *case.backward_args())
    assert sum("delta_scan" in k.name for k in report.kernels) >= len(STAGES)


@needs_ptxas
@pytest.mark.parametrize("dtype, K, V", [("bfloat16", 256, 512), ("float32", 256, 128)])
def test_large_heads_fit_into_shared_memory(dtype, K, V, without_recurrence):
    """Fewer chunks in flight, or ptxas would refuse."""
    options = {"decay": "scalar", "implementation": "gpu"}
    case = make_case("delta_scan", f"B1,T256,H2,K{K},V{V}", dtype, options)
    _, report = compile_for("cuda:h200", case.backward(), *case.backward_args())
    limit = GPUS["h200"].shared_memory_per_block
    assert all(k.shared_memory_bytes <= limit for k in report.kernels if "delta_scan" in k.name)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_of_two(axis_type):
    """No device gathers another's rows."""
    mesh = Mesh(np.array(devices(GPUS["h200"], 2)), ("data",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, P("data"))

    def placed(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    x = [placed(2, 256, 2, 64)] * 3 + [placed(2, 256, 2, dtype=jnp.float32)] * 2

    def loss(*x):
        return delta_scan(*x).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss, argnums=range(len(x))))
        lowered = gradient.trace(*x).lower(lowering_platforms=("cuda",))
        text = lowered.compile(compiler_options={"xla_gpu_autotune_level": 0}).as_text()
    assert "all-gather" not in text
    assert "delta_scan_scalar_scores" in text
