"""The project's ops as compilable cases: from a shape string to a function and its abstract
arguments.
"""

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention.api import attention
from kernels_pallas.expert_mlp.api import expert_mlp
from kernels_pallas.grouped_matmul.api import grouped_matmul
from kernels_pallas.linear_scan.api import linear_scan


@dataclasses.dataclass(frozen=True)
class Case:
    """An op's forward pass. Every float argument is differentiated in the backward case."""

    forward: Callable
    args: tuple[jax.ShapeDtypeStruct, ...]
    concrete: dict[int, np.ndarray]  # arguments whose values steer a kernel

    def backward(self) -> Callable:
        """Forward and backward as one program, as in training: the output's cotangent is its own
        last argument.
        """
        floats = [i for i, a in enumerate(self.args) if jnp.issubdtype(a.dtype, jnp.floating)]

        def both(*args):
            *args, cotangent = args
            chosen = [args[i] for i in floats]
            fill = lambda *new: [
                new[floats.index(i)] if i in floats else a for i, a in enumerate(args)
            ]
            out, gradient = jax.vjp(lambda *new: self.forward(*fill(*new)), *chosen)
            return out, gradient(cotangent)

        return both

    def backward_args(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return (*self.args, jax.eval_shape(self.forward, *self.args))


def linear_scan_case(sizes: dict[str, int], dtype, options: dict[str, str]) -> Case:
    """Axes B T H K V, and Hk, Hv where heads are grouped; decay = vector (float32), scalar,
    constant or none.

    Arrays come and go as [B, T, H K], as a projection's matmul has them: a program whose arguments
    are [B, T, H, K] would spend half its time on copies from that layout, which in a model does not
    exist.
    """
    B, T, H, K, V = (sizes[a] for a in ("B", "T", "H", "K", "V"))
    shapes = {"vector": (B, T, H, K), "scalar": (B, T, H), "constant": (H,), "none": None}
    decay = _one_of(options, "decay", "vector", shapes)
    keys, values = sizes.get("Hk", H), sizes.get("Hv", H)
    args = [
        _array(dtype, B, T, H * K),
        _array(dtype, B, T, keys * K),
        _array(dtype, B, T, values * V),
    ]
    if decay != "none":
        args.append(_array(jnp.float32, *((B, T, H * K) if decay == "vector" else shapes[decay])))

    def forward(q, k, v, log_decay=None):
        heads = [x.reshape(B, T, -1, size) for x, size in ((q, K), (k, K), (v, V))]
        log_decay = None if log_decay is None else log_decay.reshape(shapes[decay])
        return linear_scan(*heads, log_decay, implementation=options.get("implementation")).reshape(
            B, T, -1
        )

    return Case(forward, tuple(args), {})


def attention_case(sizes: dict[str, int], dtype, options: dict[str, str]) -> Case:
    """Axes B T H D, and Hk where heads are grouped; causal unless causal = no.

    gate = none, head or element; window = a number; normalizer = a name; segments = yes; arrays as
    for linear_scan.
    """
    B, T, H, D = (sizes[a] for a in ("B", "T", "H", "D"))
    gate = _one_of(options, "gate", "none", {"none": None, "head": 1, "element": D})
    yes = lambda name, default: _one_of(options, name, default, ("yes", "no")) == "yes"
    keys = sizes.get("Hk", H)
    args = [
        _array(dtype, B, T, H * D),
        _array(dtype, B, T, keys * D),
        _array(dtype, B, T, keys * D),
    ]
    args += [] if gate == "none" else [_array(dtype, B, T, H * (1 if gate == "head" else D))]
    args += [_array(jnp.int32, B, T)] if (segments := yes("segments", "no")) else []
    window = options.get("window")
    if window is not None and not window.isdecimal():
        raise ValueError(f"window: got {window!r}, expected a number of tokens")
    fixed = dict(
        window=window and int(window),
        implementation=options.get("implementation"),
        causal=yes("causal", "yes"),
    )
    fixed["normalizer"] = options.get("normalizer", "softmax")

    def forward(q, k, v, *others):
        others = list(others)
        heads = [x.reshape(B, T, -1, D) for x in (q, k, v)]
        gates = None if gate == "none" else others.pop(0).reshape(B, T, H, -1)
        ids = others.pop(0) if segments else None
        return attention(*heads, gate_logits=gates, segment_ids=ids, **fixed).reshape(B, T, -1)

    return Case(forward, tuple(args), {})


def _groups(rows: int, G: int, options: dict[str, str]) -> np.ndarray:
    """sizes = equal (as far as G divides the rows) or zipf: the i-th group has 1 / i of the first
    one's rows.
    """
    if _one_of(options, "sizes", "equal", ("equal", "zipf")) == "equal":
        return np.full(G, rows // G, np.int32) + (np.arange(G) < rows % G).astype(np.int32)
    share = 1 / np.arange(1, G + 1)
    groups = np.floor(rows * share / share.sum()).astype(np.int32)
    groups[0] += rows - groups.sum()
    return groups


def expert_mlp_case(sizes: dict[str, int], dtype, options: dict[str, str]) -> Case:
    """Axes R M F G; sizes = equal or zipf; weights = yes for a router's, float32."""
    R, M, F, G = (sizes[a] for a in ("R", "M", "F", "G"))
    stack = _array(dtype, G, M, F)
    args = (_array(dtype, R, M), stack, stack, _array(dtype, G, F, M), _array(jnp.int32, G))
    if _one_of(options, "weights", "no", ("yes", "no")) == "yes":
        args += (_array(jnp.float32, R),)
    call = lambda *a: expert_mlp(*a, implementation=options.get("implementation"))
    return Case(call, args, {4: _groups(R, G, options)})


def grouped_matmul_case(sizes: dict[str, int], dtype, options: dict[str, str]) -> Case:
    """Axes M K N G; sizes = equal or zipf."""
    M, K, N, G = (sizes[a] for a in ("M", "K", "N", "G"))
    groups = _groups(M, G, options)
    args = (_array(dtype, M, K), _array(dtype, G, K, N), _array(jnp.int32, G))
    return Case(
        lambda *a: grouped_matmul(*a, implementation=options.get("implementation")),
        args,
        {2: groups},
    )


# Op -> its case, and the axes that a shape must give.
CASES = {
    "linear_scan": (linear_scan_case, ("B", "T", "H", "K", "V"), ("Hk", "Hv"), {"decay"}),
    "attention": (
        attention_case,
        ("B", "T", "H", "D"),
        ("Hk",),
        {"gate", "window", "normalizer", "causal", "segments"},
    ),
    "grouped_matmul": (grouped_matmul_case, ("M", "K", "N", "G"), (), {"sizes"}),
    "expert_mlp": (expert_mlp_case, ("R", "M", "F", "G"), (), {"sizes", "weights"}),
}


def make_case(op: str, shape: str, dtype: str, options: dict[str, str]) -> Case:
    """The case of an op, from texts such as "B4,T4096,H16,K128,V128" and {"decay": "scalar"}.

    Raises:
      ValueError: an unknown op, axis, dtype or option, by name.
    """
    if op not in CASES:
        raise ValueError(f"op: got {op!r}, expected one of {', '.join(CASES)}")
    build, required, optional, known = CASES[op]
    sizes = {}
    for part in shape.split(","):
        match = re.fullmatch(r"([A-Z][a-z]?)(\d+)", part.strip())
        if not match or match[1] not in (*required, *optional):
            expected = f"{','.join(f'{a}<size>' for a in required)}" + "".join(
                f"[,{a}<size>]" for a in optional
            )
            raise ValueError(f"shape: got {part!r}, expected {expected} for {op}")
        sizes[match[1]] = int(match[2])
    if missing := [a for a in required if a not in sizes]:
        raise ValueError(f"shape: got {shape!r}, which lacks {', '.join(missing)}")
    if unknown := options.keys() - known - {"implementation"}:
        raise ValueError(
            f"set: got {min(unknown)!r}, expected one of {', '.join(sorted(known)) or 'nothing'} for {op}"
        )
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"dtype: got {dtype!r}, expected bfloat16, float16 or float32")
    return build(sizes, jnp.dtype(dtype), options)


def _array(dtype, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _one_of(options: dict[str, str], name: str, default: str, choices) -> str:
    value = options.get(name, default)
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(choices)}")
    return value
