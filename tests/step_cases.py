"""Inputs of attention_step's tests, and how far a kernel is from the reference; for TPU and GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from attention_cases import BY_HEAD
from helpers import rel_rms

from kernels_pallas.attention import NORMALIZERS, attention_step

S = 300
ONE_PASS = {
    name: normalizer.for_length(S)
    for name, normalizer in NORMALIZERS.items()
    if normalizer.passes == 1 and not normalizer.parameters
}


def draw_step(B, H, Hk, K, V, gate=None, slopes=False, sinks=False, slots=S):
    """(arrays, valid [B, slots] of numpy, distances); of the last row nothing is valid."""
    rng = np.random.default_rng(0)
    shapes = dict(q=(B, H, K), k_cache=(B, slots, Hk, K), v_cache=(B, slots, Hk, V))
    if gate:
        shapes["gate_logits"] = (B, H, 1 if gate == "head-wise" else V)
    shapes |= {"alibi_slopes": (H,)} if slopes else {}
    shapes |= {"sink_logits": (H,)} if sinks else {}
    valid = rng.random((B, slots)) < 0.7
    valid[-1] = False
    arrays = {
        n: rng.normal(size=s) * (0.01 if n == "alibi_slopes" else 1) for n, s in shapes.items()
    }
    distances = jnp.asarray(rng.permuted(np.arange(slots))[None].repeat(B, 0)) if slopes else None
    return arrays, valid, distances


def run(arrays, valid, distances, **options):
    q, k, v = (arrays[n] for n in ("q", "k_cache", "v_cache"))
    rest = {n: x for n, x in arrays.items() if n not in ("q", "k_cache", "v_cache")}
    return attention_step(q, k, v, valid=valid, distances=distances, **rest, **options)


def cast(arrays, dtype):
    return {n: jnp.asarray(x, jnp.float32 if n in BY_HEAD else dtype) for n, x in arrays.items()}


def error_of(implementation, drawn, dtype, normalizer) -> float:
    """Of the kernel against the reference in float64."""
    arrays, *masks = drawn
    arrays, options = cast(arrays, dtype), dict(normalizer=ONE_PASS[normalizer])
    kernel = partial(run, implementation=implementation, interpret=True, **options)
    got = jax.jit(kernel)(arrays, *masks)
    with jax.enable_x64(True):
        exact = {n: jnp.asarray(np.asarray(x, np.float64)) for n, x in arrays.items()}
        want = np.asarray(run(exact, *masks, implementation="reference", **options))
    assert not np.asarray(got[-1], np.float32).any(), "a token that sees nothing"
    return rel_rms(got, want)
