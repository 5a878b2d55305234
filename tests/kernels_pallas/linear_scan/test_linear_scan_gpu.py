"""linear_scan's GPU kernels, interpreted on CPU: values, gradients, promises, and that these tests
can fail.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms, slow
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scan_cases import (
    BF16,
    CASES,
    DECAYS,
    MAKE_KEYS,
    OPTIONS,
    SEGMENTS,
    compare,
    fast_jit,
    make,
    total,
)

from kernels_pallas import dispatch
from kernels_pallas.linear_scan.gpu import (
    backward as gpu_back,
)
from kernels_pallas.linear_scan.gpu import (
    intra_chunk as gpu_intra,
)
from kernels_pallas.linear_scan.gpu import (
    op as gpu,
)
from kernels_pallas.linear_scan.gpu import (
    scan as gpu_scan,
)
from kernels_pallas.linear_scan.gpu import (
    tile as gpu_tile,
)
from kernels_pallas.linear_scan.gpu import (
    tuning as gpu_tuning,
)
from kernels_pallas.linear_scan.xla import OUT_NAME, STATES_NAME
from kernels_pallas.ops import RESIDUAL_NAMES, linear_scan

compare_gpu = partial(compare, implementation="gpu", chunk_size=16)
scan_gpu = partial(linear_scan, implementation="gpu", interpret=True, chunk_size=16)
low = lambda inputs, dtype=jnp.float32: {n: jnp.asarray(x, dtype) for n, x in inputs.items()}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rank", [3, 4])
def test_any_decay(rank, decay):
    """Packed and exclusive with a bonus: every term there is. Compiled once a rank."""
    compare_gpu(
        make(H=1, rank=rank, decay=decay, bonus=True), segment_ids=SEGMENTS, inclusive=False
    )


@pytest.mark.parametrize("rank", [3, 4])
def test_minus_infinity_is_a_decay_of_zero(rank):
    x = make(H=1, rank=rank, decay="mixture", bonus=True)
    infinite = x | {"log_decay": np.where(x["log_decay"] < -1000, -np.inf, x["log_decay"])}
    got, want = (compare_gpu(y, segment_ids=SEGMENTS, inclusive=False) for y in (infinite, x))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("decay", ["near zero", "gla", "mixture"])
def test_inclusive_in_whole_chunks(decay):
    """The default chunk, two blocks of K and of V: nothing is padded."""
    compare_gpu(make(B=1, H=1, T=64, K=96, V=80, decay=decay), chunk_size=None)


@pytest.mark.parametrize("rank, T", [slow(3, 2), slow(4, 1), (4, 65)])
def test_any_length(rank, T):
    compare_gpu(make(B=1, H=1, T=T, rank=rank, decay="mixture"))


@pytest.mark.slow
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", [63, 64, 1000])
def test_lengths_at_the_default_chunk(T, decay):
    compare_gpu(make(B=1, H=1, T=T, K=32, V=48, decay=decay), chunk_size=None)


@pytest.mark.parametrize("rank", [slow(3), 4])
def test_segments_of_the_sequence_side_by_side(rank, monkeypatch):
    """Where heads are few the sequence is cut: summaries, one combination, then all segments."""
    monkeypatch.setattr(gpu_tuning, "segments", lambda schedule, walks, chunks: 4)
    compare_gpu(
        make(B=1, H=2, T=100, rank=rank, decay="mixture"),
        segment_ids=np.arange(100)[None] // 60,
        trace="cut",
    )
    compare_gpu(
        make(B=1, H=2, T=100, rank=rank, decay="gla"),
        segment_ids=np.zeros((1, 100), int),
        trace="cut",
    )


def test_a_short_chip_is_filled_by_segments():
    schedule = gpu_tuning.Schedule()
    assert gpu_tuning.segments(schedule, programs=32, chunks=512) == 4
    assert gpu_tuning.segments(schedule, programs=128, chunks=64) == 1
    assert (
        gpu_tuning.segments(schedule, programs=1, chunks=40) == 4
    )  # no segment shorter than 8 chunks


SLOW_CASES = (
    "segments",
    "undecayed, exclusive",
    "scalar segments",
    "scalar, normalize, reverse",
    "constant, grouped, exclusive",
)


def test_chunks_in_flight_fit_into_shared_memory(monkeypatch):
    stages = lambda programs, K, size: gpu_tuning.scan_stages(
        gpu_tuning.TUNED[gpu_tuning.chip()].schedules["scalar"], programs, 64, K, 64, size
    )
    assert stages(128, 128, 2) == 2  # one program a multiprocessor, 112 KiB
    assert stages(256, 128, 2) == stages(512, 128, 2) == 2  # two of them, in 227 KiB
    assert stages(512, 256, 2) == stages(128, 512, 2) == stages(128, 256, 4) == 1
    monkeypatch.setattr(gpu_tuning, "chip", lambda: "A100")
    assert stages(512, 128, 2) == 2  # two of 56 KiB, in 163
    assert stages(512, 512, 2) == stages(512, 128, 4) == 1


@pytest.mark.parametrize("name", [slow(n) if n in SLOW_CASES else n for n in CASES])
def test_options(name):
    case = dict(CASES[name])
    segment_ids = SEGMENTS[:1] if case.pop("segments", False) else None
    x = make(B=1, decay="mixture", **{"H": 1} | {n: case[n] for n in MAKE_KEYS if n in case})
    compare_gpu(x, segment_ids=segment_ids, **{n: case[n] for n in OPTIONS if n in case})


@pytest.mark.parametrize("rank", [slow(3), 4])
@pytest.mark.parametrize("decay", ["gla", "heavy tail"])
def test_bfloat16(rank, decay):
    compare_gpu(
        make(B=1, H=1, K=8, V=16, rank=rank, decay=decay), dtype=jnp.bfloat16, tolerance=BF16
    )


@pytest.mark.parametrize("rank", [slow(3), 4])
@pytest.mark.parametrize("decay", ["near zero", "gla", "mixture"])
def test_bfloat16_as_the_tensor_core_rounds(rank, decay, monkeypatch):
    """Interpreted matmuls round nothing. On the machine operands are bfloat16: so the errors there,
    not below BF16.
    """
    monkeypatch.setattr(gpu, "matmuls", lambda *_: (jnp.dtype(jnp.bfloat16), None))
    monkeypatch.setattr(gpu_tile, "matmul", rounded_matmul)
    for room in (gpu_scan, gpu_intra, gpu_back):
        monkeypatch.setattr(room, "matmul", rounded_matmul)
    x = make(B=1, H=1, K=8, V=16, rank=rank, decay=decay)
    compare_gpu(x, dtype=jnp.bfloat16, tolerance=5e-3, trace="rounding")


def rounded_matmul(tile, a, b, trans_a=False, trans_b=False):
    """The products of bfloat16 operands are exact in float32."""
    a, b = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (a, b))
    a, b = (a.T if trans_a else a), (b.T if trans_b else b)
    return jnp.dot(a, b, precision="highest")


@pytest.mark.slow
def test_float16():
    compare_gpu(make(B=1, H=1, rank=3), dtype=jnp.float16, tolerance=BF16 / 4)


# --- what the tests above would miss: are they able to fail?


def scaled_scores(tile, *args):
    scores, reads, writes = gpu_tile_vector_products(tile, *args)
    return scores, reads * (1 + 1e-5), writes


gpu_tile_vector_products = gpu_tile.vector_products
without = lambda name: lambda c, **kw: c._replace(**{name: jnp.zeros_like(c.dq)})
PLANTED = {
    "reads 1e-5 too large": (gpu_tile, "vector_products", lambda f: scaled_scores),
    "state not decayed": (gpu_scan, "decayed", lambda f: lambda S, *a: S),
    "scale forgotten": (
        gpu_scan,
        "_scaled",
        lambda f: lambda x, factor, scale, *a: f(x, factor, None, *a),
    ),
    "gate gradient of pairs flipped": (
        gpu_tile,
        "vector_dlogs",
        lambda f: lambda t, c, d: -f(t, c, d),
    ),
    "gate gradient of the state lost": (
        gpu_back,
        "total_cotangent",
        lambda f: lambda *a: 0 * f(*a),
    ),
    "final state's cotangent lost": (
        gpu_scan,
        "combined",
        lambda f: lambda logs, s, first, back: f(logs, s, None if back else first, back),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_found(error, monkeypatch):
    room, name, change = PLANTED[error]
    monkeypatch.setattr(room, name, change(getattr(room, name)))
    if name == "combined":
        monkeypatch.setattr(gpu_tuning, "segments", lambda *_: 2)
    with pytest.raises(
        AssertionError, match=r"'o': |non-finite"
    ):  # an error of some size, not a crash
        compare_gpu(make(B=1, H=1, T=40, rank=3 if name == "_scaled" else 4), trace=error)


# --- transformations


@pytest.mark.slow
def test_vmap():
    pairs = [low(make(seed, B=1, H=1, T=20, rank=3, bonus=True)) for seed in (1, 2)]
    both = jax.tree.map(lambda *a: jnp.stack(a), *pairs)
    options = dict(inclusive=False, chunk_size=16)
    got = fast_jit(
        jax.vmap(jax.grad(partial(total, implementation="gpu", interpret=True, **options)))
    )(both)
    want = fast_jit(jax.vmap(jax.grad(partial(total, **options))))(both)
    assert max(rel_rms(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want))) <= 1e-5


@pytest.mark.slow
def test_residuals_have_names_and_checkpoint_recomputes():
    x = low(make(B=1, H=1, rank=3))
    loss = partial(total, implementation="gpu", interpret=True, chunk_size=16)
    assert all(name in str(jax.make_jaxpr(jax.grad(loss))(x)) for name in (OUT_NAME, STATES_NAME))
    policy = jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)
    again = jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(x)
    assert str(again).count("name=linear_scan_forward") == 1, "the forward kernel runs again"
    got, want = fast_jit(jax.grad(jax.checkpoint(loss)))(x), fast_jit(jax.grad(loss))(x)
    assert max(rel_rms(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want))) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("rank", [slow(1), 4])
def test_shard_map_with_varying_axes_checked(rank, interpreter_in_shard_map):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x = low(make(B=2, H=1, T=20, rank=rank, bonus=True))
    specs = {n: P() if n == "bonus" or (n == "log_decay" and rank == 1) else P("data") for n in x}
    segment_ids = jnp.asarray(np.repeat(np.arange(5), 4)[None].repeat(2, 0))

    def loss(x, segment_ids, **options):
        return (linear_scan(**x, inclusive=False, segment_ids=segment_ids, **options) ** 2).sum()

    @jax.shard_map(mesh=mesh, in_specs=(specs, P("data")), out_specs=(P(), specs), check_vma=True)
    def sharded(x, segment_ids):
        run = partial(loss, implementation="gpu", interpret=True)
        return jax.value_and_grad(lambda x: jax.lax.psum(run(x, segment_ids), "data"))(x)

    got, want = (
        fast_jit(sharded)(x, segment_ids),
        fast_jit(jax.value_and_grad(loss))(x, segment_ids),
    )
    assert max(rel_rms(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want))) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "names, axis_type", [(("data", "tensor"), AxisType.Auto), slow(("x", "y"), AxisType.Explicit)]
)
def test_jit_on_a_mesh_cuts_rows_and_heads(names, axis_type, interpreter_in_shard_map):
    """Auto axes by their names, Explicit ones by their arguments' types."""
    mesh = jax.make_mesh((2, 2), names, axis_types=(axis_type,) * 2)
    x = low(make(B=2, T=20, rank=3, bonus=True))
    tokens = P(names[0], None, names[1])
    specs = {n: {"bonus": P(names[1]), "initial_state": P(*names)}.get(n, tokens) for n in x}
    loss = partial(total, inclusive=False, chunk_size=16)
    want = fast_jit(jax.value_and_grad(loss))(x)
    with jax.set_mesh(mesh):
        placed = {n: jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in x.items()}
        gradient = fast_jit(jax.value_and_grad(partial(loss, implementation="gpu", interpret=True)))
        compiled = gradient.lower(placed).compile()
    assert "all-gather" not in compiled.as_text()
    got = compiled(placed)
    assert max(rel_rms(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want))) <= 1e-5


