"""linear_scan's GPU kernels compiled for an H200 that is not here: no register spills, types
checked on a mesh.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda_plugin import needs_cuda_plugin, needs_ptxas
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gatedjax.aot import compile_for
from gatedjax.aot.cases import make_case
from gatedjax.aot.gpu import devices, find_nvdisasm
from gatedjax.aot.targets import GPUS
from kernels_pallas import dispatch
from kernels_pallas.common import two_paths
from kernels_pallas.ops import linear_scan

pytestmark = needs_cuda_plugin
SHAPES = ("B4,T4096,H16,K128,V128", "B8,T2048,H4,K256,V512", "B1,T32768,H16,K128,V128")
STAGES = ("products", "forward", "dproducts", "backward", "backward_products")


def stage(kernel: str) -> str:
    return re.sub(r"^linear_scan_(vector_|scalar_|none_)?|__\d+$", "", kernel)


# Ten registers a thread, on Hopper with 128 channels in 16 bits: of the blocks timed on an
# H200 these were the fastest all the same.
FASTEST_SPILLS = {"linear_scan_vector_backward_products": 40}


def no_spills(target: str, fn, *args, allowed: int = 0) -> set[str]:
    """The stages compiled; none of them spills more bytes than allowed, or than is the fastest."""
    _, report = compile_for(target, fn, *args)
    kernels = [k for k in report.kernels if k.name.startswith("linear_scan")]
    most = FASTEST_SPILLS if target != "cuda:a100" else {}
    spills = {k.name: k.spill_bytes for k in kernels if k.spill_bytes > most.get(k.name, allowed)}
    assert spills == {}
    assert all(k.wgmma + k.mma > 0 and k.blocks_per_core >= 1 for k in kernels)
    return {stage(k.name) for k in kernels}


@needs_ptxas
@pytest.mark.parametrize("decay", ["vector", "scalar"])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_kernel_spills(shape, decay):
    """Forward and backward in one program, as in training; chosen by dispatch, not by name."""
    case = make_case("linear_scan", shape, "bfloat16", {"decay": decay})
    stages = no_spills("cuda:h200", case.backward(), *case.backward_args())
    assert stages == {
        *STAGES,
        *(["forward_summaries", "backward_summaries"] if shape.startswith("B1,") else []),
    }
    assert dispatch.last_choice("linear_scan").implementation == "gpu"


@needs_ptxas
@pytest.mark.parametrize("target", ["cuda:h100", "cuda:a100"])
@pytest.mark.parametrize("decay", ["vector", "scalar"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("D", [32, 64, 96, 128, 256])
def test_no_size_that_is_claimed_spills(D, dtype, decay, target, monkeypatch):
    """The kernels of a training step, without the recurrence beside them, which takes long."""
    monkeypatch.setattr(two_paths, "if_bad", lambda is_bad, careful, fast, *args: fast)
    case = make_case("linear_scan", f"B4,T1024,H16,K{D},V{D}", dtype, {"decay": decay})
    assert no_spills(target, case.backward(), *case.backward_args()) >= set(STAGES)
    assert dispatch.last_choice("linear_scan").implementation == "gpu"


@needs_ptxas
@pytest.mark.skipif(not find_nvdisasm(), reason="there is no nvdisasm (pip install triton)")
@pytest.mark.parametrize("target", ["cuda:h100", "cuda:a100"])
def test_chunks_are_copied_ahead_where_programs_share_a_multiprocessor(target, monkeypatch):
    """256 programs of the scan: two fit beside each other, with two stages each."""
    monkeypatch.setattr(two_paths, "if_bad", lambda is_bad, careful, fast, *args: fast)
    case = make_case("linear_scan", "B8,T1024,H16,K128,V128", "bfloat16", {"decay": "vector"})
    _, report = compile_for(target, case.backward(), *case.backward_args())
    scans = [k for k in report.kernels if stage(k.name) in ("forward", "backward")]
    assert scans and all(k.async_copies > 0 and k.blocks_per_core >= 2 for k in scans)
    assert all(k.spill_bytes == 0 and k.warnings == () for k in scans)


# A warp's instructions for a level of a chunk and 64 channels, at K = V = 128 on Hopper; with the
# exponential of CUDA's library it was 675. An exponential is taken at each of six levels.
LEVEL_INSTRUCTIONS = 320


@needs_ptxas
@pytest.mark.skipif(not find_nvdisasm(), reason="there is no nvdisasm (pip install triton)")
def test_instructions_of_a_level():
    case = make_case("linear_scan", "B1,T256,H2,K128,V128", "bfloat16", {"decay": "vector"})
    _, report = compile_for("cuda:h100", case.forward, *case.args)
    counts = [k.tile_instructions for k in report.kernels if stage(k.name) == "products"]
    assert counts and all(0 < count <= LEVEL_INSTRUCTIONS for count in counts), counts


@needs_ptxas
@pytest.mark.parametrize("decay", ["vector", "scalar"])
def test_no_kernel_spills_with_every_option(decay):
    """Exclusive reads with a bonus, packed, reversed, normalized, grouped values: at most two
    registers too many.
    """
    B, T, H, K = 2, 1024, 8, 128
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    log_decay = (
        array(B, T, H, K, dtype=jnp.float32)
        if decay == "vector"
        else array(B, T, H, dtype=jnp.float32)
    )
    floats = (
        array(B, T, H, K),
        array(B, T, H // 2, K),
        array(B, T, H // 4, 128),
        log_decay,
        array(H, K),
    )

    def both(segment_ids, *floats):
        def loss(q, k, v, g, u):
            kept = dict(
                bonus=u, inclusive=False, segment_ids=segment_ids, reverse=True, normalize=True
            )
            o, state = linear_scan(q, k, v, g, **kept, return_final_state=True)
            return (o.astype(jnp.float32) ** 2).sum() + (state**2).sum()

        return jax.grad(loss, argnums=range(5))(*floats)

    assert no_spills("cuda:h200", both, array(B, T, dtype=jnp.int32), *floats, allowed=16) == set(
        STAGES
    )


@pytest.mark.parametrize(
    "target, dtype", [("cuda:a100", "bfloat16"), ("cuda:h100", "float16"), ("cuda:h200", "float32")]
)
def test_other_chips_and_dtypes_compile(target, dtype):
    """float32 operands take three passes, and may spill in the scan."""
    case = make_case(
        "linear_scan", "B2,T512,H4,K96,V80", dtype, {"decay": "vector", "implementation": "gpu"}
    )
    _, report = compile_for(target, case.backward(), *case.backward_args())
    assert {stage(k.name) for k in report.kernels if "linear_scan" in k.name} >= set(STAGES)


@needs_ptxas
@pytest.mark.parametrize("dtype, K, V", [("bfloat16", 512, 512), ("float32", 256, 128)])
def test_large_heads_fit_into_shared_memory(dtype, K, V):
    """Fewer chunks in flight, or ptxas would refuse."""
    case = make_case(
        "linear_scan", f"B1,T256,H2,K{K},V{V}", dtype, {"decay": "scalar", "implementation": "gpu"}
    )
    _, report = compile_for("cuda:h200", case.backward(), *case.backward_args())
    limit = GPUS["h200"].shared_memory_per_block
    assert all(k.shared_memory_bytes <= limit for k in report.kernels if "linear_scan" in k.name)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_of_two(axis_type):
    """Under plain jit, and inside shard_map with varying axes checked: no device gathers another's
    rows.
    """
    mesh = Mesh(np.array(devices(GPUS["h200"], 2)), ("data",), axis_types=(axis_type,))
    placed = lambda *shape: jax.ShapeDtypeStruct(
        shape, jnp.bfloat16, sharding=NamedSharding(mesh, P("data"))
    )
    x = [placed(2, 256, 2, 64)] * 4
    loss = lambda *x: linear_scan(*x).astype(jnp.float32).sum()
    gradient = jax.grad(loss, argnums=range(4))
    with jax.set_mesh(mesh):
        programs = [gradient]
        if axis_type == AxisType.Auto:
            specs = (P("data"),) * 4
            programs.append(
                jax.shard_map(gradient, in_specs=specs, out_specs=specs, check_vma=True)
            )
        for program in programs:
            lowered = jax.jit(program).trace(*x).lower(lowering_platforms=("cuda",))
            text = lowered.compile(compiler_options={"xla_gpu_autotune_level": 0}).as_text()
            assert "all-gather" not in text and "linear_scan_vector_products" in text
