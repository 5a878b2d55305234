"""The project's ops as compilable cases: from a shape string to a function and its abstract
arguments.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention.api import attention
from kernels_pallas.delta_scan.api import delta_scan
from kernels_pallas.dispatch import Implementation
from kernels_pallas.expert_mlp.api import expert_mlp
from kernels_pallas.grouped_matmul.api import grouped_matmul
from kernels_pallas.linear_scan.api import linear_scan

DTYPES = ("bfloat16", "float16", "float32")


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
        differentiated = [i for i, a in enumerate(self.args) if _is_float(a)]

        def forward_and_backward(*args_and_cotangent):
            *args, cotangent = args_and_cotangent

            def of_floats(*floats):
                """The op as a function of its float arguments only."""
                all_args = list(args)
                for i, value in zip(differentiated, floats):
                    all_args[i] = value
                return self.forward(*all_args)

            out, vjp = jax.vjp(of_floats, *[args[i] for i in differentiated])
            return out, vjp(cotangent)

        return forward_and_backward

    def backward_args(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        cotangent = jax.eval_shape(self.forward, *self.args)
        return (*self.args, cotangent)


def _is_float(a: jax.ShapeDtypeStruct) -> bool:
    return jnp.issubdtype(a.dtype, jnp.floating)


def linear_scan_case(sizes: dict[str, int], dtype: jnp.dtype, options: dict[str, str]) -> Case:
    """Axes B T H K V, and Hk, Hv where heads are grouped; decay = vector (float32), scalar,
    constant or none.

    Arrays come and go as [B, T, H K], as a projection's matmul has them: a program whose arguments
    are [B, T, H, K] would spend half its time on copies from that layout, which in a model does not
    exist.
    """
    B, T, H, K, V = (sizes[axis] for axis in ("B", "T", "H", "K", "V"))
    Hk = sizes.get("Hk", H)
    Hv = sizes.get("Hv", H)
    decay_shapes = {
        "vector": (B, T, H, K),
        "scalar": (B, T, H),
        "constant": (H,),
        "none": (),
    }
    decay = _one_of(options, "decay", "vector", decay_shapes)
    args = [
        _array(dtype, B, T, H * K),
        _array(dtype, B, T, Hk * K),
        _array(dtype, B, T, Hv * V),
    ]
    if decay == "vector":
        args.append(_array(jnp.float32, B, T, H * K))
    elif decay != "none":
        args.append(_array(jnp.float32, *decay_shapes[decay]))

    def forward(q, k, v, log_decay=None):
        if log_decay is not None:
            log_decay = log_decay.reshape(decay_shapes[decay])
        o = linear_scan(
            q.reshape(B, T, H, K),
            k.reshape(B, T, Hk, K),
            v.reshape(B, T, Hv, V),
            log_decay,
            implementation=_implementation(options),
        )
        assert isinstance(o, jax.Array)  # without a final state
        return o.reshape(B, T, H * V)

    return Case(forward, tuple(args), {})


def delta_scan_case(sizes: dict[str, int], dtype: jnp.dtype, options: dict[str, str]) -> Case:
    """Axes B T H K V, and Hq, Hk where heads are grouped; decay = vector (float32), scalar or none;
    l2 = yes for keys and queries of length one; arrays as for linear_scan.
    """
    B, T, H, K, V = (sizes[axis] for axis in ("B", "T", "H", "K", "V"))
    Hq = sizes.get("Hq", H)
    Hk = sizes.get("Hk", H)
    decay_shapes = {"vector": (B, T, H, K), "scalar": (B, T, H), "none": ()}
    decay = _one_of(options, "decay", "vector", decay_shapes)
    l2_norm = _yes(options, "l2", "no")
    args = [
        _array(dtype, B, T, Hq * K),
        _array(dtype, B, T, Hk * K),
        _array(dtype, B, T, H * V),
        _array(jnp.float32, B, T, H),
    ]
    if decay == "vector":
        args.append(_array(jnp.float32, B, T, H * K))
    elif decay == "scalar":
        args.append(_array(jnp.float32, B, T, H))

    def forward(q, k, v, beta, log_decay=None):
        if log_decay is not None:
            log_decay = log_decay.reshape(decay_shapes[decay])
        o = delta_scan(
            q.reshape(B, T, Hq, K),
            k.reshape(B, T, Hk, K),
            v.reshape(B, T, H, V),
            beta,
            log_decay,
            l2_norm=l2_norm,
            implementation=_implementation(options),
        )
        assert isinstance(o, jax.Array)  # without a final state
        return o.reshape(B, T, H * V)

    return Case(forward, tuple(args), {})


def attention_case(sizes: dict[str, int], dtype: jnp.dtype, options: dict[str, str]) -> Case:
    """Axes B T H D, and Hk where heads are grouped; causal unless causal = no.

    gate = none, head or element; window = a number; normalizer = a name; segments = yes; arrays as
    for linear_scan.
    """
    B, T, H, D = (sizes[axis] for axis in ("B", "T", "H", "D"))
    Hk = sizes.get("Hk", H)
    gate_channels = {"none": 0, "head": 1, "element": D}
    gate = _one_of(options, "gate", "none", gate_channels)
    has_gate = gate != "none"
    has_segments = _yes(options, "segments", "no")
    is_causal = _yes(options, "causal", "yes")
    window = _window(options)
    args = [
        _array(dtype, B, T, H * D),
        _array(dtype, B, T, Hk * D),
        _array(dtype, B, T, Hk * D),
    ]
    if has_gate:
        args.append(_array(dtype, B, T, H * gate_channels[gate]))
    if has_segments:
        args.append(_array(jnp.int32, B, T))

    def forward(q, k, v, *others):
        remaining = list(others)
        gate_logits = None
        if has_gate:
            gate_logits = remaining.pop(0).reshape(B, T, H, gate_channels[gate])
        segment_ids = remaining.pop(0) if has_segments else None
        o = attention(
            q.reshape(B, T, H, D),
            k.reshape(B, T, Hk, D),
            v.reshape(B, T, Hk, D),
            gate_logits=gate_logits,
            segment_ids=segment_ids,
            window=window,
            causal=is_causal,
            normalizer=options.get("normalizer", "softmax"),
            implementation=_implementation(options),
        )
        return o.reshape(B, T, H * D)

    return Case(forward, tuple(args), {})


def _window(options: dict[str, str]) -> int | None:
    text = options.get("window")
    if text is None:
        return None
    if not text.isdecimal():
        raise ValueError(f"window: got {text!r}, expected a number of tokens")
    return int(text)


def _groups(rows: int, G: int, options: dict[str, str]) -> np.ndarray:
    """sizes = equal (as far as G divides the rows) or zipf: the i-th group has 1 / i of the first
    one's rows.
    """
    kind = _one_of(options, "sizes", "equal", ("equal", "zipf"))
    if kind == "equal":
        has_one_more = np.arange(G) < rows % G
        return np.full(G, rows // G, np.int32) + has_one_more.astype(np.int32)
    weights = 1 / np.arange(1, G + 1)
    groups = np.floor(rows * weights / weights.sum()).astype(np.int32)
    groups[0] += rows - groups.sum()  # what rounding down left over
    return groups


def expert_mlp_case(sizes: dict[str, int], dtype: jnp.dtype, options: dict[str, str]) -> Case:
    """Axes R M F G; sizes = equal or zipf; weights = yes for a router's, float32."""
    R, M, F, G = (sizes[axis] for axis in ("R", "M", "F", "G"))
    args = [
        _array(dtype, R, M),
        _array(dtype, G, M, F),
        _array(dtype, G, M, F),
        _array(dtype, G, F, M),
        _array(jnp.int32, G),
    ]
    if _yes(options, "weights", "no"):
        args.append(_array(jnp.float32, R))

    def forward(*args):
        return expert_mlp(*args, implementation=_implementation(options))

    return Case(forward, tuple(args), {4: _groups(R, G, options)})


