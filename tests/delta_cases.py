"""delta_scan in tests: inputs of every kind of decay and key, and the comparison of a path with the
float64 recurrence.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from helpers import rel_rms

from kernels_pallas.ops import delta_scan

# Keys of mean cosine 0.5 to 0.9, without decay and with beta 1, cost bfloat16 more.
F32, BF16, BF16_CORRELATED = 2e-6, 5e-3, 2e-2
STATIC = ("scale", "l2_norm", "chunk_size", "implementation", "interpret")
MIXED = [0.1, 0.1, 0.1, 0.3, 0.4]
DECAYS = {
    "near zero": lambda r, s: -1e-6 * r.exponential(size=s),
    "gla": lambda r, s: -np.logaddexp(0, -r.normal(size=s)) / 16,
    "strong": lambda r, s: -40 * r.random(s),
    "-1e4": lambda r, s: np.full(s, -1e4),
    "mixture": lambda r, s: r.choice([-np.inf, -1e4, -50.0, 0.0, -0.05], p=MIXED, size=s),
}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make(
    seed=0,
    *,
    B=2,
    T=40,
    H=2,
    Hq=None,
    Hk=None,
    K=8,
    V=5,
    rank=4,
    decay="gla",
    cosine=0.0,
    beta=1.0,
    rule="beta",
):
    """Float64 inputs with keys of length one.

    `cosine` is the mean cosine of two keys (1: all keys are equal); beta is uniform up to `beta`,
    or all equal to it if it is 2. The initial state is large, so that a lost state or a wrong decay
    of it cannot hide.
    """
    r = np.random.default_rng(seed)
    common = unit(r.normal(size=K))
    own = unit(r.normal(size=(B, T, Hk or H, K)))
    x = {
        "q": r.normal(size=(B, T, Hq or H, K)),
        "k": unit(np.sqrt(cosine) * common + np.sqrt(1 - cosine) * own),
        "v": r.normal(size=(B, T, H, V)),
    }
    strength = np.full((B, T, H), 2.0) if beta == 2 else beta * r.random((B, T, H))
    keys = np.repeat(x["k"], H // x["k"].shape[2], axis=2)
    if rule in ("beta", "comba"):
        x["beta"] = strength
    if rule == "comba":
        x["erase"] = 0.5 * strength[..., None] * keys
    if rule == "channels":
        x["erase"] = r.random((B, T, H, K)) * keys
        x["write"] = r.random((B, T, H, V))
    if rank:
        x["log_decay"] = DECAYS[decay](r, {3: (B, T, H), 4: (B, T, H, K)}[rank])
    x["initial_state"] = 2 * np.abs(r.normal(size=(B, H, K, V)))
    return x


# Level 0 halves the time that XLA compiles for, which is most of the time of these tests.
fast_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@partial(fast_jit, static_argnames=STATIC)
def outputs_and_gradients(inputs, segment_ids, weights, **options):
    """o, the final state, and the gradient of a random weighting of both with respect to every
    input.
    """

    def loss(inputs):
        o, state = delta_scan(**inputs, segment_ids=segment_ids, return_final_state=True, **options)
        total = (o.astype(state.dtype) * weights[0]).sum() + (state * weights[1]).sum()
        return total, {"o": o, "final_state": state}

    gradients, outputs = jax.grad(loss, has_aux=True)(inputs)
    return outputs | gradients


def weights_for(inputs, dtype=jnp.float32):
    """A random cotangent of o, rounded as o is, and one of the final state."""
    r = np.random.default_rng(99)
    B, T = inputs["q"].shape[:2]
    H, V = inputs["v"].shape[2:]
    of_o = np.asarray(jnp.asarray(r.normal(size=(B, T, H, V)), dtype), np.float64)
    return of_o, r.normal(size=inputs["initial_state"].shape)


def compare(
    inputs,
    *,
    dtype=jnp.float32,
    tolerance=F32,
    segment_ids=None,
    chunk_size=8,
    implementation="xla",
    **options,
):
    """A path in `dtype` against the recurrence in float64 on the same rounded inputs. Returns the
    path's results.
    """
    weights = weights_for(inputs, dtype)
    low = {n: jnp.asarray(x, dtype if n in "qkv" else jnp.float32) for n, x in inputs.items()}
    got = outputs_and_gradients(
        low,
        segment_ids,
        tuple(map(jnp.float32, weights)),
        chunk_size=chunk_size,
        implementation=implementation,
        interpret=implementation not in ("xla", "reference"),
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

# Cases of equal shapes and options are one compiled program.
CASES = {
    "DeltaNet": dict(rank=0),
    "DeltaNet, segments": dict(rank=0, segments=True),
    "Gated DeltaNet": dict(rank=3),
    "Gated DeltaNet, segments, grouped": dict(rank=3, segments=True, H=4, Hq=2, Hk=2),
    "KDA": dict(),
    "KDA, segments": dict(segments=True),
    "KDA, mixture of decays": dict(decay="mixture", segments=True),
    "KDA, strong decays": dict(decay="strong", segments=True),
    "scalar, mixture of decays": dict(rank=3, decay="mixture", segments=True),
    "decays of -1e4": dict(decay="-1e4", segments=True),
    "near zero": dict(decay="near zero", segments=True),
    "Gated DeltaNet-2": dict(rule="channels", segments=True),
    "Comba": dict(rule="comba", rank=3),
    "negative eigenvalues": dict(rank=3, beta=1.99, segments=True),
    "correlated keys": dict(rank=0, cosine=0.7, segments=True),
    "l2 norm, scale": dict(rank=3, l2_norm=True, scale=0.7),
    "grouped keys": dict(H=4, Hq=2, Hk=1),
}
MAKE_KEYS = ("H", "Hq", "Hk", "rank", "decay", "cosine", "beta", "rule")


def case_of(name, **sizes):
    """The inputs of a case, and the options of `compare`."""
    case = dict(CASES[name])
    inputs = make(**sizes, **{n: case.pop(n) for n in MAKE_KEYS if n in case})
    if case.pop("segments", False):
        case["segment_ids"] = SEGMENTS
    return inputs, case
