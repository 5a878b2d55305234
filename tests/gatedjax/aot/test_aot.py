"""Compiling for absent accelerators: the parser and the replay by hand, the report, the command
line, bad input.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import slow
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from gatedjax.aot import gpu, hlo, libtpu, parse_slice, replay, report_compiled, target
from gatedjax.aot.bundles import Listing, parse_op, split_args
from gatedjax.aot.cases import CASES, make_case
from gatedjax.aot.cost import declared_cost
from gatedjax.aot.prefetch import scalar_operands

ROOT = Path(__file__).parents[3]
SHAPES = {
    "linear_scan": "B1,T256,H1,K128,V128",
    "delta_scan": "B1,T128,H1,K128,V128",
    "attention": "B1,T256,H1,D128",
    "grouped_matmul": "M256,K128,N128,G4",
    "expert_mlp": "R256,M128,F128,G4",
}
needs_libtpu = pytest.mark.skipif(
    not libtpu.installed(), reason="libtpu is not installed (pip install '.[aot]')"
)


def run_listing(*bundles: str, chip="tpu:v5e", operands=None):
    """Replays bundles given as text; returns (execution, timeline)."""
    ops = [[parse_op(op) for op in bundle.split(";;") if op.strip()] for bundle in bundles]
    program = replay.Program(Listing("test", ops, {}, []), target(chip))
    timeline = replay.Timeline(target(chip))
    execution = replay.Execution(program, operands=operands)
    execution.run(timeline)
    return execution, timeline


def test_ops_are_parsed():
    op = parse_op("%s3 = sadd.s32 (!%p1, %s9), %s2, 1 /* a comment; with %things */")
    assert (op.name, op.dest, op.args, op.predicate, op.old) == (
        "sadd.s32",
        "%s3",
        "%s2, 1",
        "!%p1",
        "%s9",
    )
    assert parse_op("sst [smem:[#allocation1]] (%p4), %s7").predicate == "%p4"
    assert parse_op("   /* nothing */ ") is None
    assert split_args("[%s1 + $0x2], f(a, b), 3") == ["[%s1 + $0x2]", "f(a, b)", "3"]


# Five trips of: add one, compare, branch back; the four bundles after the branch run on every trip.
LOOP = (
    "%s1 = smov 0",
    "%s2 = sphi %s1, %s3",
    "%s3 = sadd.s32 %s2, 1",
    "%p4 = scmp.lt.s32.totalorder %s3, 5",
    "sbr.rel (%p4), target bundleno = 1 (0x1)",
    "vmatmul.mubr.bf16.vlgmr.msra.gmra.mxu0 %v1",
    "",
    "",
    "",
    "%s9 = smov 7",
)


def test_a_loop_runs_as_often_as_its_counter_says():
    execution, timeline = run_listing(*LOOP)
    assert execution.executions() == [1, *[5] * 8, 1]
    assert timeline.time == 1 + 5 * 8 + 1
    schedule = replay.summarize(execution, timeline)
    assert schedule.bundles == timeline.time and schedule.cycles == timeline.time
    assert schedule.empty == pytest.approx(15 / 42)
    assert schedule.matrix_busy == pytest.approx(
        5 * 16 / (4 * 42)
    )  # 16 cycles each, four matrix units
    assert schedule.unknown == {}


def test_a_number_made_of_vector_data_counts_as_0():
    """A kernel's question whether a tile has something out of the ordinary: no."""
    execution, _ = run_listing(
        "%s1 = spop %21660",
        "%p2 = scmp.gt.f32.partialorder %s1, 0.0",
        "sbr.rel (!%p2), target bundleno = 8 (0x8)",
        "",
        "",
        "",
        "",
        "%s3 = smov 7",
        "%s9 = smov 7",
    )
    assert not execution.unknown
    assert execution.executions() == [1] * 7 + [0, 1]


def test_a_branch_on_vector_data_is_unknown_and_not_taken():
    execution, _ = run_listing(
        "%s1 = vpop.something %v3",
        "%p2 = scmp.eq.s32 %s1, 0",
        *[LOOP[4].replace("%p4", "%p2")],
        "",
        "",
        "",
        "",
    )
    assert execution.unknown["branch"] == 1 and execution.executions() == [1] * 7


