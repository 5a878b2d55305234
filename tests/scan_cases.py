"""linear_scan in tests: inputs of every kind of decay, and the comparison of a path with the
float64 recurrence.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from helpers import rel_rms

from kernels_pallas.ops import linear_scan

F32, BF16 = 2e-6, 2e-3
OPTIONS = (
    "inclusive",
    "scale",
    "reverse",
    "normalize",
    "chunk_size",
    "implementation",
    "interpret",
)
DECAYS = {
    "near zero": lambda r, s: -1e-6 * r.exponential(size=s),
    "gla": lambda r, s: -np.logaddexp(0, -r.normal(size=s)) / 16,
    "heavy tail": lambda r, s: np.maximum(-np.abs(r.standard_cauchy(size=s)), -50.0),
    "-1e4": lambda r, s: np.full(s, -1e4),
    "mixture": lambda r, s: np.where(
        r.random(s) < 0.05, -1e4, np.where(r.random(s) < 0.3, 0.0, -r.random(s) / 8)
    ),
}


def make(
    seed=0,
    *,
    B=2,
    T=40,
    H=2,
    Hk=None,
    Hv=None,
    K=4,
    V=3,
    rank=4,
    decay="gla",
    bonus=False,
    normalize=False,
):
    """Float64 inputs. The initial state is large, so that a lost state or a wrong decay of it
    cannot hide.
    """
    r = np.random.default_rng(seed)
    x = {
        "q": r.normal(size=(B, T, H, K)),
        "k": r.normal(size=(B, T, Hk or H, K)),
        "v": r.normal(size=(B, T, Hv or H, V)),
    }
    if normalize:  # positive features: the denominator is no small difference
        x["q"], x["k"] = np.abs(x["q"]), np.abs(x["k"])
    if rank:
        x["log_decay"] = DECAYS[decay](r, {1: (H,), 3: (B, T, H), 4: (B, T, H, K)}[rank])
    if bonus:
        x["bonus"] = r.normal(size=(H, K))
    x["initial_state"] = 2 * np.abs(r.normal(size=(B, H, K, V + normalize)))
    return x


# Level 0 halves the time that XLA compiles for, which is most of the time of these tests.
fast_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@partial(fast_jit, static_argnames=(*OPTIONS, "trace"))
def outputs_and_gradients(inputs, segment_ids, weights, trace=None, **options):
    """o, the final state, and the gradient of a random weighting of both with respect to every
    input.
    """

    def loss(inputs):
        o, state = linear_scan(
            **inputs, segment_ids=segment_ids, return_final_state=True, **options
        )
        total = (o.astype(state.dtype) * weights[0]).sum() + (state * weights[1]).sum()
        return total, {"o": o, "final_state": state}

    gradients, outputs = jax.grad(loss, has_aux=True)(inputs)
    return outputs | gradients


def compare(
    inputs,
    *,
    dtype=jnp.float32,
    tolerance=F32,
    segment_ids=None,
    chunk_size=4,
    trace=None,
    implementation="xla",
    **options,
):
    """A path in `dtype` against the recurrence in float64 on the same rounded inputs. Returns the
    path's results.
    """
    r = np.random.default_rng(99)
    B, T, H, V = *inputs["q"].shape[:3], inputs["v"].shape[-1]
    weights = r.normal(size=(B, T, H, V)), r.normal(size=inputs["initial_state"].shape)
    # o's cotangent reaches the op in o's dtype: rounding it is not the op's error.
    weights = np.asarray(jnp.asarray(weights[0], dtype), np.float64), weights[1]
    low = {n: jnp.asarray(x, dtype if n in "qkv" else jnp.float32) for n, x in inputs.items()}
    got = outputs_and_gradients(
        low,
        segment_ids,
        tuple(map(jnp.float32, weights)),
        chunk_size=chunk_size,
        implementation=implementation,
        interpret=implementation != "xla",
        trace=trace,
        **options,
    )
    with jax.enable_x64(True):
        high = {n: jnp.asarray(np.asarray(x, np.float64)) for n, x in low.items()}
        want = outputs_and_gradients(
            high, segment_ids, weights, implementation="reference", **options
        )
    assert got["o"].dtype == dtype and got["final_state"].dtype == jnp.float32
    errors = {name: rel_rms(got[name], want[name]) for name in want}
    assert max(errors.values()) <= tolerance, errors
    return got


# Segments of length 1, a boundary on a chunk's start and inside one, an id that returns, a row that
# ends in padding.
SEGMENTS = np.array([[0] * 1 + [1] * 1 + [2] * 14 + [0] * 1 + [1] * 23, [5] * 30 + [-1] * 10])

CASES = {
    "segments": dict(segments=True),
    "scalar segments": dict(rank=3, segments=True),
    "undecayed segments, reverse": dict(rank=0, segments=True, reverse=True),
    "undecayed, exclusive": dict(rank=0, inclusive=False),
    "reverse, exclusive, segments": dict(
        reverse=True, inclusive=False, bonus=True, segments=True, scale=0.7
    ),
    "grouped, normalize": dict(H=4, Hk=2, Hv=1, normalize=True, segments=True),
    "constant, grouped, exclusive": dict(H=4, Hk=1, Hv=4, rank=1, inclusive=False, bonus=True),
    "scalar, normalize, reverse": dict(rank=3, normalize=True, reverse=True),
}
MAKE_KEYS = ("H", "Hk", "Hv", "rank", "bonus", "normalize")


def total(x, **options):
    o, state = linear_scan(**x, return_final_state=True, **options)
    return (o**2).sum() + (state * jnp.cos(jnp.arange(state.size).reshape(state.shape))).sum()
