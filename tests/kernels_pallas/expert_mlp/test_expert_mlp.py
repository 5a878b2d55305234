"""`expert_mlp`: values and gradients against float64, on every implementation; bad input by
name.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels_pallas import dispatch
from kernels_pallas.expert_mlp.gate import ACTIVATIONS, gated_product, gated_product_cotangents
from kernels_pallas.expert_mlp.tpu import op as tpu
from kernels_pallas.grouped_matmul.tpu import tuning as tpu_tuning
from kernels_pallas.ops import RESIDUAL_NAMES, expert_mlp

R, M, F, G = 60, 12, 20, 4
NAMES = ("rows", "gate", "up", "down")
SIZES = [33, 0, 1, 20]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    row = tpu_tuning.Tuning(
        cores=1, tile=32, part=32, outer_part=32, step=128, outer_step=(128, 128), vmem=2**26
    )
    monkeypatch.setattr(tpu_tuning, "tuned", lambda: row)


def draw(dtype, rows=R):
    rng = np.random.default_rng(0)
    shapes = {"rows": (rows, M), "gate": (G, M, F), "up": (G, M, F), "down": (G, F, M)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def weights(rows=R):
    """One of them is 0: a gradient that divided by it would show."""
    return {
        "weights": jnp.asarray(np.random.default_rng(2).normal(size=rows), jnp.float32)
        .at[3]
        .set(0.0)
    }


def cotangent(rows=R):
    return np.random.default_rng(1).normal(size=(rows, M)).astype(np.float32)


def value_and_gradients(arrays, sizes, f=expert_mlp, **options):
    """{"y": y, "rows": drows, "gate": dgate, ...}."""
    call = lambda a: f(
        *(a[name] for name in NAMES), sizes, *(a[n] for n in a if n == "weights"), **options
    )
    y, pull = jax.vjp(call, arrays)
    return {"y": y} | pull(jnp.asarray(cotangent(len(y)), y.dtype))[0]


def truth(arrays, sizes, half=None):
    """By hand, in numpy and float64, a group after the other. `half`: which of two the rows are of
    all.
    """
    x, gate, up, down = (np.asarray(arrays[name], np.float64) for name in NAMES)
    dy = cotangent(len(x)) if half is None else cotangent(2 * len(x)).reshape(2, len(x), M)[half]
    dy = np.asarray(jnp.asarray(dy, arrays["rows"].dtype), np.float64)
    out = {"y": np.zeros_like(x), "rows": np.zeros_like(x)}
    out |= {
        name: np.zeros(arrays[name].shape)
        for name in (*NAMES[1:], *(n for n in arrays if n == "weights"))
    }
    w, start = np.asarray(arrays.get("weights", np.ones(len(x))), np.float64)[:, None], 0
    for g, size in enumerate(sizes):
        at = slice(start, start + size)
        a, b = x[at] @ gate[g], x[at] @ up[g]
        s = 1 / (1 + np.exp(-a))
        if "weights" in out:
            out["weights"][at] = np.sum(dy[at] * (a * s * b @ down[g]), axis=1)
        h, dh = w[at] * a * s * b, w[at] * (dy[at] @ down[g].T)
        da, db = dh * b * s * (1 + a * (1 - s)), dh * a * s
        out["y"][at], out["rows"][at] = h @ down[g], da @ gate[g].T + db @ up[g].T
        out["gate"][g], out["up"][g], out["down"][g] = x[at].T @ da, x[at].T @ db, h.T @ dy[at]
        start += size
    return out


def assert_close(actual, expected, tolerance):
    errors = {name: rel_rms(actual[name], expected[name]) for name in expected}
    assert all(error < tolerance for error in errors.values()), errors


@functools.cache
def on_tpu():
    return jax.jit(functools.partial(value_and_gradients, implementation="tpu", interpret=True))


@pytest.mark.parametrize("sizes", [SIZES, [1, 1, 1, 1], [0, 0, 60, 0], [5, 17, 33, 5]])
def test_tpu_kernels(sizes):
    arrays = draw(jnp.float32) | weights()
    actual = on_tpu()(arrays, jnp.asarray(sizes, jnp.int32))
    assert_close(actual, truth(arrays, sizes), 2e-6)
    assert not np.any(actual["y"][sum(sizes) :]) and not np.any(
        actual["down"][np.asarray(sizes) == 0]
    )
    assert not np.any(actual["weights"][sum(sizes) :])


@pytest.mark.slow
def test_tpu_without_weights():
    arrays = draw(jnp.float32)
    assert_close(on_tpu()(arrays, jnp.asarray(SIZES, jnp.int32)), truth(arrays, SIZES), 2e-6)


def test_tpu_without_a_derivative():
    """Other kernels, which write the product instead of the two pre-activations: the same to the
    rounding.
    """
    arrays = draw(jnp.float32) | weights()
    run = jax.jit(functools.partial(expert_mlp, implementation="tpu", interpret=True))
    y = run(*(arrays[name] for name in NAMES), jnp.asarray(SIZES), arrays["weights"])
    assert rel_rms(y, truth(arrays, SIZES)["y"]) < 2e-6
    assert dispatch.last_choice("expert_mlp").implementation == "tpu"


def test_a_policy_keeps_what_the_kernels_save():
    arrays = draw(jnp.float32)

    def loss(arrays):
        matrices = [arrays[name] for name in NAMES]
        sizes = jnp.asarray(SIZES, jnp.int32)
        return expert_mlp(*matrices, sizes, implementation="tpu", interpret=True).sum()

    policy = jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)
    step = jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(arrays)
    assert str(step).count("jaxpr=expert_mlp_pre_activations") == 1


@pytest.mark.parametrize("rows, sizes", [(R, SIZES), (200, [70, 0, 65, 40])])
def test_gpu_kernels(rows, sizes):
    """Gate and up by one kernel, their cotangents' way back by another; a group of two tiles."""
    arrays = draw(jnp.float32, rows) | weights(rows)
    options = dict(implementation="gpu", interpret=True)
    run = jax.jit(functools.partial(value_and_gradients, **options))
    sizes = np.asarray(sizes, np.int32)
    actual = run(arrays, sizes)
    assert_close(actual, truth(arrays, sizes), 2e-6)
    assert not np.any(actual["y"][sum(sizes) :])
    text = str(jax.make_jaxpr(functools.partial(value_and_gradients, **options))(arrays, sizes))
    assert text.count("name=grouped_matmul_forward") == 2, "the rows are read twice"
    assert text.count("name=grouped_matmul_dlhs") == 2


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_composed(implementation):
    arrays = draw(jnp.float32) | weights()
    run = jax.jit(functools.partial(value_and_gradients, implementation=implementation))
    assert_close(run(arrays, jnp.asarray(SIZES)), truth(arrays, SIZES), 2e-6)


