"""implementation="mosaic_gpu": its kernel in jax's GPU interpreter, which finds races, and compiled
for a GPU that is not here.
"""

import dataclasses
import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import assert_close, call, cast, draw, truth, value_and_gradients
from cuda_plugin import needs_cuda_plugin
from helpers import rel_rms
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gatedjax.aot import compile_for
from gatedjax.aot.cases import make_case
from gatedjax.aot.cost import declared_cost
from gatedjax.aot.gpu import devices, find_ptxas
from gatedjax.aot.targets import GPUS
from kernels_pallas import dispatch
from kernels_pallas.attention.gpu.exponentials import BY_TWO
from kernels_pallas.attention.mosaic_gpu import tile
from kernels_pallas.attention.normalizers.base import Softmax
from kernels_pallas.ops import attention, linear_scan

slow = partial(pytest.param, marks=pytest.mark.slow)
interpreted = partial(call, implementation="mosaic_gpu", interpret=True)
# Weights have 8 bits when they are multiplied, or 11; the interpreter rounds them too.
TOLERANCE = {jnp.bfloat16: 3e-3, jnp.float16: 4e-4}


def float64(arrays, **options):
    """y of the reference."""
    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in arrays.items()}
        return np.asarray(call(arrays, implementation="reference", **options))


CASES = {
    "causal, grouped, gate by element": dict(T=200, B=1, K=40, V=64, gate="element-wise"),
    "window, gate by head": dict(T=200, B=2, H=2, Hk=1, K=64, V=48, window=60, gate="head-wise"),
    "full, window, capped": dict(
        T=140, B=1, H=1, Hk=1, K=100, V=128, causal=False, window=70, logits_soft_cap=3.0
    ),
    "full": dict(T=129, B=1, H=2, Hk=1, K=64, V=64, causal=False),
    "one token": dict(T=1, B=1, H=1, Hk=1, K=8, V=8),
}
FAST = "window, gate by head"


@pytest.mark.parametrize("name", [n if n == FAST else slow(n) for n in CASES])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, slow(jnp.float16)])
def test_y_is_that_of_the_reference(name, dtype):
    arrays, options = draw(**CASES[name])
    arrays = cast(arrays, dtype)
    y = interpreted(arrays, **options)
    assert y.dtype == dtype
    assert rel_rms(y, float64(arrays, **options)) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", [slow(n) for n in CASES])
def test_y_and_gradients(name):
    arrays, options = draw(**CASES[name])
    arrays = cast(arrays, jnp.bfloat16)
    got = value_and_gradients(arrays, interpreted, **options)
    assert_close(got, truth(arrays, **options), TOLERANCE[jnp.bfloat16])


def test_gradients_of_a_short_call():
    arrays, options = draw(T=20, B=1, H=2, Hk=1, gate="element-wise")
    arrays = cast(arrays, jnp.bfloat16)
    got = value_and_gradients(arrays, interpreted, **options)
    assert_close(got, truth(arrays, **options), TOLERANCE[jnp.bfloat16])


@pytest.mark.slow
def test_second_derivatives():
    arrays, options = draw(T=20, B=1, H=1, Hk=1)
    arrays = cast(arrays, jnp.bfloat16)

    def slope(q, implementation, interpret=False):
        def loss(q):
            named = dict(implementation=implementation, interpret=interpret)
            return (call(arrays | {"q": q}, **options, **named).astype(jnp.float32) ** 2).sum()

        return (jax.grad(loss)(q).astype(jnp.float32) ** 2).sum()

    got = jax.grad(slope)(arrays["q"], "mosaic_gpu", interpret=True)
    want = jax.grad(slope)(arrays["q"], "reference")
    assert rel_rms(got, np.asarray(want, np.float64)) < 0.02


