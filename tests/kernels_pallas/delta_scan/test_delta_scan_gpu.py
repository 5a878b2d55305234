"""delta_scan's GPU kernels, interpreted on CPU: values, gradients, promises, and that these tests
can fail.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_cases import (
    BF16,
    BF16_CORRELATED,
    CASES,
    SEGMENTS,
    case_of,
    compare,
    fast_jit,
    make,
    outputs_and_gradients,
    weights_for,
)
from helpers import rel_rms, slow
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import dispatch
from kernels_pallas.delta_scan.gpu import backward as gpu_back
from kernels_pallas.delta_scan.gpu import careful
from kernels_pallas.delta_scan.gpu import intra_chunk as gpu_intra
from kernels_pallas.delta_scan.gpu import op as gpu
from kernels_pallas.delta_scan.gpu import scan as gpu_scan
from kernels_pallas.delta_scan.gpu import tile as gpu_tile
from kernels_pallas.delta_scan.gpu import tuning as gpu_tuning
from kernels_pallas.delta_scan.xla import OUT_NAME, STATES_NAME
from kernels_pallas.ops import delta_scan

interpreted = dict(implementation="gpu", interpret=True)
compare_gpu = partial(compare, implementation="gpu", chunk_size=16)


def low(inputs, dtype=jnp.float32):
    return {n: jnp.asarray(x, dtype) for n, x in inputs.items()}


def test_vector_decay():
    """All there is: decays of any size, documents, normalized keys, T that ends inside a chunk."""
    compare_gpu(make(B=1, H=1, decay="mixture"), segment_ids=SEGMENTS[:1], l2_norm=True)


def test_scalar_decay_and_grouped_heads():
    inputs = make(B=1, T=33, H=2, Hq=1, Hk=2, rank=3, decay="mixture", beta=1.99)
    compare_gpu(inputs, segment_ids=SEGMENTS[:1, :33])


@pytest.mark.slow
def test_no_decay_and_correlated_keys():
    compare_gpu(make(B=1, T=32, H=1, rank=0, cosine=0.7))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_options(name):
    inputs, options = case_of(name)
    compare_gpu(inputs, **options)


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("rank", [0, 3, 4])
def test_lengths_at_the_default_chunk(T, rank):
    """Chunks of 64: four blocks of the inverse, and pairs of pairs of them."""
    compare_gpu(make(B=1, H=1, T=T, K=16, V=24, rank=rank), chunk_size=None)


@pytest.mark.slow
@pytest.mark.parametrize("K, V", [(96, 192), (160, 16), (256, 128), (40, 300)])
@pytest.mark.parametrize("rank", [3, 4])
def test_sizes(K, V, rank):
    """Several blocks of channels, and channels that fill no whole block."""
    compare_gpu(make(B=1, H=1, T=20, K=K, V=V, rank=rank))


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["mixture", "gla", "near zero"])
@pytest.mark.parametrize("rank", [0, 3, 4])
def test_segments_of_the_sequence_side_by_side(rank, decay, monkeypatch):
    """Where heads are few the sequence is cut: the map of each segment, then all segments."""
    monkeypatch.setattr(gpu_tuning, "segments", lambda schedule, programs, chunks: 4)
    segment_ids = np.arange(100)[None] // 60
    # Another scale, so that nothing is found in the cache of jit.
    compare_gpu(
        make(B=1, H=1, T=100, rank=rank, decay=decay),
        segment_ids=segment_ids if rank else None,
        scale=0.2502,
    )


def test_a_short_chip_is_filled_by_segments():
    schedule = gpu_tuning.Schedule()
    assert gpu_tuning.segments(schedule, programs=32, chunks=512) == 4
    # Two parts would take as long as one: the maps are scanned too.
    assert gpu_tuning.segments(schedule, programs=64, chunks=512) == 1
    # No segment is shorter than 8 chunks.
    assert gpu_tuning.segments(schedule, programs=1, chunks=40) == 4


def test_chunks_in_flight_fit_into_shared_memory():
    def stages(programs, K, size):
        return gpu_tuning.scan_stages(gpu_tuning.Schedule(), programs, 64, K, 64, size)

    assert stages(128, 128, 2) == 2
    assert stages(512, 128, 2) == stages(128, 256, 2) == stages(128, 256, 4) == 1


@pytest.mark.slow
def test_equal_keys_and_beta_two():
    """The hardest legal call: float32 rounds the truth itself, so the bar is wider."""
    inputs = make(B=1, H=1, rank=0, cosine=1.0, beta=2.0)
    compare_gpu(inputs, tolerance=2e-5)
    compare_gpu(inputs, tolerance=2e-5, chunk_size=64)


@pytest.mark.slow
def test_minus_infinity_is_a_decay_of_zero():
    x = make(B=1, H=1, decay="mixture")
    finite = x | {"log_decay": np.maximum(x["log_decay"], -1e4)}
    got, want = (compare_gpu(y, segment_ids=SEGMENTS[:1]) for y in (x, finite))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    compare_gpu(make(B=1, H=1, K=16, V=16, rank=3), dtype=dtype, tolerance=BF16)


def rounded_matmul(tile, a, b, trans_a=False, trans_b=False):
    """The products of bfloat16 operands are exact in float32."""
    a, b = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (a, b))
    a = a.T if trans_a else a
    b = b.T if trans_b else b
    return jnp.dot(a, b, precision="highest")


# In one chunk of 64 the changes that erase a large initial state are rounded once for all tokens;
# with more chunks the later ones erase the errors of the earlier ones too.
BF16_ONE_CHUNK = 8e-3


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 3, 4])
@pytest.mark.parametrize(
    "cosine, chunk_size, tolerance",
    [(0.0, 16, BF16), (0.9, 16, BF16_CORRELATED), (0.0, 64, BF16_ONE_CHUNK)],
)
def test_bfloat16_as_the_tensor_core_rounds(rank, cosine, chunk_size, tolerance, monkeypatch):
    """Interpreted matmuls round nothing; here the operands are rounded as on the machine, but for
    those of the inverse.
    """
    monkeypatch.setattr(gpu, "matmuls", lambda *_: (jnp.dtype(jnp.bfloat16), None))
    for room in (gpu_tile, gpu_intra, gpu_scan, gpu_back):
        monkeypatch.setattr(room, "matmul", rounded_matmul)
    inputs = make(B=1, H=1, T=64, K=16, V=16, rank=rank, cosine=cosine)
    # Another scale, so that nothing is found in the cache of jit.
    compare_gpu(
        inputs,
        dtype=jnp.bfloat16,
        tolerance=tolerance,
        scale=0.2501,
        chunk_size=chunk_size,
    )


# --- what the tests above would miss: are they able to fail?


def without_cotangent(name):
    def wrong(right):
        def run(*args):
            c = right(*args)
            return c._replace(**{name: 0 * getattr(c, name)})

        return run

    return wrong


def scaled_scores(right):
    def run(*args):
        (read_scores, erase_scores), decays = right(*args)
        return (read_scores, erase_scores * (1 + 1e-4)), decays

    return run


def from_zeros_only(right):
    """Segments are joined as if what one erases were not in the state before it."""

    def run(maps, from_zeros, first, last_first):
        identity = jnp.broadcast_to(jnp.eye(maps.shape[-1]), maps.shape)
        return right(identity, from_zeros, first, last_first)

    return run


# What is broken, and the rank of the decay at which it is looked for.
PLANTED = {
    "scores of erase keys 1e-4 too large": (gpu_tile, "vector_scores", scaled_scores, 4),
    "a block of the inverse not inverted": (
        gpu_tile,
        "inverse_of_block",
        lambda right: lambda scores, precision: jnp.eye(16) - scores,
        3,
    ),
    "state not decayed": (gpu_scan, "decayed", lambda right: lambda S, *args: S, 3),
    "beta forgotten": (gpu_scan, "written", lambda right: lambda p, r, n, here: r.values[here], 3),
    "erase keys get no gradient": (gpu_tile, "joined", without_cotangent("derase"), 4),
    "erase keys get nothing from states": (
        gpu_back,
        "_from_states",
        without_cotangent("derases"),
        3,
    ),
    "gate gradient flipped": (
        gpu_back,
        "vector_dlogs",
        lambda right: lambda *args: -right(*args),
        4,
    ),
    "gate gradient of the state lost": (
        gpu_back,
        "total_cotangent",
        lambda right: lambda *args: 0 * right(*args),
        3,
    ),
    "segments' maps forgotten": (gpu_scan, "combined", from_zeros_only, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_found(error, monkeypatch):
    room, name, change, rank = PLANTED[error]
    monkeypatch.setattr(room, name, change(getattr(room, name)))
    if name == "combined":
        monkeypatch.setattr(gpu_tuning, "segments", lambda *_: 4)
    scale = 0.3 + 1e-3 * list(PLANTED).index(error)
    # An error of some size, not a crash.
    with pytest.raises(AssertionError, match="'o': "):
        compare_gpu(make(B=1, H=1, T=64, rank=rank), scale=scale)


# --- what stays where it is


def outputs_with(name, value, rank, **options):
    """Every output and gradient with one number replaced, by name, of an implementation."""
    inputs = make(B=1, H=1, rank=rank)
    weights = weights_for(inputs)
    token = (0, 20, 0)
    if name == "do":
        weights[0][(*token, 2)] = value
    elif name == "initial_state":
        inputs[name][0, 0, 2, 3] = value
    else:
        inputs[name][(*token, 2) if inputs[name].ndim == 4 else token] = value
    arrays = low(inputs), SEGMENTS[:1], tuple(map(jnp.float32, weights))
    return outputs_and_gradients(*arrays, **options)


def check_what_sees(name, value, rank, **options):
    """Exactly where the recurrence has a non-finite number, values and gradients alike."""
    got = outputs_with(name, value, rank, chunk_size=16, **interpreted, **options)
    want = outputs_with(name, value, rank, implementation="reference", **options)
    bad = 0
    for key in want:
        finite = np.isfinite(want[key])
        assert (np.isfinite(got[key]) == finite).all(), key
        assert rel_rms(np.where(finite, got[key], 0), np.where(finite, want[key], 0)) < 2e-6
        bad += (~finite).sum()
    assert bad > 0


NAMES = ("q", "k", "v", "beta", "log_decay", "initial_state", "do")


@pytest.mark.parametrize("name", [name if name == "v" else slow(name) for name in NAMES])
@pytest.mark.parametrize("value", [np.nan, slow(np.inf)])
@pytest.mark.parametrize("rank", [3, slow(4)])
def test_non_finite_numbers_reach_only_what_sees_them(name, value, rank):
    check_what_sees(name, value, rank)


def forgetful(right):
    def run(*args):
        return right(*args)[0], jnp.zeros((), bool)

    return run


PLANTED_OF_NON_FINITE = {
    "nothing is counted": (
        gpu,
        "any_counted",
        lambda right: lambda *counts: jnp.zeros((), bool),
    ),
    "segments are forgotten": (
        careful,
        "_scan",
        lambda right: lambda plan, x: right(plan, x._replace(starts=None)),
    ),
    "the way back is not looked at": (gpu, "_gradients", forgetful),
}


@pytest.mark.slow
@pytest.mark.parametrize("error", PLANTED_OF_NON_FINITE)
def test_planted_errors_of_non_finite_numbers_are_found(error, monkeypatch):
    room, name, change = PLANTED_OF_NON_FINITE[error]
    monkeypatch.setattr(room, name, change(getattr(room, name)))
    scale = 0.5 + 1e-3 * list(PLANTED_OF_NON_FINITE).index(error)
    # Of the way back, only a cotangent tells; a state is in the first of the documents.
    spoiled = {"the way back is not looked at": "do", "segments are forgotten": "initial_state"}
    with pytest.raises(AssertionError):
        check_what_sees(spoiled.get(error, "v"), np.nan, 3, scale=scale)


# --- transformations


def total(x, **options):
    o, state = delta_scan(**x, return_final_state=True, **options)
    return (o.astype(jnp.float32) ** 2).sum() + (state**2).sum()


total_gpu = partial(total, chunk_size=16, **interpreted)


def close(got, want, tolerance=1e-5):
    errors = map(rel_rms, jax.tree.leaves(got), jax.tree.leaves(want))
    assert max(errors) <= tolerance


@pytest.mark.slow
def test_vmap():
    pairs = [low(make(seed, B=1, H=1, T=20, rank=3)) for seed in (1, 2)]
    both = jax.tree.map(lambda *a: jnp.stack(a), *pairs)
    close(
        fast_jit(jax.vmap(jax.grad(total_gpu)))(both),
        fast_jit(jax.vmap(jax.grad(total)))(both),
    )


@pytest.mark.slow
def test_residuals_have_names_and_checkpoint_recomputes():
    x = low(make(B=1, H=1, T=20, rank=3))

    def loss(x):
        return (delta_scan(**x, chunk_size=16, **interpreted) ** 2).sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(x))
    assert all(name in text for name in (OUT_NAME, STATES_NAME))
    policy = jax.checkpoint_policies.save_only_these_names(OUT_NAME, STATES_NAME)
    again = jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(x)
    assert str(again).count("name=delta_scan_forward") == 1, "the forward kernel runs again"
    close(fast_jit(jax.grad(jax.checkpoint(loss)))(x), fast_jit(jax.grad(loss))(x))


@pytest.mark.slow
def test_shard_map_with_varying_axes_checked(interpreter_in_shard_map):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x = low(make(B=2, H=1, T=20, rank=3))
    x.pop("initial_state")
    specs = {n: P("data") for n in x}
    segment_ids = jnp.asarray(np.repeat(np.arange(5), 4)[None].repeat(2, 0))

    def loss(x, segment_ids, **options):
        return (delta_scan(**x, segment_ids=segment_ids, **options) ** 2).sum()

    @jax.shard_map(mesh=mesh, in_specs=(specs, P("data")), out_specs=(P(), specs), check_vma=True)
    def sharded(x, segment_ids):
        run = partial(loss, chunk_size=16, **interpreted)
        return jax.value_and_grad(lambda x: jax.lax.psum(run(x, segment_ids), "data"))(x)

    close(fast_jit(sharded)(x, segment_ids), fast_jit(jax.value_and_grad(loss))(x, segment_ids))


@pytest.mark.slow
@pytest.mark.parametrize(
    "names, axis_type", [(("data", "tensor"), AxisType.Auto), (("x", "y"), AxisType.Explicit)]
)
def test_jit_on_a_mesh_cuts_rows_and_heads(names, axis_type, interpreter_in_shard_map):
    """Auto axes by their names, Explicit ones by their arguments' types."""
    mesh = jax.make_mesh((2, 2), names, axis_types=(axis_type,) * 2)
    x = low(make(B=2, T=20, rank=3))
    tokens = P(names[0], None, names[1])
    specs = {n: {"initial_state": P(*names)}.get(n, tokens) for n in x}
    want = fast_jit(jax.value_and_grad(total))(x)
    with jax.set_mesh(mesh):
        placed = {n: jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in x.items()}
        compiled = fast_jit(jax.value_and_grad(total_gpu)).lower(placed).compile()
    assert "all-gather" not in compiled.as_text()
    close(compiled(placed), want)


