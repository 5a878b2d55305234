"""attention's GPU kernels compiled for GPUs that are not here: no register spills, no matrix
instructions that ptxas serializes, counts of instructions, types checked on a mesh.
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
from kernels_pallas.attention import NORMALIZERS, attention_step
from kernels_pallas.ops import attention

pytestmark = needs_cuda_plugin
STAGES = {
    64: {"forward", "dq", "dkdv"},
    128: {"forward", "dq", "dkdv"},
    256: {"forward", "dq", "dk", "dv"},
}
array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)


def kernels_of(target: str, fn, *args, serialized: frozenset[str] = frozenset()) -> list:
    _, report = compile_for(target, fn, *args)
    kernels = [k for k in report.kernels if k.name.startswith("attention")]
    limit = GPUS[target.removeprefix("cuda:")].shared_memory_per_block
    assert all(k.wgmma + k.mma > 0 and k.shared_memory_bytes <= limit for k in kernels)
    # C75xx: ptxas gave up on running matrix instructions beside others.
    assert {k.name: k.warnings for k in kernels if k.warnings and k.name not in serialized} == {}
    return kernels


def stages(kernels: list) -> set[str]:
    return {re.sub(r"^attention_|__\d+$", "", k.name) for k in kernels}


def spills(kernels: list) -> dict[str, int]:
    return {k.name: k.spill_bytes for k in kernels if k.spill_bytes}


@needs_ptxas
@pytest.mark.parametrize(
    "shape", ["B4,T4096,H16,D64", "B4,T4096,H16,D128", "B1,T32768,H16,Hk2,D256"]
)
def test_no_kernel_spills(shape):
    """Forward and backward in one program, as in training; chosen by dispatch, not by name."""
    case = make_case("attention", shape, "bfloat16", {"gate": "element"})
    kernels = kernels_of("cuda:h200", case.backward(), *case.backward_args())
    D = int(shape.rpartition("D")[2])
    assert stages(kernels) == STAGES[D]
    assert max([*spills(kernels).values(), 0]) <= SPILLS.get(("bfloat16", D), 0), spills(kernels)
    assert all(k.wgmma > 0 for k in kernels)
    assert dispatch.last_choice("attention").implementation == "gpu"


CLAIMED = [("cuda:h100", "bfloat16", D) for D in (32, 64, 96, 128, 256)]
CLAIMED += [("cuda:h100", "float16", D) for D in (32, 64, 96, 128, 256)]
CLAIMED += [("cuda:h100", "float32", D) for D in (32, 64, 96, 128)]
CLAIMED += [("cuda:a100", "bfloat16", D) for D in (32, 64, 96, 128, 256)]
# Bytes a thread, stored and loaded. Cuts that spill none issue 65 % (float16) and twice (float32)
# as many instructions; those of bfloat16 take longer on an H200. 96 channels are padded to 128.
SPILLS = {
    ("bfloat16", 96): 128,
    ("bfloat16", 128): 128,
    ("float16", 96): 160,
    ("float16", 128): 160,
    ("float32", 96): 64,
    ("float32", 128): 64,
}
# Of the forward kernel that saves nothing: outside of its loops, where it looks for NaN.
SPILLS_ALONE = {
    ("bfloat16", 256): 32,
    ("float32", 96): 64,
    ("float32", 128): 64,
}


@needs_ptxas
@pytest.mark.parametrize("target, dtype, D", CLAIMED)
def test_no_size_and_dtype_that_is_claimed_spills(target, dtype, D):
    """The forward kernel alone, and the kernels of a training step; chosen by dispatch."""
    case = make_case("attention", f"B1,T4096,H2,D{D}", dtype, {"gate": "element"})
    alone = kernels_of(target, case.forward, *case.args)
    both = kernels_of(target, case.backward(), *case.backward_args())
    assert stages(alone) == {"forward"} and stages(both) >= {"forward", "dq"}
    assert max([*spills(alone).values(), 0]) <= SPILLS_ALONE.get((dtype, D), 0), spills(alone)
    most = SPILLS.get((dtype, D), 0)
    assert max([*spills(both).values(), 0]) <= most, spills(both)
    assert dispatch.last_choice("attention").implementation == "gpu"


# What a warp issues for a tile, at D = 128 on Hopper; with the exponential of CUDA's library it was
# half as much again. A warp of dkdv has a tile of 16 by 64, in the others of as many pairs.
TILE_INSTRUCTIONS = {"forward": 420, "dq": 382, "dkdv": 480}


@needs_ptxas
@pytest.mark.skipif(not find_nvdisasm(), reason="there is no nvdisasm (pip install triton)")
def test_instructions_of_a_tile():
    case = make_case("attention", "B4,T4096,H16,D128", "bfloat16", {})
    kernels = kernels_of("cuda:h100", case.backward(), *case.backward_args())
    counts = {k.name.removeprefix("attention_"): k.tile_instructions for k in kernels}
    assert counts.keys() == TILE_INSTRUCTIONS.keys()
    assert all(0 < counts[name] <= most for name, most in TILE_INSTRUCTIONS.items()), counts


def exponentials(kernel: str, dtype: str) -> bool:
    """Whether the kernel's text has 2^x as one instruction."""
    case = make_case("attention", "B1,T128,H1,D64", dtype, {"implementation": "gpu"})
    mesh = Mesh(np.array(devices(GPUS["h100"])), ("x",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(case.forward).trace(*case.args).lower(lowering_platforms=("cuda",))
    assert kernel in lowered.as_text()
    return "ex2.approx.ftz" in lowered.as_text()


def test_16_bit_inputs_have_the_instruction_and_float32_the_library():
    assert exponentials("attention_forward", "bfloat16")
    assert exponentials("attention_forward", "float16")
    assert not exponentials("attention_forward", "float32")


@needs_ptxas
@pytest.mark.parametrize(
    "normalizer",
    [
        name
        for name, normalizer in NORMALIZERS.items()
        if normalizer.passes == 1 and not normalizer.parameters
    ],
)
def test_every_normalizer_of_one_walk_compiles(normalizer):
    case = make_case(
        "attention",
        "B1,T1024,H4,Hk2,D128",
        "bfloat16",
        {"normalizer": normalizer, "gate": "head", "window": "300"},
    )
    found = spills(kernels_of("cuda:h200", case.backward(), *case.backward_args()))
    assert (
        max([*found.values(), 0]) <= 64 if normalizer == "self_adjust" else not found
    )  # it has two deltas and five numbers


@needs_ptxas
def test_every_option_compiles():
    """Packed, windowed, capped, with slopes and sinks, K and V of their own: all at once, some
    spill, and ptxas 13.5 serializes the matrix instructions of dk and dv. With two stages it does
    not, but then ptxas 13.0 does so without any option.
    """
    B, T, H, Hk = 2, 1024, 8, 2
    floats = (
        array(B, T, H, 96),
        array(B, T, Hk, 96),
        array(B, T, Hk, 128),
        array(B, T, H, 128),
        array(H),
        array(H),
    )

    def both(segment_ids, *floats):
        def loss(q, k, v, gate, sinks, slopes):
            by_head = dict(sink_logits=sinks, alibi_slopes=slopes)
            y = attention(
                q,
                k,
                v,
                gate_logits=gate,
                segment_ids=segment_ids,
                window=300,
                logits_soft_cap=30.0,
                **by_head,
            )
            return (y.astype(jnp.float32) ** 2).sum()

        return jax.grad(loss, argnums=range(6))(*floats)

    kernels = kernels_of(
        "cuda:h200",
        both,
        array(B, T, dtype=jnp.int32),
        *floats,
        serialized=frozenset({"attention_dkdv"}),
    )
    assert stages(kernels) == STAGES[128]
    assert max([*spills(kernels).values(), 0]) <= 512  # bytes a thread, stored and loaded


@pytest.mark.parametrize(
    "target, dtype, D",
    [("cuda:a100", "bfloat16", 256), ("cuda:h100", "float16", 128), ("cuda:h200", "float32", 64)],
)
def test_other_chips_and_dtypes_compile(target, dtype, D):
    """And fit into the shared memory that there is."""
    case = make_case("attention", f"B1,T512,H2,D{D}", dtype, {"implementation": "gpu"})
    kernels = kernels_of(target, case.backward(), *case.backward_args())
    assert stages(kernels) >= {"forward", "dq"}


@needs_ptxas
@pytest.mark.parametrize("D", [64, 128, 256])
def test_a_decoding_step(D):
    B, H, Hk, S = 4, 16, 2, 8192
    q, cache, valid = array(B, H, D), array(B, S, Hk, D), array(B, S, dtype=jnp.bool_)
    step = lambda q, k, v, gate, valid: attention_step(q, k, v, gate_logits=gate, valid=valid)
    kernels = kernels_of("cuda:h200", step, q, cache, cache, q, valid)
    assert stages(kernels) == {"step"} and spills(kernels) == {}
    assert dispatch.last_choice("attention_step").implementation == "gpu"


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
    loss = lambda q, k, v, gate: attention(q, k, v, gate_logits=gate).astype(jnp.float32).sum()
    programs = [jax.grad(loss, argnums=range(4))]
    with jax.set_mesh(mesh):
        if axis_type == AxisType.Auto:
            specs = (P("data"),) * 4
            programs.append(
                jax.shard_map(programs[0], in_specs=specs, out_specs=specs, check_vma=True)
            )
        for program in programs:
            lowered = jax.jit(program).trace(*x).lower(lowering_platforms=("cuda",))
            text = lowered.compile(compiler_options={"xla_gpu_autotune_level": 0}).as_text()
            assert "all-gather" not in text and "attention_dkdv" in text