def test_masks_select():
    """Hidden tokens may be NaN: the others are right; who sees one has NaN, and so has a row whose
    every logit is -inf.
    """
    arrays, options = draw(T=100, B=2, H=1, Hk=1)
    arrays = cast(arrays, jnp.bfloat16)
    broken = dict(
        q=arrays["q"].at[1, 0].set(1),
        k=arrays["k"].at[1, 0].set(-np.inf),
        v=arrays["v"].at[0, 70].set(np.nan),
    )
    y = np.asarray(interpreted(broken, **options), np.float32)
    assert np.isnan(y[0, 70:]).all() and np.isnan(y[1, 0]).all()
    # To rounding: the xla backend has computed them.
    want = float64(arrays, **options)[0, :70]
    assert rel_rms(y[0, :70], want) < TOLERANCE[jnp.bfloat16]


def test_a_tile_is_that_of_the_normalizer():
    rng = np.random.default_rng(0)
    draw_row = lambda: jnp.asarray(rng.normal(size=64), jnp.float32)
    largest, total = draw_row().at[:9].set(-jnp.inf), jnp.abs(draw_row()).at[:9].set(0)
    logits = jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)
    mask = jnp.asarray(rng.random((64, 32)) < 0.5).at[5:12].set(False)
    got = tile.weigh(largest, total, logits, mask)
    softmax = dataclasses.replace(Softmax(), functions=BY_TWO)
    row = (largest[:, None], total[:, None])
    want = softmax.add(row, logits, mask, jnp.arange(32)[None])
    # Of a row that has seen nothing there is nothing to keep.
    assert np.isfinite(got.keep).all()
    for x, y in (
        (got.largest, want.row[0][:, 0]),
        (got.total, want.row[1][:, 0]),
        (got.weights, want.weights[0]),
        (got.keep[9:], want.keep[9:, 0]),
    ):
        np.testing.assert_allclose(x, y, 1e-6, 1e-6)


# --- that these tests can fail


@pytest.mark.parametrize(
    "planted", ["barrier_wait", slow("wait_smem_to_gmem"), slow("commit_smem")]
)
def test_a_race_is_found(planted, monkeypatch):
    """A copy that nobody waits for, in a kernel that computes the right thing by luck."""
    monkeypatch.setattr(plgpu, planted, lambda *args: None)
    arrays, options = draw(T=140, B=1, H=1, Hk=1)
    try:
        jax.block_until_ready(interpreted(cast(arrays, jnp.bfloat16), **options))
        # By jax 0.11, which tells and goes on.
        assert interpret_pallas_call.get_races().races_found
    except jax.errors.JaxRuntimeError as error:
        assert re.search("(?i)race|barrier|commit|wait", str(error))
    finally:
        interpret_pallas_call.reset_gpu_interpret_mode_state()


# --- what it does not cover


def shapes(B=2, T=256, H=4, Hk=2, D=64, dtype=jnp.bfloat16):
    array = lambda heads: jax.ShapeDtypeStruct((B, T, heads, D), dtype)
    return array(H), array(Hk), array(Hk)


