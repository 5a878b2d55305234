"""`rotary`: its formula in float64, every implementation beside it, modes of jax and meshes."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_gradients, rel_rms, slow
from jax.sharding import AxisType, NamedSharding

from kernels_pallas import dispatch
from kernels_pallas.common.mesh import mesh_axes
from kernels_pallas.ops import last_choice, rotary
from kernels_pallas.rotary.tpu import op as tpu

RNG = np.random.default_rng(0)


def frequencies_of(pairs):
    return np.float32(100.0 ** (-np.arange(pairs) / pairs))


def draw(B, T, H, D):
    """x, positions, a scale with small and negative numbers, dy."""
    x = 2 * RNG.normal(size=(B, T, H, D)) + 0.5
    positions = np.arange(T) + 7 * np.arange(B)[:, None]
    return x, positions, 0.3 + RNG.normal(size=D), RNG.normal(size=x.shape)


def formula(x, scale, positions, frequencies, *, eps=1e-6, magnitude=1.0, interleaved=False):
    """Pairs as complex numbers, which turn by a product."""
    x = np.asarray(x, np.float64)
    if scale is not None:
        x = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale
    J = len(frequencies)
    left, right = (
        (slice(0, 2 * J, 2), slice(1, 2 * J, 2)) if interleaved else (slice(J), slice(J, 2 * J))
    )
    angles = positions[:, :, None, None] * np.asarray(frequencies, np.float64)
    turned = (x[..., left] + 1j * x[..., right]) * magnitude * np.exp(1j * angles)
    y = x.copy()
    y[..., left], y[..., right] = turned.real, turned.imag
    return y


def results(implementation, x, scale, dy, positions, frequencies, **options):
    """y and the gradients of x and, if there is one, of the scale."""
    interpret = implementation == "tpu"

    def call(x, scale):
        return rotary(
            x,
            jnp.asarray(positions),
            frequencies,
            scale,
            implementation=implementation,
            interpret=interpret,
            **options,
        )

    @jax.jit
    def all_of(x, scale, dy):
        y, pull_back = jax.vjp(call, x, scale)
        return y, *pull_back(dy)

    return [z for z in all_of(x, scale, dy) if z is not None]


def exact(x, scale, dy, *rest, **options):
    """`results` of the reference in float64."""
    with jax.enable_x64(True):
        wide = [
            None if z is None else jnp.asarray(np.asarray(z, np.float64)) for z in (x, scale, dy)
        ]
        return [np.asarray(z) for z in results("reference", *wide, *rest, **options)]


@pytest.mark.parametrize(
    "pairs, interleaved, normed",
    [
        *(
            (*pairs, normed)
            for pairs in [(3, False), (4, True), (2, True)]
            for normed in (True, False)
        ),
        (0, False, True),
    ],
)
def test_the_reference_is_the_formula(pairs, interleaved, normed):
    x, positions, scale, dy = draw(2, 5, 3, 8)
    scale = scale if normed else None
    frequencies = frequencies_of(pairs)
    options = {"magnitude": 1.25, "interleaved": interleaved, "eps": 1e-2}
    found = exact(x, scale, dy, positions, frequencies, **options)
    assert rel_rms(found[0], formula(x, scale, positions, frequencies, **options)) < 1e-12

    def number(given):
        y = formula(given["x"], given.get("scale"), positions, frequencies, **options)
        return (y * dy).sum()

    given = {"x": x} | ({"scale": scale} if normed else {})
    check_gradients(number, given, dict(zip(given, found[1:])))


# Rows that no block divides and fewer than a group of them, several blocks, wide heads, some
# channels that do not turn.
CASES = {
    "llama": ((2, 75, 3, 128), 64, {}),
    "part of the channels": ((2, 65, 2, 128), 16, {"magnitude": 1.25, "eps": 1e-2}),
    "interleaved": ((1, 300, 1, 128), 50, {"interleaved": True}),
    "wide": ((1, 600, 2, 256), 128, {}),
    "norm alone": ((2, 75, 3, 128), 0, {"eps": 1e-2}),
}


@pytest.mark.parametrize(
    "case, normed",
    [
        *itertools.product(["llama", "part of the channels", "interleaved"], [True, False]),
        ("norm alone", True),
        slow("wide", True),
        slow("wide", False),
    ],
)
@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_values_and_gradients(implementation, normed, case, monkeypatch):
    monkeypatch.setattr(tpu, "BLOCK", 128 * 128)
    monkeypatch.setattr(tpu, "GROUP_ROWS", 32)
    shape, pairs, options = CASES[case]
    x, positions, scale, dy = draw(*shape)
    x, dy = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)
    scale = jnp.asarray(scale, jnp.float32) if normed else None
    rest = (positions, frequencies_of(pairs))
    want = exact(x, scale, dy, *rest, **options)
    got = results(implementation, x, scale, dy, *rest, **options)
    errors = [rel_rms(a, b) for a, b in zip(got, want)]
    # Rounded once to 8 bits; by XLA after the norm too, which the scale's gradient sees.
    assert max(errors[:2]) < (2e-3 if implementation == "tpu" else 2.8e-3), errors
    assert max(errors[2:], default=0) < (1e-5 if implementation == "tpu" else 4e-3), errors


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_float32(implementation):
    x, positions, scale, dy = draw(2, 9, 2, 12)
    x, scale, dy = (jnp.asarray(z, jnp.float32) for z in (x, scale, dy))
    rest = (positions, frequencies_of(6))
    got = results(implementation, x, scale, dy, *rest)
    for a, b in zip(got, exact(x, scale, dy, *rest)):
        assert rel_rms(a, b) < 1e-6


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_a_token_that_is_not_finite_stays_alone(implementation):
    x, positions, scale, dy = draw(2, 70, 2, 128)
    rest = (positions, frequencies_of(64))
    clean = results(implementation, *(jnp.asarray(z, jnp.bfloat16) for z in (x, scale, dy)), *rest)
    x[0, 3], x[1, 5, 0, 0], dy[1, 6] = np.nan, np.inf, np.nan
    got = results(implementation, *(jnp.asarray(z, jnp.bfloat16) for z in (x, scale, dy)), *rest)
    good = np.ones((2, 70), bool)
    good[0, 3] = good[1, 5] = good[1, 6] = False
    for a, b in zip(got[:2], clean[:2]):
        # The same program.
        np.testing.assert_array_equal(np.asarray(a)[good], np.asarray(b)[good])
    assert np.isnan(np.asarray(got[0], np.float32)[0, 3]).all()


def bfloat16_case():
    x, positions, scale, dy = draw(4, 40, 2, 128)
    arrays = [jnp.asarray(z, jnp.bfloat16) for z in (x, dy)]
    scale, positions = jnp.asarray(scale, jnp.float32), jnp.asarray(positions)
    return arrays[0], scale, arrays[1], positions, frequencies_of(64)


@pytest.mark.parametrize("pairs", [64, 0])
def test_modes_of_jax(pairs):
    """jit, vmap, strict promotion, a second derivative."""
    x, scale, _, positions, frequencies = bfloat16_case()
    frequencies = frequencies[:pairs]
    op = partial(rotary, frequencies=frequencies, implementation="tpu", interpret=True)
    plain = partial(rotary, frequencies=frequencies, implementation="xla")
    want = op(x, positions, norm_scale=scale)
    call = jax.vmap(lambda x, scale: op(x, positions, norm_scale=scale))
    got = jax.jit(call)(jnp.stack([x, x]), jnp.stack([scale, 2 * scale]))
    # Another program may round a last bit otherwise.
    assert rel_rms(got[0], want) < 1e-3
    assert rel_rms(got[1], 2 * np.asarray(want, np.float32)) < 1e-3

    def value(op, x, scale):
        return (op(x, positions, norm_scale=scale).astype(jnp.float32) ** 2).sum()

    def second(op):
        slope = lambda x: jax.grad(partial(value, op), 1)(x, scale)
        return jax.grad(lambda x: (slope(x) ** 2).sum())(x)

    assert rel_rms(second(op), second(plain)) < 2e-2
    for each in (op, plain, partial(plain, implementation="reference")):
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            gradients = jax.eval_shape(jax.grad(partial(value, each), (0, 1)), x, scale)
        assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(axis_type):
    """Rows and heads are split; the scale's gradient is the sum over devices."""
    x, scale, dy, positions, frequencies = bfloat16_case()
    want = results("tpu", x, scale, dy, positions, frequencies)
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(axis_type,) * 2)
    of_heads = NamedSharding(mesh, jax.P("rows", None, "heads"))
    of_rows = NamedSharding(mesh, jax.P("rows"))
    with jax.set_mesh(mesh), mesh_axes(rows=("rows",), heads=("heads",)):
        x, dy = (jax.device_put(z, of_heads) for z in (x, dy))
        positions = jax.device_put(positions, of_rows)
        scale = jax.device_put(scale, NamedSharding(mesh, jax.P()))
        run = jax.jit(partial(results, "tpu", frequencies=frequencies))
        got = run(x, scale, dy, positions)
    for a, b in zip(got, want):
        assert rel_rms(a, b) < 1e-3