# A constant decay exclusive, a scalar one, none with segments, and one a channel.
TRACED = [(1, False, False), (3, True, True), (0, True, True), (4, True, False)]


@pytest.mark.parametrize("rank, inclusive, segments", TRACED)
@pytest.mark.parametrize("mode", ["x64", "strict", "ranks"])
def test_float32_inputs_in_other_modes_of_jax(mode, rank, inclusive, segments):
    """Traced only: what goes wrong there is a dtype or a rank, also inside of a kernel."""
    modes = {
        "x64": jax.enable_x64(True),
        "strict": jax.numpy_dtype_promotion("strict"),
        "ranks": jax.numpy_rank_promotion("raise"),
    }
    x = low(make(B=1, H=1, T=40, rank=rank))
    ids = jnp.asarray(SEGMENTS[:1]) if segments else None
    options = dict(inclusive=inclusive, segment_ids=ids, return_final_state=True)

    def gradients(x):
        outputs, vjp = jax.vjp(lambda x: scan_gpu(**x, **options), x)
        return outputs, vjp(outputs)

    with modes[mode]:
        found = jax.eval_shape(gradients, x)
    assert {array.dtype for array in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}


# --- refusals


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((1, 4, 1, 513), {}, "K and V up to 512"),
        ((1, 4, 1, 8), dict(chunk_size=8), "chunk_size from 16 to 128, not 8"),
        ((1, 4, 1, 8), dict(chunk_size=256), "chunk_size from 16 to 128, not 256"),
    ],
)
def test_what_the_kernel_refuses_by_name(shape, options, message):
    x = jnp.zeros(shape)
    with pytest.raises(NotImplementedError, match=message):
        linear_scan(x, x, x, implementation="gpu", **options)
    linear_scan(x, x, x, **options)
    assert dispatch.last_choice("linear_scan").implementation == "xla"


def test_arrays_too_large_for_a_32_bit_index_are_refused():
    x = jax.ShapeDtypeStruct((64, 2**15, 16, 128), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="2\\*\\*31"):
        jax.eval_shape(partial(linear_scan, implementation="gpu"), x, x, x)


def test_float64_is_refused():
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="float64"):
        scan_gpu(*[jnp.zeros((1, 4, 1, 8))] * 3)
