"""attention's kernels on the GPU of this machine: values and gradients (gpu_device.py)."""

import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import EVERYTHING, cast, draw, truth, value_and_gradients
from gpu_device import INTERPRET, TOLERANCE, needs_gpu
from helpers import rel_rms

from kernels_pallas.attention import NORMALIZERS, attention_step

pytestmark = needs_gpu
ONE_PASS = {
    name: normalizer.for_length(300)
    for name, normalizer in NORMALIZERS.items()
    if normalizer.passes == 1 and not normalizer.parameters
}


def compare(dtype: str, **case) -> None:
    arrays, options = draw(**case)
    arrays = cast(arrays, dtype)
    got = value_and_gradients(arrays, implementation="gpu", interpret=INTERPRET, **options)
    want = truth(arrays, **options)
    errors = {name: rel_rms(got[name], want[name]) for name in want}
    # The gradient of a number a head is a sum of many terms that cancel.
    assert all(e <= TOLERANCE[dtype] * (5 if got[n].ndim == 1 else 1) for n, e in errors.items()), (
        errors
    )


@pytest.mark.parametrize("gate", [None, "head-wise", "element-wise"])
@pytest.mark.parametrize("mask", [{}, dict(window=100), dict(segments=True), dict(causal=False)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_masks_and_gates(dtype, mask, gate):
    if INTERPRET and (dtype, gate, mask) != ("float32", "head-wise", {}):
        pytest.skip("one case when interpreted")
    compare(dtype, T=50 if INTERPRET else 700, gate=gate, K=64, V=64, **mask)


@pytest.mark.parametrize("normalizer", ONE_PASS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_normalizer_of_one_walk(dtype, normalizer):
    if INTERPRET:
        pytest.skip("tests/kernels_pallas/attention/test_attention_gpu.py has these")
    compare(dtype, T=300, gate="element-wise", K=64, V=128, normalizer=normalizer)


@pytest.mark.parametrize("D", [64, 96, 128, 256])
def test_sizes_of_heads(D):
    if INTERPRET:
        pytest.skip("large")
    compare("bfloat16", **EVERYTHING | dict(T=1000, K=D, V=D, window=300))


@pytest.mark.parametrize("normalizer", ONE_PASS)
def test_a_decoding_step(normalizer):
    if INTERPRET and normalizer != "softmax":
        pytest.skip("tests/kernels_pallas/attention/test_attention_step_gpu.py has these")
    r = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(r.normal(size=shape), jnp.float32)
    q, k, v = normal(2, 8, 128), normal(2, 3000, 2, 128), normal(2, 3000, 2, 128)
    options = dict(valid=jnp.asarray(r.random((2, 3000)) < 0.5), normalizer=ONE_PASS[normalizer])
    got = attention_step(q, k, v, **options, implementation="gpu", interpret=INTERPRET)
    assert rel_rms(got, attention_step(q, k, v, **options, implementation="reference")) <= 1e-4


@pytest.mark.parametrize("H, Hk", [(8, 2), (6, 1), (40, 2)])
@pytest.mark.parametrize("slots", [100, 200])
def test_a_decoding_step_of_grouped_heads_across_blocks(slots, H, Hk):
    """A cache that ends in its second block of slots, or its fourth; what is not valid is NaN."""
    if INTERPRET and (slots, H) != (100, 6):
        pytest.skip("one case when interpreted")
    r = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(r.normal(size=shape), jnp.float32)
    q, k, v = normal(2, H, 64), normal(2, slots, Hk, 64), normal(2, slots, Hk, 96)
    valid = r.random((2, slots)) < 0.5
    want = attention_step(q, k, v, valid=jnp.asarray(valid), implementation="reference")
    unused = ~valid[:, :, None, None]
    k, v = jnp.where(unused, jnp.nan, k), jnp.where(unused, jnp.nan, v)
    options = dict(implementation="gpu", interpret=INTERPRET)
    got = attention_step(q, k, v, valid=jnp.asarray(valid), **options)
    assert rel_rms(got, want) <= 1e-4


@pytest.mark.parametrize("T", [65, 129, 150])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_lengths_that_cross_into_another_block(dtype, T):
    """By one token, of grouped heads; blocks have 16 to 128 tokens."""
    if INTERPRET:
        pytest.skip("tests/kernels_pallas/attention/test_attention_gpu.py has these")
    compare(dtype, T=T, B=1, H=4, Hk=2, K=64, V=64, gate="element-wise", segments=True)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_what_is_not_seen_may_be_nan(dtype):
    """A bad token of the first document changes nothing in the second, and shows in its own."""
    if INTERPRET:
        pytest.skip("tests/kernels_pallas/attention/test_attention_gpu.py has this")
    arrays, _ = draw(B=1, T=200, H=2, Hk=1, K=64, V=64, gate="element-wise")
    arrays = cast(arrays, dtype)
    ids = jnp.asarray([[0] * 90 + [1] * 110], jnp.int32)
    options = dict(segment_ids=ids, implementation="gpu", interpret=INTERPRET)
    clean = value_and_gradients(arrays, **options)
    for name in "qkv":
        bad = arrays | {name: arrays[name].at[0, 50, 0, 3].set(jnp.nan)}
        got = value_and_gradients(bad, **options)
        assert all(rel_rms(got[n][:, 90:], clean[n][:, 90:]) <= TOLERANCE[dtype] for n in clean)
        assert not np.isfinite(np.asarray(got["y"], np.float32)[0, 50, 0, 3])