def grouped_matmul_case(sizes: dict[str, int], dtype: jnp.dtype, options: dict[str, str]) -> Case:
    """Axes M K N G; sizes = equal or zipf."""
    M, K, N, G = (sizes[axis] for axis in ("M", "K", "N", "G"))
    args = (
        _array(dtype, M, K),
        _array(dtype, G, K, N),
        _array(jnp.int32, G),
    )

    def forward(*args):
        return grouped_matmul(*args, implementation=_implementation(options))

    return Case(forward, args, {2: _groups(M, G, options)})


# Of (sizes by axis, dtype, options).
type Builder = Callable[[dict[str, int], jnp.dtype, dict[str, str]], Case]


@dataclasses.dataclass(frozen=True)
class CaseKind:
    """How an op's case is built, and what a person may say about it."""

    build: Builder
    required: tuple[str, ...]  # axes that a shape must give
    optional: tuple[str, ...]  # axes that it may give
    options: frozenset[str]


CASES: Mapping[str, CaseKind] = {
    "linear_scan": CaseKind(
        build=linear_scan_case,
        required=("B", "T", "H", "K", "V"),
        optional=("Hk", "Hv"),
        options=frozenset({"decay"}),
    ),
    "delta_scan": CaseKind(
        build=delta_scan_case,
        required=("B", "T", "H", "K", "V"),
        optional=("Hq", "Hk"),
        options=frozenset({"decay", "l2"}),
    ),
    "attention": CaseKind(
        build=attention_case,
        required=("B", "T", "H", "D"),
        optional=("Hk",),
        options=frozenset({"gate", "window", "normalizer", "causal", "segments"}),
    ),
    "grouped_matmul": CaseKind(
        build=grouped_matmul_case,
        required=("M", "K", "N", "G"),
        optional=(),
        options=frozenset({"sizes"}),
    ),
    "expert_mlp": CaseKind(
        build=expert_mlp_case,
        required=("R", "M", "F", "G"),
        optional=(),
        options=frozenset({"sizes", "weights"}),
    ),
}