def test_what_runs_where():
    x, _, _, positions, frequencies = bfloat16_case()
    choices = {}
    with dispatch.lowering_for("tpu"):
        for name, of in {"whole": x, "float32": x.astype("float32"), "half": x[..., :64]}.items():
            turns = frequencies[: of.shape[-1] // 2]
            jax.make_jaxpr(lambda x, turns=turns: rotary(x, positions, turns))(of)
            choices[name] = last_choice("rotary").implementation
        jax.make_jaxpr(lambda x: rotary(x, positions[:, :1], frequencies))(x[:, :1])
        choices["a few"] = last_choice("rotary").implementation
    assert choices == {"whole": "tpu", "float32": "xla", "half": "xla", "a few": "xla"}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"x": np.ones((2, 3, 4), np.float32)},
            r"x: got shape \(2, 3, 4\), expected \[B, T, H, D\]",
        ),
        ({"x": np.ones((2, 3, 1, 8), np.int32)}, "x: got dtype int32"),
        ({"positions": np.arange(3)}, r"positions: got shape \(3,\), expected \(2, 3\)"),
        ({"positions": np.ones((2, 3))}, "positions: got dtype float32"),
        ({"frequencies": frequencies_of(5)}, r"frequencies: got shape \(5,\), expected .* 1 to 4"),
        ({"frequencies": np.float32(1)}, r"frequencies: got shape \(\)"),
        ({"frequencies": frequencies_of(0)}, r"frequencies: got shape \(0,\), expected .* 1 to 4"),
        ({"norm_scale": np.ones(4, np.float32)}, r"norm_scale: got shape \(4,\), expected \(8,\)"),
        ({"interpret": True}, "interpret: got True with implementation=None"),
        ({"implementation": "tpus"}, "implementation: got 'tpus'"),
    ],
)
def test_bad_arguments(change, message):
    good = {
        "x": np.ones((2, 3, 1, 8), np.float32),
        "positions": np.zeros((2, 3), np.int32),
        "frequencies": frequencies_of(4),
    }
    with pytest.raises(ValueError, match=f"rotary: {message}"):
        rotary(**(good | change))


@pytest.mark.parametrize(
    "implementation, shape, message",
    [
        ("gpu", (2, 70, 1, 128), "is not one of this op's"),
        ("tpu", (2, 70, 1, 64), "takes heads of a multiple of 128 channels, not 64"),
        ("tpu", (2, 3, 1, 128), "takes 128 tokens or more, not 6"),
    ],
)
def test_a_named_implementation_that_cannot(implementation, shape, message):
    x = jnp.zeros(shape, jnp.bfloat16)
    positions = np.zeros(shape[:2], np.int32)
    with pytest.raises(NotImplementedError, match=f"rotary: .*{message}"):
        rotary(x, positions, frequencies_of(4), implementation=implementation)