def test_a_dma_takes_its_bytes_and_the_latency():
    chip = target("tpu:v5e")
    start = "dma.hbm_to_vmem [%s1], 1024, [#allocation1], [#allocation2]"
    _, timeline = run_listing("%s1 = smov 64", start, "", "dma.done.wait [#allocation2], 1024")
    moved = 1024 * chip.dma_granule
    expected = 1 + moved / (chip.hbm_bytes_per_second / chip.clock_hz) + chip.hbm_latency_cycles
    assert timeline.hbm_bytes == moved
    assert timeline.time == pytest.approx(expected + 1, abs=1)
    assert timeline.stall == pytest.approx(expected - 3, abs=1)


def test_a_wait_for_two_dmas_ends_with_the_second():
    chip = target("tpu:v5e")
    start = "dma.hbm_to_vmem [%s1], {}, [#allocation1], [#allocation2]"
    both = run_listing(
        "%s1 = smov 64",
        start.format(1000),
        start.format(3000),
        "dma.done.wait [#allocation2], 4000",
    )[1]
    moved = 4000 * chip.dma_granule
    assert both.hbm_bytes == moved
    channel = moved / (chip.hbm_bytes_per_second / chip.clock_hz)
    assert both.time == pytest.approx(1 + channel + chip.hbm_latency_cycles + 1, abs=1)


def test_a_false_predicate_moves_nothing():
    _, timeline = run_listing(
        "%p1 = scmp.eq.s32.totalorder 1, 2", "dma.hbm_to_vmem (%p1), [%s1], 8, [%s2], [%s3]"
    )
    assert timeline.hbm_bytes == 0


def test_a_byte_of_a_packed_word():
    """As kernels read int8 masks: shifted up beyond 32 bits, then down. Once replayed as
    0x02020201, not as 1.
    """
    shifts = "%s1 = smov 33686017", "%s2 = sshll.u32 %s1, 24", "%s3 = sshra.s32 %s2, 24"
    is_one = "%p4 = scmp.eq.s32.totalorder %s3, 1"
    _, timeline = run_listing(*shifts, is_one, "dma.hbm_to_vmem (%p4), [%s1], 8, [%s2], [%s3]")
    assert timeline.hbm_bytes == 8 * target("tpu:v5e").dma_granule


def test_the_words_of_a_tiled_layout():
    x = np.arange(16 * 256, dtype=np.int32).reshape(16, 256)
    words = hlo.memory_words(x, "{1,0:T(8,128)}")
    assert (words[:128] == x[0, :128]).all() and (words[128:256] == x[1, :128]).all()
    assert (words[8 * 128 : 8 * 128 + 128] == x[0, 128:]).all()
    assert len(hlo.memory_words(np.arange(3, dtype=np.int32), "{0:T(128)}")) == 128


HLO = """
%cond.1 (p: (s32[], f32[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[]{:T(512)} compare(%counter, %limit), direction=LT, metadata={}
}
%all-reduce-scatter.3 (x: f32[8,128]) -> f32[4,128] {
  %all-reduce.2 = f32[8,128]{1,0} all-reduce(%input), channel_id=2, to_apply=%add
}
%body.1 (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %all-reduce.1 = f32[8,128]{1,0} all-reduce(%x), channel_id=1, to_apply=%add
  %fusion.7 = f32[4,128]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.3
}
ENTRY %main.2 (a: f32[8,128]) -> f32[8,128] {
  %while.1 = (s32[], f32[8,128]{1,0}) while(%t), condition=%cond.1, body=%body.1
  %ag = (bf16[8,128]{1,0}, bf16[64,128]{1,0}) all-gather-start(%b), dimensions={0}
}
"""


def test_collectives_in_a_loop_count_once_a_trip():
    found = {c.kind: (c.count, c.bytes) for c in hlo.collectives(HLO)}
    loop = (6, 6 * 8 * 128 * 4)
    assert found == {"all-reduce": loop, "reduce-scatter": loop, "all-gather": (1, 64 * 128 * 2)}


