"""The caller's numbers: integers of any width and sign, dtypes, and jax's strict modes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import EVERYTHING, FLOAT32, assert_close, call, cast, draw, value_and_gradients

from kernels_pallas.attention import (
    AdaptiveTemperature,
    ClippedSoftmax,
    Entmax,
    ReweightedSoftplus,
    Sigmoid,
    Softpick,
)
from kernels_pallas.attention.documents import document_numbers
from kernels_pallas.ops import attention_step

BACKENDS = ["reference", "xla", "tpu"]
RUNS = [3, 4, 2, 6]


def on(backend):
    return dict(implementation=backend, interpret=backend == "tpu")


IDS = {
    "int8": np.array([-128, 127, 0, -1], np.int8),
    "uint8": np.array([255, 0, 128, 255], np.uint8),
    "uint32": np.array([2**32 - 1, 2**31, 0, 2**32 - 1], np.uint32),
    # Equal in their lower 32 bits.
    "int64": np.array([1, 1 + 2**32, 1 + 2**40, -(2**62)], np.int64),
}


@pytest.mark.parametrize("dtype", IDS)
def test_segment_ids_of_any_integer_dtype(dtype):
    ids = np.repeat(IDS[dtype], RUNS)[None]
    expected = np.repeat(np.arange(4), RUNS)[None]
    np.testing.assert_array_equal(document_numbers(ids), expected)
    with jax.enable_x64(True):
        numbers = document_numbers(jnp.asarray(ids))
        assert numbers.dtype == jnp.int32
        np.testing.assert_array_equal(numbers, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_and_windows(backend):
    arrays, _ = draw(B=1, T=15, H=2, Hk=1)
    a = cast(arrays, jnp.float32)

    def run(ids, **options):
        return jax.jit(lambda a: call(a, segment_ids=ids, **options, **on(backend)))(a)

    small = np.repeat(np.arange(4), RUNS)[None]
    expected = run(small, window=5)
    for dtype in ("uint8", "int64"):
        ids = np.repeat(IDS[dtype], RUNS)[None]
        np.testing.assert_array_equal(run(ids, window=np.int8(5)), expected, dtype)
    no_limit = run(small)
    for window in (15, 2**31 - 1, np.uint64(2**63)):
        np.testing.assert_array_equal(run(small, window=window), no_limit)


Q, KV = jnp.zeros((2, 5, 4, 8)), jnp.zeros((2, 5, 2, 8))
BAD = {
    "window: got True": dict(window=True),
    "window: got 4.0": dict(window=4.0),
    "window: got -1": dict(window=-1),
    "causal: got 1,": dict(causal=1),
    "scale: got True": dict(scale=True),
    "scale: got nan": dict(scale=np.nan),
    "scale: got '1'": dict(scale="1"),
    "logits_soft_cap: got inf": dict(logits_soft_cap=np.inf),
    "segment_ids: got dtype bool": dict(segment_ids=np.zeros((2, 5), bool)),
    "segment_ids: got dtype float16": dict(segment_ids=np.zeros((2, 5), np.float16)),
    "q: got dtype float8_e4m3fn, expected one of float16, ": dict(q=Q.astype(jnp.float8_e4m3fn)),
    "v: got dtype float8_e5m2": dict(v=KV.astype(jnp.float8_e5m2)),
    "gate_logits: got dtype bool": dict(gate_logits=Q > 0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_numbers_are_named(message):
    with pytest.raises(ValueError) as error:
        call({"q": Q, "k": KV, "v": KV} | BAD[message])
    assert f"attention: {message}" in str(error.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Sigmoid(length=0),
        lambda: Sigmoid(length=True),
        lambda: Sigmoid(length=2.5),
        lambda: Softpick(eps=np.nan),
        lambda: ClippedSoftmax(alpha=np.nan),
        lambda: ReweightedSoftplus(power=2.0),
        lambda: Entmax(alpha=np.nan),
        lambda: Entmax(steps=0),
        lambda: AdaptiveTemperature(threshold=np.inf),
    ],
)
def test_parameters_of_normalizers_have_ranges(make):
    with pytest.raises(ValueError, match=r"got .*expected"):
        make()


def test_a_traced_window_is_refused():
    arrays, _ = draw(T=4)
    a = cast(arrays, jnp.float32)
    with pytest.raises(ValueError, match=r"attention: window: got .*expected None or an integer"):
        jax.jit(lambda w: call(a, window=w))(3)


@pytest.mark.parametrize(
    "backend, x64",
    [
        ("reference", False),
        ("xla", True),
        pytest.param("tpu", False, marks=pytest.mark.slow),
        ("tpu", True),
    ],
)
def test_strict_modes(backend, x64):
    """The right numbers where jax refuses to promote dtypes and ranks."""
    arrays, options = draw(B=2, T=17, H=2, Hk=1, **EVERYTHING)
    a = cast(arrays, jnp.float32)
    a["v"] = a["v"].astype(jnp.bfloat16)
    step_options = dict(valid=jnp.ones((2, 17), bool), implementation=None)

    def both():
        run = lambda a: call(a, **options, **on(backend))
        found = value_and_gradients(a, run)
        step = jax.jit(lambda q, k, v: attention_step(q, k, v, **step_options))
        return {**found, "step": step(a["q"][:, 0], a["k"], a["v"])}

    expected = both()
    with (
        jax.enable_x64(x64),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        actual = both()
    assert {n: x.dtype for n, x in actual.items()} == {n: x.dtype for n, x in expected.items()}
    assert_close(actual, expected, FLOAT32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_debug_modes_do_not_trip(backend):
    """No result of a compiled call is infinite or NaN; what is inside of it may be."""
    arrays, options = draw(B=1, T=17, H=2, Hk=1, segments=True, causal=False)
    a = cast(arrays, jnp.float32)
    with jax.debug_infs(True), jax.debug_nans(True):
        value_and_gradients(a, **options, **on(backend))