@pytest.mark.slow
def test_bfloat16():
    """Pre-activations and their product are rounded too: the kernels are as far from the truth as
    three matmuls.
    """
    arrays, sizes = draw(jnp.bfloat16), jnp.asarray(SIZES)
    expected = truth(arrays, SIZES)
    tpu, xla = on_tpu()(arrays, sizes), jax.jit(value_and_gradients)(arrays, sizes)
    for name in expected:
        assert rel_rms(tpu[name], expected[name]) < min(
            8e-3, 1.1 * rel_rms(xla[name], expected[name])
        ), name


@pytest.mark.slow
def test_shard_map():
    """Rows of each device's own; matrices the same everywhere, so that their gradients are
    summed.
    """
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    arrays, sizes = draw(jnp.float32, 32) | weights(32), np.asarray([[5, 1, 0, 9], [3, 0, 2, 11]])
    call = lambda *a: expert_mlp(*a[:4], a[4][0], a[5], implementation="tpu", interpret=True)
    rows = P("data")
    mapped = jax.shard_map(
        call, mesh=mesh, in_specs=(rows, P(), P(), P(), rows, rows), out_specs=rows, check_vma=True
    )
    actual = jax.jit(functools.partial(value_and_gradients, f=mapped))(arrays, sizes)
    part = lambda i: (
        arrays | {name: arrays[name][16 * i : 16 * i + 16] for name in ("rows", "weights")}
    )
    halves = [truth(part(i), sizes[i], half=i) for i in range(2)]
    join = lambda name, x, y: np.concatenate([x, y]) if name in ("y", "rows", "weights") else x + y
    expected = {name: join(name, halves[0][name], halves[1][name]) for name in halves[0]}
    assert_close(actual, expected, 2e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_cotangents_of_the_gate(activation):
    a, b, d = (jnp.asarray(np.random.default_rng(i).normal(size=50), jnp.float32) for i in range(3))
    _, pull = jax.vjp(functools.partial(gated_product, activation), a, b)
    for x, y in zip(gated_product_cotangents(activation, a, b, d), pull(d)):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_planted_error_is_seen(monkeypatch):
    """The derivative of another gate."""
    wrong = lambda activation, a, b, d: gated_product_cotangents("gelu", a, b, d)
    monkeypatch.setattr(tpu, "gated_product_cotangents", wrong)
    arrays = draw(jnp.float32)
    actual = jax.jit(functools.partial(value_and_gradients, implementation="tpu", interpret=True))(
        arrays, jnp.asarray(SIZES)
    )
    errors = {name: rel_rms(actual[name], x) for name, x in truth(arrays, SIZES).items()}
    assert (
        min(errors[n] for n in ("rows", "gate", "up")) > 1e-2
        and max(errors["y"], errors["down"]) < 2e-6
    ), errors


BAD = {
    "rows: got shape (4,), expected [R, M]": dict(rows=jnp.zeros(4)),
    "gate: got shape (2, 4, 5), expected [G, 3, F]": dict(gate=jnp.zeros((2, 4, 5))),
    "up: got shape (2, 3, 6), expected (2, 3, 5)": dict(up=jnp.zeros((2, 3, 6))),
    "down: got shape (2, 3, 5), expected (2, 5, 3)": dict(down=jnp.zeros((2, 3, 5))),
    "group_sizes: got shape (3,), expected (2,)": dict(group_sizes=jnp.asarray([1, 2, 1])),
    "group_sizes: got dtype float32": dict(group_sizes=jnp.ones(2)),
    "down: got dtype bfloat16, expected float32": dict(down=jnp.zeros((2, 5, 3), jnp.bfloat16)),
    "weights: got shape (3,) and dtype float32, expected (4,) of a float dtype": dict(
        weights=jnp.ones(3)
    ),
    "activation: got 'relu', expected one of silu, gelu": dict(activation="relu"),
    "implementation: got 'fast'": dict(implementation="fast"),
    "interpret: got True": dict(interpret=True),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    good = dict(
        rows=jnp.zeros((4, 3)),
        gate=jnp.zeros((2, 3, 5)),
        up=jnp.zeros((2, 3, 5)),
        down=jnp.zeros((2, 5, 3)),
        group_sizes=jnp.asarray([1, 3]),
    )
    with pytest.raises(ValueError) as error:
        expert_mlp(**(good | BAD[message]))
    assert f"expert_mlp: {message}" in str(error.value)