# As a TPU's compiler cuts a product with a gathered operand: two pieces a trip, in turns of two.
PIECES = """
%cond.2 (p: (bf16[8,128], u32[])) -> pred[] {
  %eight = u32[]{:T(128)} constant(8)
  %counter.2 = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt.2 = pred[]{:T(512)} compare(%counter.2, %eight), direction=LT
}
%body.2 (p: (bf16[8,128], u32[])) -> (bf16[8,128], u32[]) {
  %two.2 = u32[]{:T(128)} constant(STEP)
  %piece = bf16[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=0
  %counter.3 = u32[]{:T(128)} get-tuple-element(%p), index=1
  %next = u32[]{:T(128)} add(%counter.3, %two.2)
  %sent = (bf16[8,128]{1,0}, bf16[8,128]{1,0}, u32[], u32[]) collective-permute-start(%piece)
  %got = bf16[8,128]{1,0:T(8,128)} collective-permute-done(%sent)
  ROOT %both = (bf16[8,128]{1,0:T(8,128)}, u32[]{:T(128)}) tuple(%got, /*index=1*/%next)
}
ENTRY %main.3 (a: bf16[8,128]) -> bf16[8,128] {
  %while.2 = (bf16[8,128]{1,0}, u32[]) while(%t), condition=%cond.2, body=%body.2
}
"""


@pytest.mark.parametrize("step, trips", [(1, 8), (2, 4), (3, 3)])
def test_pieces_of_a_gather_count_once_a_trip(step, trips):
    (found,) = hlo.collectives(PIECES.replace("STEP", str(step)))
    assert (found.kind, found.count, found.bytes) == (
        "collective-permute",
        trips,
        trips * 8 * 128 * 2,
    )


STARTED = """
%beside.1 (p: bf16[64,128]) -> bf16[8,128] {
  %p = bf16[64,128]{1,0} parameter(0)
  %rs = bf16[8,128]{1,0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}
ENTRY %main.2 (a: f32[8,128]) -> f32[8,128] {
  %rows = bf16[32,128]{1,0} copy(%a)
  %room = bf16[4096,128]{1,0} broadcast(%zero)
  %ragged = bf16[4096,128]{1,0} ragged-all-to-all(%rows, %room, %i, %j, %k, %l), channel_id=1
  %one = (bf16[8,128]{1,0}, u32[]) async-start(%b), calls=%beside.1
  %send = (bf16[4,8,128]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}, token[]) send(%x, %y), channel_id=3, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
}
"""


def test_collectives_beside_other_work_between_slices_and_ragged_ones():
    found = {
        c.kind: (c.bytes, c.blocking_bytes, c.asynchronous_count) for c in hlo.collectives(STARTED)
    }
    assert found == {
        "reduce-scatter": (64 * 128 * 2, 0, 1),
        "ragged-all-to-all": (32 * 128 * 2, 32 * 128 * 2, 0),
        hlo.BETWEEN_SLICES: (4 * 8 * 128 * 2, 0, 1),
    }


def test_an_all_reduce_sends_its_bytes_twice():
    assert hlo.Collective("all-reduce", 1, 100).sent_bytes == 200
    assert hlo.Collective("all-gather", 1, 100).sent_bytes == 100


def matmul_kernel(x, y):
    def kernel(x_ref, y_ref, out_ref):
        out_ref[...] = jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

    estimate = pl.CostEstimate(
        flops=2 * 256**3, bytes_accessed=3 * 256 * 256 * 4, transcendentals=0
    )
    out = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    block = pl.BlockSpec((128, 256), lambda i: (i, 0))
    whole = pl.BlockSpec((256, 256), lambda i: (0, 0))
    return pl.pallas_call(
        kernel,
        grid=2,
        in_specs=[block, whole],
        out_specs=block,
        out_shape=out,
        cost_estimate=estimate,
        name="product",
    )(x, y)