@pytest.mark.slow
@pytest.mark.parametrize("rank, segments", [(3, True), (0, True), (4, False)])
@pytest.mark.parametrize("mode", ["x64", "strict", "ranks"])
def test_float32_inputs_in_other_modes_of_jax(mode, rank, segments):
    """Traced only: what goes wrong there is a dtype or a rank, also inside of a kernel."""
    modes = {
        "x64": jax.enable_x64(True),
        "strict": jax.numpy_dtype_promotion("strict"),
        "ranks": jax.numpy_rank_promotion("raise"),
    }
    x = low(make(B=1, H=1, T=40, rank=rank))
    ids = jnp.asarray(SEGMENTS[:1]) if segments else None

    def gradients(x):
        run = partial(delta_scan, segment_ids=ids, return_final_state=True, l2_norm=True)
        outputs, vjp = jax.vjp(lambda x: run(**x, chunk_size=16, **interpreted), x)
        return outputs, vjp(outputs)

    with modes[mode]:
        found = jax.eval_shape(gradients, x)
    assert {array.dtype for array in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("implementation", ["gpu", "tpu"])
def test_there_is_no_second_derivative(implementation):
    x = low(make(B=1, H=1, T=20, rank=3))

    def once(x):
        return delta_scan(**x, implementation=implementation, interpret=True).sum()

    def twice(x):
        return jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, jax.grad(once)(x)))

    with pytest.raises(NotImplementedError, match=r"delta_scan: .*no second derivative"):
        jax.eval_shape(jax.grad(twice), x)