H = jax.ShapeDtypeStruct((4,), jnp.float32)
by_name = partial(attention, implementation="mosaic_gpu")
REFUSED = {
    "softmax, not Sigmoid": dict(normalizer="sigmoid"),
    "takes no alibi_slopes": dict(alibi_slopes=H),
    "takes no sink_logits": dict(sink_logits=H),
    "takes no segment_ids": dict(segment_ids=jax.ShapeDtypeStruct((2, 256), jnp.int32)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_options_are_refused_by_name(message):
    options = REFUSED[message]
    arrays = {n: x for n, x in options.items() if isinstance(x, jax.ShapeDtypeStruct)}
    rest = {n: x for n, x in options.items() if n not in arrays}
    with pytest.raises(NotImplementedError, match=f"attention: .*'mosaic_gpu' .*{message}"):
        jax.eval_shape(partial(by_name, **rest), *shapes(), **arrays)


@pytest.mark.parametrize(
    "message, case",
    [
        ("all bfloat16", dict(dtype=jnp.float32)),
        ("up to 128", dict(D=136)),
        ("below 2..31 elements", dict(B=2**12, T=2**13)),
    ],
)
def test_arrays_are_refused_by_name(message, case):
    with pytest.raises(NotImplementedError, match=f"attention: .*'mosaic_gpu' .*{message}"):
        jax.eval_shape(by_name, *shapes(**case))


def test_other_platforms_and_a_jax_without_it_are_refused_by_name(monkeypatch):
    with pytest.raises(NotImplementedError, match="'mosaic_gpu' is not there on platform 'cpu'"):
        jax.jit(by_name).lower(*shapes())
    # Each time another function, which jax has not traced before.
    with (
        jax.default_matmul_precision("highest"),
        pytest.raises(NotImplementedError, match="one pass"),
    ):
        jax.eval_shape(partial(by_name), *shapes())
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.mosaic_gpu", None)
    with pytest.raises(NotImplementedError, match=r"needs jax.*mosaic_gpu, which jax .* not have"):
        jax.eval_shape(partial(by_name), *shapes())


def test_it_is_attentions_alone_and_never_chosen(monkeypatch):
    x = jnp.zeros((1, 4, 1, 8))
    with pytest.raises(NotImplementedError, match=r"linear_scan: .*'mosaic_gpu' is not one"):
        linear_scan(x, x, x, implementation="mosaic_gpu")
    monkeypatch.setattr(dispatch, "target_platform", lambda *_: "cuda")
    for options, chosen in (({}, "gpu"), (dict(normalizer="entmax"), "xla")):
        jax.eval_shape(partial(attention, **options), *shapes())
        assert dispatch.last_choice("attention").implementation == chosen


def test_its_cost_is_declared():
    """By jax 0.12, whose `kernel` takes it."""
    found = declared_cost(jax.make_jaxpr(by_name)(*shapes()).jaxpr)
    # Two products of 256 * 257 / 2 pairs a head and row, over 64 channels.
    flops = 4 * 2 * 4 * 256 * 257 // 2 * 64
    assert found.kernel_calls == 1
    assert found.undeclared or found.flops == flops


# --- compiled


@needs_cuda_plugin
@pytest.mark.parametrize("D", [64, 128])
def test_compiles_for_hopper(D):
    """With matrix instructions of warp groups, no spills, and nothing that ptxas serializes."""
    options = {"implementation": "mosaic_gpu", "gate": "element"}
    case = make_case("attention", f"B4,T4096,H16,Hk4,D{D}", "bfloat16", options)
    _, report = compile_for("cuda:h100", case.forward, *case.args)
    [kernel] = [k for k in report.kernels if k.name.startswith("attention")]
    # A loop with masks and one without: products over D channels and over 128 keys, 16 at a time.
    assert kernel.wgmma == 2 * (D + 128) // 16 and kernel.threads == 3 * 128
    limit = GPUS["h100"].shared_memory_per_block
    assert 100_000 < kernel.shared_memory_bytes <= limit and kernel.warnings == ()
    if find_ptxas():
        assert kernel.spill_bytes == 0


@needs_cuda_plugin
def test_other_chips_are_refused_by_name():
    case = make_case("attention", "B1,T256,H2,D64", "bfloat16", {"implementation": "mosaic_gpu"})
    with pytest.raises(NotImplementedError, match=r"runs on Hopper GPUs .*A100"):
        compile_for("cuda:a100", case.forward, *case.args)


@needs_cuda_plugin
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_of_two(axis_type):
    """No device gathers another's rows."""
    mesh = Mesh(np.array(devices(GPUS["h200"], 2)), ("data",), axis_types=(axis_type,))
    x = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
    loss = lambda q, k, v: by_name(q, k, v).astype(jnp.float32).sum()
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss, argnums=range(3))).trace(x, x, x)
        lowered = lowered.lower(lowering_platforms=("cuda",))
        text = lowered.compile(compiler_options={"xla_gpu_autotune_level": 0}).as_text()
    assert "all-gather" not in text and "mosaic_gpu" in text