def test_declared_costs_are_summed_over_loops():
    x = jnp.ones((256, 256))
    fn = lambda x: jax.lax.scan(lambda y, _: (matmul_kernel(x, y), None), x, length=3)[0]
    cost = declared_cost(jax.make_jaxpr(fn)(x).jaxpr)
    assert (cost.kernel_calls, cost.undeclared, cost.flops) == (3, 0, 3 * 2 * 256**3)


def steered(*starts, x):
    """A kernel with scalars that steer it."""

    def kernel(*refs):
        *starts_refs, x_ref, out_ref = refs
        out_ref[...] = x_ref[...] + sum(start[0] for start in starts_refs)

    spec = pl.BlockSpec((8, 128), lambda i, *starts: (0, 0))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(starts), grid=1, in_specs=[spec], out_specs=spec
    )
    out = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    return pl.pallas_call(kernel, grid_spec=grid, out_shape=out, name="steered")(*starts, x)


def test_steering_values_are_found_where_they_follow():
    closed = jax.make_jaxpr(jax.jit(lambda n, x: steered(jnp.cumsum(n), x=x)))(
        jnp.zeros(3, jnp.int32), jnp.zeros((8, 128), jnp.int32)
    )
    [(name, values)] = scalar_operands(closed, {0: np.array([2, 3, 4], np.int32)})
    assert name == "steered" and values[0].tolist() == [2, 5, 9]
    assert scalar_operands(closed, {}) == [("steered", [None])]


def test_steering_values_are_found_inside_of_loops():
    """In a scan of recomputed layers, as a model has them: what every layer gets is known, what
    changes from layer to layer is not, and does not hide the rest.
    """
    same = jnp.zeros((4, 1), jnp.int32)
    changing = jnp.arange(4)[:, None]

    def layers(n, x):
        @jax.checkpoint
        def layer(x, scanned):
            of_all, of_layer = scanned
            return steered(n + 1, x[0, :1], of_all, of_layer, x=x), None

        return jax.lax.scan(layer, x, (same, changing))[0]

    closed = jax.make_jaxpr(layers)(jnp.zeros(1, jnp.int32), jnp.zeros((8, 128), jnp.int32))
    [(_, values)] = scalar_operands(closed, {0: np.array([2], np.int32)})
    assert [None if v is None else v.tolist() for v in values] == [[3], None, [0], None]


def test_steering_values_are_found_behind_a_function_that_was_traced_before():
    n, x = jnp.zeros(1, jnp.int32), jnp.zeros((8, 128), jnp.int32)
    traced = jax.jit(lambda n, x: steered(n, x=x)).trace(n, x)
    closed = jax.make_jaxpr(lambda n, x: traced(n + 1, x))(n, x)
    [(_, [values])] = scalar_operands(closed, {0: np.array([2], np.int32)})
    assert values.tolist() == [3]


def test_steering_values_are_found_inside_of_one_devices_shard_map():
    """What is made there (linspace has an iota) remembers its mesh, and jax refuses to combine it
    with what is made outside.
    """
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def on_device(n, x):
        starts = jnp.linspace(0.0, 4.0, 3).astype(jnp.int32)
        return steered(starts + n, x=x)

    spec = jax.sharding.PartitionSpec()
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(on_device, in_specs=(spec, spec), out_specs=spec, check_vma=False)
        step = jax.jit(lambda n, x: mapped(n + 1, x))
        traced = step.trace(jnp.zeros(3, jnp.int32), jnp.zeros((8, 128), jnp.int32))
    [(_, [values])] = scalar_operands(traced.jaxpr, {0: np.array([2, 3, 4], np.int32)})
    assert values.tolist() == [3, 6, 9]


def test_donated_outputs_are_counted():
    def step(state, batch):
        return jax.tree.map(lambda x: x + batch, state), batch * 2

    state = {"a": jnp.zeros(4), "b": jnp.ones((2, 4))}
    lowered = jax.jit(step, donate_argnums=0).lower(state, jnp.ones(4))
    assert hlo.donated_outputs(lowered.compile().as_text()) == 2


PTXAS = """ptxas info    : Compiling entry function 'scan' for 'sm_90a'
ptxas info    : Function properties for scan
    0 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 1024 bytes smem, 576 bytes cmem[0]
"""