# --- refusals


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((1, 4, 1, 257), {}, "delta_scan: .*K up to 256 and V up to 512"),
        ((1, 4, 1, 8), dict(chunk_size=8), "delta_scan: .*chunk_size from 16 to 64, not 8"),
        ((1, 4, 1, 8), dict(chunk_size=128), "delta_scan: .*chunk_size from 16 to 64, not 128"),
    ],
)
def test_what_the_kernel_refuses_by_name(shape, options, message):
    x = jnp.zeros(shape)
    beta = jnp.zeros(shape[:3])
    with pytest.raises(NotImplementedError, match=message):
        delta_scan(x, x, x, beta, implementation="gpu", **options)
    delta_scan(x, x, x, beta, **options)
    assert dispatch.last_choice("delta_scan").implementation == "xla"


def test_on_a_cpu_it_is_refused_by_name_unless_interpreted():
    x = jnp.zeros((1, 4, 1, 16))
    with pytest.raises(NotImplementedError, match="delta_scan: implementation='gpu' is not there"):
        delta_scan(x, x, x, jnp.zeros((1, 4, 1)), implementation="gpu")


def test_arrays_too_large_for_a_32_bit_index_are_refused():
    x = jax.ShapeDtypeStruct((64, 2**15, 16, 128), jnp.bfloat16)
    beta = jax.ShapeDtypeStruct(x.shape[:3], jnp.float32)
    with pytest.raises(NotImplementedError, match=r"2\*\*31"):
        jax.eval_shape(partial(delta_scan, implementation="gpu"), x, x, x, beta)


def test_float64_is_refused():
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="float64"):
        x = jnp.zeros((1, 4, 1, 8))
        delta_scan(x, x, x, jnp.zeros((1, 4, 1)), **interpreted)
