"""linear_scan's kernels on the GPU of this machine: values and gradients (gpu_device.py)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_device import INTERPRET, TOLERANCE, needs_gpu
from helpers import rel_rms
from scan_cases import DECAYS, make

from kernels_pallas import dispatch
from kernels_pallas.linear_scan.gpu import tuning as gpu_tuning
from kernels_pallas.ops import linear_scan, linear_scan_step

pytestmark = needs_gpu
OPTIONS = {
    "inclusive": {},
    "exclusive, bonus, packed, reversed": dict(
        bonus=True, inclusive=False, segments=True, reverse=True
    ),
    "grouped, normalized": dict(H=4, Hk=2, Hv=1, normalize=True),
}


def results(inputs, segment_ids, weights, **options):
    def loss(inputs):
        o, state = linear_scan(
            **inputs, segment_ids=segment_ids, return_final_state=True, **options
        )
        return (o.astype(state.dtype) * weights[0]).sum() + (state * weights[1]).sum(), {
            "o": o,
            "final": state,
        }

    gradients, outputs = jax.grad(loss, has_aux=True)(inputs)
    return outputs | gradients


def compare(dtype: str, T: int, K: int, V: int, rank: int, decay: str, options: dict) -> None:
    options = dict(options)
    made = {n: options.pop(n) for n in ("H", "Hk", "Hv", "bonus") if n in options}
    normalize = options.get("normalize", False)
    x = make(B=2, T=T, K=K, V=V, rank=rank, decay=decay, normalize=normalize, **made)
    segment_ids = (
        np.repeat(np.arange(T // 20 + 1), 20)[None, :T].repeat(2, 0)
        if options.pop("segments", False)
        else None
    )
    r = np.random.default_rng(9)
    o_shape = (2, T, x["q"].shape[2], V)
    weights = (
        np.asarray(jnp.asarray(r.normal(size=o_shape), dtype), np.float64),
        r.normal(size=x["initial_state"].shape),
    )
    low = {n: jnp.asarray(a, dtype if n in "qkv" else jnp.float32) for n, a in x.items()}
    run = partial(results, implementation="gpu", interpret=INTERPRET, **options)
    got = jax.jit(run)(low, segment_ids, tuple(map(jnp.float32, weights)))
    with jax.enable_x64(True):
        high = {n: jnp.asarray(np.asarray(a, np.float64)) for n, a in low.items()}
        want = jax.jit(partial(results, implementation="reference", **options))(
            high, segment_ids, weights
        )
    errors = {n: rel_rms(got[n], want[n]) for n in want}
    assert max(errors.values()) <= TOLERANCE[dtype], errors


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rank", [0, 3, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_and_gradients(dtype, rank, options):
    if INTERPRET and (dtype, rank) != ("float32", 4):
        pytest.skip("one case of each kind when interpreted")
    compare(dtype, 100, 64, 64, rank, "mixture", OPTIONS[options])


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_decay(dtype, decay):
    if INTERPRET:
        pytest.skip("tests/kernels_pallas/linear_scan/test_linear_scan_gpu.py has these")
    compare(dtype, 1000, 128, 128, 4, decay, {})


@pytest.mark.parametrize("K, V", [(32, 512), (256, 512), (96, 80), (512, 32)])
def test_sizes_of_heads(K, V):
    if INTERPRET:
        pytest.skip("large")
    compare("bfloat16", 200, K, V, 4, "gla", {})


@pytest.mark.parametrize("T", [65, 128, 129, 150])
@pytest.mark.parametrize("rank", [0, 3, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_lengths_that_cross_into_another_chunk(dtype, rank, T):
    """By one token, and a third one; chunks have 64. K and V of two blocks and a part."""
    if INTERPRET and (dtype, rank, T) != ("float32", 4, 65):
        pytest.skip("one case when interpreted")
    compare(dtype, T, 144, 80, rank, "gla", {})


@pytest.mark.parametrize("rank", [3, 4])
def test_segments_of_the_sequence_side_by_side(rank, monkeypatch):
    monkeypatch.setattr(gpu_tuning, "segments", lambda *_: 4)
    compare("float32", 120 if INTERPRET else 2000, 64, 64, rank, "gla", {})


@pytest.mark.parametrize("rank", [0, 1, 3, 4])
def test_a_decoding_step(rank):
    """Through jax-triton where it is installed: dispatch says which ran."""
    x = {
        n: jnp.asarray(a, jnp.float32)
        for n, a in make(B=3, T=1, H=4, Hk=2, K=96, V=80, rank=rank).items()
    }
    state = x.pop("initial_state")
    x = {n: a[:, 0] if a.ndim > 1 else a for n, a in x.items()}
    got, want = (linear_scan_step(**x, state=state, implementation=i) for i in (None, "reference"))
    print(dispatch.last_choice("linear_scan_step"))
    assert max(rel_rms(a, b) for a, b in zip(got, want)) <= 1e-5