def test_gpu_figures_from_ptxas():
    measured = gpu.parse_ptxas(PTXAS)["scan"]
    assert measured == {"spills": 32, "registers": 168, "shared": 1024}
    wgmma = "wgmma.mma_async.sync.aligned.m64n128k16"
    body = f"{wgmma}\n{wgmma}\nmma.sync.aligned.m16n8k16"
    k = gpu.kernel("scan", ".reqntid 128, 1, 1", body, 64 * 1024, measured, target("cuda:h200"))
    assert (k.threads, k.wgmma, k.mma, k.shared_memory_bytes) == (128, 2, 1, 65 * 1024)
    assert k.blocks_per_core == 3  # of registers; 233,472 // (66,560 + 1,024) is 3 too
    assert k.occupancy == pytest.approx(12 / 64)
    unmeasured = gpu.kernel("scan", ".reqntid 128, 1, 1", body, 0, None, target("cuda:h200"))
    assert (
        unmeasured.registers is None
        and unmeasured.spill_bytes is None
        and unmeasured.occupancy is None
    )


def test_warnings_of_ptxas():
    line = (
        "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to insufficient register resources for the wgmma pipeline in function '{}'"
    )
    text = "\n".join([line.format("dkdv"), line.format("dkdv"), line.format("scan"), PTXAS])
    assert gpu.parse_warnings(text) == {"dkdv": ("C7515",), "scan": ("C7515",)}
    assert gpu.parse_warnings(PTXAS) == {}


NVDISASM = """	.section	.text.scan,"ax",@progbits
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
        /*0040*/                   BRA `(.L_x_2) ;
.L_x_2:
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
	.section	.text.copy,"ax",@progbits
        /*0000*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R4.64] ;
.L_x_3:
        /*0010*/                   BRA `(.L_x_3);
"""


def test_instructions_of_a_loop():
    """Of the shortest loop with a matrix instruction: not the one around it, nor the last."""
    assert gpu.parse_code(NVDISASM) == {"scan": gpu.Code(7, 3), "copy": gpu.Code(2, None, 1)}


@pytest.mark.parametrize(
    "registers, threads, shared, blocks",
    [
        (
            33,
            256,
            0,
            6,
        ),  # a warp takes its registers in units of 256: 1,280, not 1,056, which would give 7
        (16, 32, 38_000, 5),  # a block takes 1 KiB of shared memory on top: without it 6 would fit
        (16, 1024, 0, 2),  # threads
        (16, 32, 0, 32),  # blocks
    ],
)
def test_blocks_on_a_multiprocessor(registers, threads, shared, blocks):
    assert gpu.resident_blocks(registers, threads, shared, target("cuda:h200")) == blocks


@pytest.mark.parametrize(
    "implementation, platform",
    [
        ("reference", "tpu"),
        slow("reference", "cuda"),
        ("xla", "tpu"),
        slow("xla", "cuda"),
        ("kernel", "tpu"),
        ("kernel", "cuda"),
    ],
)
@pytest.mark.parametrize("op", CASES)
def test_every_op_lowers_forward_and_backward(op, implementation, platform):
    name = {"tpu": "tpu", "cuda": "gpu"}[platform] if implementation == "kernel" else implementation
    case = make_case(op, SHAPES[op], "bfloat16", {"implementation": name})
    kind = {"tpu": "TPU v5 lite", "cuda": "NVIDIA H200"}[platform]
    absent = AbstractMesh(
        (1,),
        ("device",),
        axis_types=(AxisType.Auto,),
        abstract_device=AbstractDevice(kind, None, platform),
    )
    with use_abstract_mesh(absent):
        try:
            both = jax.jit(case.backward()).trace(*case.backward_args())
        except NotImplementedError as e:
            pytest.skip(str(e))
        text = both.lower(lowering_platforms=(platform,)).as_text()
    assert ("tpu_custom_call" in text or "triton" in text) == (implementation == "kernel")


