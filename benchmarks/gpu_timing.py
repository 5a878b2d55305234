"""What the GPU benchmarks share: inputs of a shape, and the median time of a call on the device."""

import re
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

CALLS = 5  # in a sample, so that one launch's latency is no part of the figure


def sizes(shape: str) -> dict[str, int]:
    """ "B4,T4096" -> {"B": 4, "T": 4096}."""
    return {name: int(size) for name, size in re.findall(r"([A-Z])(\d+)", shape)}


def inputs(shape: str, decay: str, dtype=jnp.bfloat16) -> tuple[Array, Array, Array, Array | None]:
    """q, k, v [B, T, H, D] and log decays of GLA's size, float32: None, [B, T, H] or [B, T, H,
    K].
    """
    B, T, H, K, V = (sizes(shape)[a] for a in "BTHKV")
    r = np.random.default_rng(0)
    normal = lambda *s: jnp.asarray(r.standard_normal(s, np.float32), dtype)
    decays = {"vector": (B, T, H, K), "scalar": (B, T, H), "none": None}[decay]
    logs = None if decays is None else jax.nn.log_sigmoid(normal(*decays).astype(jnp.float32)) / 16
    return normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V), logs


def median_seconds(fn: Callable, *args, samples: int = 20, calls: int = CALLS) -> float:
    """Of one call, after two to warm up."""
    for _ in range(2):
        jax.block_until_ready(fn(*args))
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(calls):
            result = fn(*args)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def device() -> str:
    """As jax names it."""
    return jax.devices()[0].device_kind
