"""What the tests of `attention` share: random calls, their gradients, and the float64 truth."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import rel_rms

from kernels_pallas.attention import blocks, xla
from kernels_pallas.ops import attention

FLOAT32, BFLOAT16 = 1e-5, 2e-3
EVERYTHING = dict(
    gate="head-wise", sinks=True, slopes=True, segments=True, window=12, logits_soft_cap=4.0
)
# Parameters, a number a head: they stay float32 in a bfloat16 call, as in a layer.
BY_HEAD = ("sink_logits", "alibi_slopes", "normalizer_parameters")


def draw(
    B=2,
    T=65,
    H=4,
    Hk=2,
    K=8,
    V=12,
    gate=None,
    sinks=False,
    slopes=False,
    segments=False,
    parameters=None,
    seed=0,
    **options,
):
    """(differentiable arrays in float64, the other arguments)."""
    rng = np.random.default_rng(seed)
    shapes = dict(q=(B, T, H, K), k=(B, T, Hk, K), v=(B, T, Hk, V))
    if gate:
        shapes["gate_logits"] = (B, T, H, 1 if gate == "head-wise" else V)
    if sinks:
        shapes["sink_logits"] = (H,)
    if slopes:
        shapes["alibi_slopes"] = (H,)
    if segments:
        options["segment_ids"] = jnp.asarray(np.sort(rng.integers(0, 3, (B, T)), axis=1), jnp.int32)
    sizes = {"alibi_slopes": 0.1}
    arrays = {name: sizes.get(name, 1) * rng.normal(size=shape) for name, shape in shapes.items()}
    if parameters:
        # Learned numbers of a normalizer, around where they start.
        starts = np.asarray(list(parameters.values()))[:, None]
        arrays["normalizer_parameters"] = starts + 0.2 * np.tanh(rng.normal(size=(len(starts), H)))
    return arrays, options


def call(arrays, **options):
    q, k, v = (arrays[name] for name in "qkv")
    others = {name: x for name, x in arrays.items() if name not in "qkv"}
    return attention(q, k, v, **others, **options)


def weighted_sum(y):
    """A fixed cotangent, the same in every dtype, so rounded to bfloat16."""
    cotangent = jnp.asarray(np.random.default_rng(9).normal(size=y.shape), jnp.bfloat16)
    dtype = jnp.float64 if y.dtype == jnp.float64 else jnp.float32
    return jnp.sum(y.astype(dtype) * cotangent.astype(dtype))


def value_and_gradients(arrays, f=call, **options):
    """{"y": y, "q": dq, ...}."""
    loss = lambda a: (lambda y: (weighted_sum(y), y))(f(a, **options))
    (_, y), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return {"y": y, **gradients}


def cast(arrays, dtype):
    return {
        name: jnp.asarray(x, jnp.float32 if name in BY_HEAD else dtype)
        for name, x in arrays.items()
    }


def truth(arrays, **options):
    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in arrays.items()}
        return jax.tree.map(
            np.asarray, value_and_gradients(arrays, implementation="reference", **options)
        )


def assert_close(actual, expected, tolerance):
    """Within `tolerance`; or as the truth is when rounded to this dtype, where a few elements are
    most of an array.
    """
    errors = {name: rel_rms(actual[name], expected[name]) for name in expected}
    rounding = {
        name: rel_rms(np.asarray(expected[name], actual[name].dtype), expected[name])
        for name in expected
    }
    assert all(errors[name] < max(tolerance, 1.05 * rounding[name]) for name in expected), errors


def force_tiles(monkeypatch, block_q, block_k, unrolled=1):
    monkeypatch.setattr(xla, "block_sizes", lambda T: (min(T, block_q), min(T, block_k)))
    monkeypatch.setattr(blocks, "UNROLLED_BLOCKS", unrolled)
