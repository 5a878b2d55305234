"""`causal_conv`: its formula in float64, every implementation beside it, modes of jax, meshes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_gradients, rel_rms, slow
from jax.sharding import AxisType, NamedSharding

from kernels_pallas import dispatch
from kernels_pallas.causal_conv.inputs import ConvInputs
from kernels_pallas.causal_conv.tpu import op as tpu
from kernels_pallas.common.mesh import mesh_axes
from kernels_pallas.ops import causal_conv, last_choice

RNG = np.random.default_rng(0)


def draw(B, T, F, width, has_bias=True, is_packed=True):
    """The arrays of a call, and dy. Segments of one token and of many; one comes twice."""
    x, dy = RNG.normal(0.3, 1.0, size=(2, B, T, F))
    kernel = RNG.normal(size=(width, F))
    bias = RNG.normal(size=F) if has_bias else None
    starts = RNG.random((B, T)) < 0.15
    segment_ids = np.cumsum(starts, 1) % 5 if is_packed else None
    return ConvInputs(x, kernel, bias, segment_ids), dy


def formula(inputs, is_activated):
    """Token by token, in float64."""
    x, kernel, bias, segment_ids = inputs
    y = np.zeros(x.shape) if bias is None else np.zeros(x.shape) + bias
    for b, t, w in np.ndindex(x.shape[0], x.shape[1], kernel.shape[0]):
        source = t - (kernel.shape[0] - 1) + w
        if source >= 0 and (segment_ids is None or segment_ids[b, source] == segment_ids[b, t]):
            y[b, t] += kernel[w] * x[b, source]
    return y / (1 + np.exp(-y)) if is_activated else y


def results(implementation, inputs, dy, is_activated=True):
    """y, and the gradients of all floats, by name."""

    @jax.jit
    def all_of(floats, segment_ids, dy):
        def call(floats):
            return causal_conv(
                **floats,
                segment_ids=segment_ids,
                is_activated=is_activated,
                implementation=implementation,
                interpret=implementation == "tpu",
            )

        y, pull_back = jax.vjp(call, floats)
        return {"y": y} | pull_back(dy)[0]

    floats = inputs._replace(segment_ids=None)._asdict()
    floats = {name: x for name, x in floats.items() if x is not None}
    return all_of(floats, inputs.segment_ids, dy)


def exact(inputs, dy, is_activated=True):
    """`results` of the reference in float64."""
    with jax.enable_x64(True):
        wide = [None if z is None else jnp.asarray(np.asarray(z, np.float64)) for z in inputs[:3]]
        ids = inputs.segment_ids
        wide = ConvInputs(*wide, None if ids is None else jnp.asarray(ids))
        return jax.tree.map(
            np.asarray, results("reference", wide, jnp.asarray(dy, jnp.float64), is_activated)
        )


def low(inputs, dy, dtype=jnp.bfloat16):
    """x and dy in this dtype, the weights in float32."""
    floats = (jnp.asarray(inputs.x, dtype), *jax.tree.map(jnp.float32, inputs[1:3]))
    ids = inputs.segment_ids
    return ConvInputs(*floats, None if ids is None else jnp.asarray(ids)), jnp.asarray(dy, dtype)


# More taps than tokens, one tap.
@pytest.mark.parametrize("width", [4, 11, 1])
@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("is_activated", [True, False])
def test_the_reference_is_the_formula(is_activated, is_packed, width):
    inputs, dy = draw(2, 9, 5, width, is_packed, is_packed)
    found = exact(inputs, dy, is_activated)
    assert rel_rms(found["y"], formula(inputs, is_activated)) < 1e-12

    def number(given):
        return (formula(inputs._replace(**given), is_activated) * dy).sum()

    gradients = {name: found[name] for name in found if name != "y"}
    check_gradients(number, {n: getattr(inputs, n) for n in gradients}, gradients)


# Tokens that no block divides, blocks of one and of several strips, a row shorter than the kernel.
CASES = {
    "packed": (dict(B=2, T=300, F=384, width=4), True),
    "whole rows": (dict(B=1, T=256, F=256, width=4, has_bias=False, is_packed=False), True),
    "odd, no SiLU": (dict(B=2, T=131, F=128, width=3, is_packed=False), False),
    "nine taps": (dict(B=1, T=270, F=128, width=9), True),
    "one tap": (dict(B=1, T=130, F=128, width=1), True),
    "short rows": (dict(B=70, T=2, F=128, width=4), True),
}
SLOW = ("one tap", "short rows")


@pytest.mark.parametrize("case", [slow(name) if name in SLOW else name for name in CASES])
@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_values_and_gradients(implementation, case, monkeypatch):
    monkeypatch.setattr(tpu, "MOST_ROWS", 128)
    monkeypatch.setattr(tpu, "MOST_CHANNELS", 256)
    sizes, is_activated = CASES[case]
    inputs, dy = low(*draw(**sizes))
    want = exact(inputs, dy, is_activated)
    got = results(implementation, inputs, dy, is_activated)
    assert got["x"].dtype == got["y"].dtype == jnp.bfloat16
    errors = {name: rel_rms(got[name], want[name]) for name in want}
    # The kernel rounds once; XLA rounds dz, too.
    is_kernel = implementation == "tpu"
    assert errors.pop("y") < 2e-3, errors
    assert errors.pop("x") < (2e-3 if is_kernel else 3e-3), errors
    assert max(errors.values()) < (1e-5 if is_kernel else 3e-3), errors


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_float32(implementation):
    inputs, dy = low(*draw(2, 9, 12, 4), jnp.float32)
    got, want = results(implementation, inputs, dy), exact(inputs, dy)
    for name in want:
        assert rel_rms(got[name], want[name]) < 1e-6, name


@pytest.mark.parametrize("implementation", ["reference", "xla", "tpu"])
@pytest.mark.parametrize("is_activated", [True, False])
def test_what_is_not_finite_stays_in_its_document(is_activated, implementation, monkeypatch):
    """Values, gradients of x, and those of taps that do not reach it. Across blocks."""
    monkeypatch.setattr(tpu, "MOST_ROWS", 128)
    inputs, dy = draw(2, 200, 128, 4)
    segment_ids = np.repeat([[0, 1, 2, 0]], 2, 0).repeat([126, 3, 3, 68], 1)
    inputs = inputs._replace(segment_ids=segment_ids)
    clean = results(implementation, *low(inputs, dy), is_activated)
    inputs.x[0, 127], dy[0, 130], inputs.x[1, 131, 5] = np.nan, np.inf, -np.inf
    got = results(implementation, *low(inputs, dy), is_activated)
    good = np.ones((2, 200), bool)
    good[0, 126:132] = good[1, 129:132] = False
    for name in ("x", "y"):
        a, b = (np.asarray(z[name], np.float32) for z in (got, clean))
        np.testing.assert_array_equal(a[good], b[good])
    y = np.asarray(got["y"], np.float32)
    assert np.isnan(y[0, 127:129]).all() and np.isfinite(y[0, :127]).all()
    # The one of x in channel 5 was seen by itself alone, so by the last tap.
    inputs.x[0, 127], dy[0, 130] = 0.0, 0.0
    kernel = np.array(results(implementation, *low(inputs, dy), is_activated)["kernel"])
    assert not np.isfinite(kernel[3, 5])
    # The slope of a SiLU at infinity is none that another tap could be multiplied by.
    kernel[3 if not is_activated else slice(None), 5] = 0.0
    assert np.isfinite(kernel).all()


def bfloat16_case():
    return low(*draw(4, 40, 256, 4))


def test_modes_of_jax():
    """jit, vmap, strict promotion, a second derivative."""
    inputs, _ = bfloat16_case()
    x, kernel, bias, ids = inputs
    op = partial(
        causal_conv, segment_ids=ids, is_activated=True, implementation="tpu", interpret=True
    )
    plain = partial(causal_conv, segment_ids=ids, is_activated=True, implementation="xla")
    got = jax.jit(jax.vmap(op))(*(jnp.stack([z, 2 * z]) for z in (x, kernel, bias)))
    assert rel_rms(got[0], op(x, kernel, bias)) < 1e-3
    assert rel_rms(got[1], op(2 * x, 2 * kernel, 2 * bias)) < 1e-3

    def value(op, x, kernel, bias):
        return (op(x, kernel, bias).astype(jnp.float32) ** 2).sum()

    def second(op):
        slope = lambda x: jax.grad(partial(value, op))(x, kernel, bias)
        return jax.grad(lambda x: (slope(x).astype(jnp.float32) ** 2).sum())(x)

    assert rel_rms(second(op), second(plain)) < 2e-2
    for each in (op, plain, partial(plain, implementation="reference")):
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            gradients = jax.eval_shape(jax.grad(partial(value, each), (0, 1, 2)), x, kernel, bias)
        assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(axis_type):
    """Rows and channels are split; gradients of weights are sums over devices."""
    inputs, dy = bfloat16_case()
    want = results("tpu", inputs, dy)
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(axis_type,) * 2)
    of_tokens = NamedSharding(mesh, jax.P("rows", None, "heads"))
    with jax.set_mesh(mesh), mesh_axes(rows=("rows",), heads=("heads",)):
        whole = NamedSharding(mesh, jax.P())
        placed = ConvInputs(
            jax.device_put(inputs.x, of_tokens),
            jax.device_put(inputs.kernel, whole),
            jax.device_put(inputs.bias, whole),
            jax.device_put(inputs.segment_ids, NamedSharding(mesh, jax.P("rows"))),
        )
        got = results("tpu", placed, jax.device_put(dy, of_tokens))
    for name in want:
        assert rel_rms(got[name], want[name]) < 1e-3, name


def test_what_runs_where():
    inputs, _ = bfloat16_case()
    x, kernel, *_ = inputs
    calls = {
        "whole": (x, kernel),
        "float32": (x.astype("float32"), kernel),
        "half": (x[..., :64], kernel[:, :64]),
        "long": (x, jnp.tile(kernel, (3, 1))),
        "a few": (x[:, :4], kernel),
    }
    choices = {}
    with dispatch.lowering_for("tpu"):
        for name, call in calls.items():
            jax.make_jaxpr(causal_conv)(*call)
            choices[name] = last_choice("causal_conv").implementation
    others = dict.fromkeys(["float32", "half", "long", "a few"], "xla")
    assert choices == {"whole": "tpu"} | others


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": np.ones((2, 3), np.float32)}, r"x: got shape \(2, 3\), expected \[B, T, F\]"),
        ({"x": np.ones((2, 3, 8), np.int32)}, "x: got dtype int32"),
        ({"kernel": np.ones(8, np.float32)}, r"kernel: got shape \(8,\), expected \[W, F\]"),
        ({"kernel": np.ones((4, 7), np.float32)}, r"kernel: got shape \(4, 7\), expected \(4, 8\)"),
        ({"kernel": np.ones((0, 8), np.float32)}, r"kernel: got shape \(0, 8\), expected \[W, F\]"),
        ({"kernel": np.ones((4, 8), np.int32)}, "kernel: got dtype int32"),
        ({"bias": np.ones(7, np.float32)}, r"bias: got shape \(7,\), expected \(8,\)"),
        ({"segment_ids": np.ones(3, np.int32)}, r"segment_ids: got shape \(3,\)"),
        ({"segment_ids": np.ones((2, 3))}, "segment_ids: got dtype float32"),
        ({"interpret": True}, "interpret: got True with implementation=None"),
        ({"implementation": "tpus"}, "implementation: got 'tpus'"),
    ],
)
def test_bad_arguments(change, message):
    good = {"x": np.ones((2, 3, 8), np.float32), "kernel": np.ones((4, 8), np.float32)}
    with pytest.raises(ValueError, match=f"causal_conv: {message}"):
        causal_conv(**(good | change))


@pytest.mark.parametrize(
    "implementation, shape, width, message",
    [
        ("gpu", (2, 70, 128), 4, "is not one of this op's"),
        ("tpu", (2, 70, 64), 4, "takes a multiple of 128 channels, not 64"),
        ("tpu", (2, 70, 128), 10, "takes kernels of up to 9 tokens, not 10"),
        ("tpu", (2, 3, 128), 4, "takes 128 tokens or more, not 6"),
    ],
)
def test_a_named_implementation_that_cannot(implementation, shape, width, message):
    x = jnp.zeros(shape, jnp.bfloat16)
    kernel = jnp.zeros((width, shape[2]))
    with pytest.raises(NotImplementedError, match=f"causal_conv: .*{message}"):
        causal_conv(x, kernel, implementation=implementation)