# What must be seen in a process of its own: libtpu reads its flags once, and conftest's jax
# simulates eight devices.
V5E = """
import sys; sys.path[:0] = ["tests/gatedjax/aot"]
import json, jax, jax.numpy as jnp
from gatedjax.aot import compile_for
from gatedjax.aot.cases import CASES, make_case
from test_aot import SHAPES, matmul_kernel
x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
reports = {"kernel": compile_for("tpu:v5e", matmul_kernel, x, x)[1]}
for op in CASES:
    case = make_case(op, SHAPES[op], "bfloat16", {})
    program = case.backward()
    reports[op] = compile_for("tpu:v5e", program, *case.backward_args(), concrete=case.concrete)[1]
print(json.dumps({name: r.as_dict() for name, r in reports.items()}))
"""


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS",)}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | environment
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=env
    )


@needs_libtpu
def test_every_op_compiles_for_v5e():
    done = python("-c", V5E)
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    product = reports["kernel"]
    assert (
        product["argument_bytes"] == 2 * 256 * 256 * 4 and product["output_bytes"] == 256 * 256 * 4
    )
    assert product["declared"]["flops"] == 2 * 256**3
    [kernel] = product["kernels"]
    assert kernel["name"].startswith("product") and kernel["unknown"] == {}
    assert 0 < kernel["matrix_busy"] <= 1 and kernel["bundles"] > 0
    # Nothing is faster than its bytes or its cycles.
    assert kernel["seconds"] >= max(kernel["hbm_bytes"] / 819e9, kernel["bundles"] / 1.5e9) - 1e-12
    for op in CASES:
        assert reports[op]["program_seconds"] > 1e-6 and reports[op]["temp_bytes"] >= 0


def test_memory_given_back_is_not_counted_twice():
    step = jax.jit(lambda x: x + 1, donate_argnums=0).lower(jnp.zeros((256, 256))).compile()
    report = report_compiled("tpu:v5e", step)
    size = 256 * 256 * 4
    assert (report.argument_bytes, report.output_bytes, report.aliased_bytes) == (size, size, size)
    assert report.peak_bytes == size + report.temp_bytes + report.code_bytes


@needs_libtpu
def test_command_line():
    done = python(
        "-m", "gatedjax.aot", "--op=attention", "--target=tpu:v5e", "--shape=B1,T256,H2,D128"
    )
    assert done.returncode == 0, done.stderr
    assert "attention B1,T256,H2,D128 bfloat16" in done.stdout and "model time" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"--target": "tpu:v9"}, "target: got 'tpu:v9', expected one of tpu:v5e"),
        ({"--op": "convolution"}, "op: got 'convolution', expected one of linear_scan"),
        ({"--shape": "B1,T256,H2"}, "shape: got 'B1,T256,H2', which lacks D"),
        ({"--shape": "B1,Q256"}, "shape: got 'Q256', expected B<size>"),
        ({"--pass": "sideways"}, "pass: got 'sideways', expected fwd, bwd"),
        ({"--set": "gate=wide"}, "gate: got 'wide', expected one of none, head, element"),
        ({"--set": "window=abc"}, "window: got 'abc', expected a number of tokens"),
        ({"--dtype": "int8"}, "dtype: got 'int8', expected bfloat16"),
    ],
)
def test_bad_input_is_one_line(flags, message, monkeypatch, capsys):
    from gatedjax.aot import __main__ as command

    given = {"--op": "attention", "--target": "tpu:v5e", "--shape": "B1,T256,H2,D128"} | flags
    monkeypatch.setattr(sys, "argv", ["aot", *(f"{k}={v}" for k, v in given.items())])
    assert command.main() == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("text", ["v5p", "v9:2x2", "v5p:8", "0*v5p:2x2x1", "v5p:2x2x1 "])
def test_bad_slices_are_named(text):
    with pytest.raises(ValueError, match=r"slice: got .*, expected \[SLICES\*\]CHIP:SHAPE"):
        parse_slice(text)


def test_slices():
    assert parse_slice("2*v5p:8x8x4").num_slices == 2
    assert parse_slice("v7x:2x2x1").topology == "tpu7x:2x2x1"
