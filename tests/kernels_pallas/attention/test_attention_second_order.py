"""grad of grad of attention, on every backend, against the float64 reference; and forward mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import EVERYTHING, assert_close, call, cast, draw, force_tiles
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels_pallas.attention import attention_sharded
from kernels_pallas.attention.normalizers.base import Softmax
from kernels_pallas.ops import attention_step


def second(f):
    """The gradient of the squared length of the gradient of a squared length."""
    first = jax.grad(lambda a: jnp.sum(f(a) ** 2))
    length = lambda a: sum(jnp.sum(g**2) for g in jax.tree.leaves(first(a)))
    return jax.jit(jax.grad(length))


def truth(arrays, f):
    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in arrays.items()}
        return jax.tree.map(np.asarray, second(f)(arrays))


CASES = {
    "xla, everything": ("xla", EVERYTHING),
    "xla, entmax": ("xla", dict(normalizer="entmax")),
    "tpu, gate by element, documents": ("tpu", dict(gate="element-wise", segments=True)),
}


@pytest.mark.parametrize(
    "name",
    [
        "xla, everything",
        pytest.param("xla, entmax", marks=pytest.mark.slow),
        "tpu, gate by element, documents",
    ],
)
def test_second_derivatives(name, monkeypatch):
    # Loops of unknown length.
    force_tiles(monkeypatch, 8, 8)
    backend, case = CASES[name]
    arrays, options = draw(**dict(B=1, T=40, H=2, Hk=1, K=4, V=4) | case)
    interpret = backend == "tpu"
    fast = lambda a: call(a, implementation=backend, interpret=interpret, **options)
    slow = lambda a: call(a, implementation="reference", **options)
    assert_close(second(fast)(cast(arrays, jnp.float32)), truth(arrays, slow), 2e-5)


def test_of_a_step():
    arrays, _ = draw(B=2, T=12, H=2, Hk=1)
    valid = jnp.asarray(np.random.default_rng(0).random((2, 12)) < 0.5)

    def step(a, implementation=None):
        q = a["q"][:, 0]
        return attention_step(q, a["k"], a["v"], valid=valid, implementation=implementation)

    actual = second(step)(cast(arrays, jnp.float32))
    assert_close(actual, truth(arrays, lambda a: step(a, "reference")), 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 5])
def test_of_sharded(window, monkeypatch):
    force_tiles(monkeypatch, 8, 8)
    arrays, options = draw(B=1, T=64, H=2, Hk=1, segments=True, window=window)
    ids = options.pop("segment_ids")
    mesh = jax.make_mesh((2,), ("context",), axis_types=(AxisType.Auto,))
    time = P(None, "context")

    def on_two(a):
        def part(q, k, v, ids):
            return attention_sharded(q, k, v, axis_name="context", segment_ids=ids, **options)

        split = jax.shard_map(part, mesh=mesh, in_specs=(time,) * 4, out_specs=time)
        return split(a["q"], a["k"], a["v"], ids)

    slow = lambda a: call(a, implementation="reference", segment_ids=ids, **options)
    assert_close(second(on_two)(cast(arrays, jnp.float32)), truth(arrays, slow), 2e-5)


def test_a_normalizer_without_a_formula_is_refused_in_one_line():
    class Own(Softmax):
        pass

    arrays, _ = draw(B=1, T=5, H=1, Hk=1)
    with pytest.raises(NotImplementedError, match=r"attention: .* has no formula for Own"):
        second(lambda a: call(a, normalizer=Own()))(cast(arrays, jnp.float32))


def test_forward_mode():
    """The reference has it; of the others jax says in a line that they do not."""
    arrays, _ = draw(B=1, T=9, H=2, Hk=1)
    a = cast(arrays, jnp.float32)
    slow = jax.jit(lambda a: call(a, implementation="reference"))
    _, tangent = jax.jvp(slow, (a,), (a,))
    y, pullback = jax.vjp(slow, a)
    gradients = pullback(y)[0]
    inner = sum(jnp.vdot(a[name], gradients[name]) for name in a)
    np.testing.assert_allclose(jnp.vdot(tangent, y), inner, rtol=1e-4)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(call, (a,), (a,))


def in_scan(f, arrays):
    """A loop of one step over the arrays, as a model's loop over layers."""

    def summed(a):
        def body(total, one):
            return total + jnp.sum(f(one) ** 2), None

        total, _ = jax.lax.scan(body, 0.0, jax.tree.map(lambda x: x[None], a))
        # `second` squares it.
        return jnp.sqrt(total)

    return second(summed)(arrays)


def test_in_a_scan():
    """jax put the arguments among the residuals in each other's places (see `kept`)."""
    arrays, options = draw(B=1, T=12, H=2, Hk=1, K=4, V=3, gate="element-wise")
    attend = lambda a: call(a, implementation="xla", **options)
    expected = truth(arrays, lambda a: call(a, implementation="reference", **options))
    assert_close(in_scan(attend, cast(arrays, jnp.float32)), expected, 2e-5)