def make_case(op: str, shape: str, dtype: str, options: dict[str, str]) -> Case:
    """The case of an op.

    Args:
      op: a key of `CASES`.
      shape: axes and sizes, such as "B4,T4096,H16,K128,V128".
      dtype: of the arrays, by name.
      options: such as {"decay": "scalar"}; also "implementation".

    Returns:
      The function and its abstract arguments.

    Raises:
      ValueError: an unknown op, axis, dtype or option, by name.
    """
    if op not in CASES:
        raise ValueError(f"op: got {op!r}, expected one of {', '.join(CASES)}")
    kind = CASES[op]
    sizes = _sizes(op, shape, kind)
    unknown = options.keys() - kind.options - {"implementation"}
    if unknown:
        expected = ", ".join(sorted(kind.options)) or "nothing"
        raise ValueError(f"set: got {min(unknown)!r}, expected one of {expected} for {op}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected bfloat16, float16 or float32")
    return kind.build(sizes, jnp.dtype(dtype), options)


def _sizes(op: str, shape: str, kind: CaseKind) -> dict[str, int]:
    """By axis; refuses axes that the op does not have and shapes that lack one."""
    sizes = {}
    for part in shape.split(","):
        match = re.fullmatch(r"([A-Z][a-z]?)(\d+)", part.strip())
        if match is None or match[1] not in (*kind.required, *kind.optional):
            required = ",".join(f"{axis}<size>" for axis in kind.required)
            optional = "".join(f"[,{axis}<size>]" for axis in kind.optional)
            raise ValueError(f"shape: got {part!r}, expected {required}{optional} for {op}")
        sizes[match[1]] = int(match[2])
    missing = [axis for axis in kind.required if axis not in sizes]
    if missing:
        raise ValueError(f"shape: got {shape!r}, which lacks {', '.join(missing)}")
    return sizes


def _array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _one_of(options: dict[str, str], name: str, default: str, choices: Iterable[str]) -> str:
    """The option's value, if it is one of the choices."""
    allowed = tuple(choices)
    value = options.get(name, default)
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(allowed)}")
    return value


def _implementation(options: dict[str, str]) -> Implementation | None:
    """As a person wrote it: the op itself refuses a name that it does not know."""
    return cast(Implementation | None, options.get("implementation"))


def _yes(options: dict[str, str], name: str, default: str) -> bool:
    return _one_of(options, name, default, ("yes", "no")) == "yes"
