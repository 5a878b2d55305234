"""Random inputs of a numeric case, and the call of its op."""

import zlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.gpu.numeric_cases import (
    ATTENTION,
    ATTENTION_STEP,
    DELTA,
    EXPERT,
    GROUPED,
    SCAN,
    SCAN_STEP,
    NumericCase,
)
from kernels_pallas.ops import (
    NORMALIZERS,
    attention,
    attention_step,
    delta_scan,
    expert_mlp,
    grouped_matmul,
    linear_scan,
    linear_scan_step,
)

# A log decay that forgets everything, and how often it comes.
STRONGEST_DECAY = -1e4
STRONGEST_FRACTION = 0.02
# Rows beyond the groups, which belong to none.
SPARE_ROWS = 3

Arrays = dict[str, Array]


class Drawn(NamedTuple):
    """Inputs of a call.

    Attributes:
      inputs: float64, each a number that the type of its operand has exactly.
      call: (inputs, **how) -> results by name; `how` is implementation and interpret.
      operands: the inputs in the case's type; the others are float32.
    """

    inputs: dict[str, np.ndarray]
    call: Callable[..., Arrays]
    operands: tuple[str, ...]


class Source:
    """Draws numbers that a type has exactly, as float64."""

    def __init__(self, case: NumericCase):
        identity = (case.op, case.dtype, case.sizes, case.options)
        self.random = np.random.default_rng(zlib.crc32(repr(identity).encode()))
        self._dtype = case.dtype

    def operand(self, values: np.ndarray) -> np.ndarray:
        """Rounded to the case's type."""
        return np.asarray(jnp.asarray(values, self._dtype), np.float64)

    def normal(self, *shape: int) -> np.ndarray:
        """Operands."""
        return self.operand(self.random.standard_normal(shape))

    def single(self, values: np.ndarray) -> np.ndarray:
        """Rounded to float32."""
        return np.asarray(np.asarray(values, np.float32), np.float64)

    def segment_ids(self, rows: int, length: int, segments: int) -> np.ndarray:
        """[B, T], ascending."""
        ids = self.random.integers(0, segments, (rows, length))
        return np.sort(ids, axis=1).astype(np.int32)


def draw(case: NumericCase) -> Drawn:
    """The same for the same case."""
    functions = {
        SCAN: draw_scan,
        SCAN_STEP: draw_scan_step,
        DELTA: draw_delta,
        ATTENTION: draw_attention,
        ATTENTION_STEP: draw_attention_step,
        GROUPED: draw_grouped,
        EXPERT: draw_expert,
    }
    return functions[case.op](case, Source(case))


def draw_scan(case: NumericCase, source: Source) -> Drawn:
    """With an initial state; some decays forget everything."""
    B, T, H, K, V = case.sizes
    options = case.options
    inputs = {
        "q": source.normal(B, T, H, K),
        "k": source.normal(B, T, H, K),
        "v": source.normal(B, T, H, V),
        "state": source.single(source.random.standard_normal((B, H, K, V))),
    }
    if options["rank"]:
        inputs["log_decay"] = _log_decays(case, source)
    if options.get("bonus"):
        inputs["bonus"] = source.single(source.random.standard_normal((H, K)))
    segment_ids = source.segment_ids(B, T, 4) if options.get("segments") else None

    def call(x: Arrays, **how) -> Arrays:
        out, state = linear_scan(
            x["q"],
            x["k"],
            x["v"],
            x.get("log_decay"),
            bonus=x.get("bonus"),
            inclusive=options.get("inclusive", True),
            initial_state=x["state"],
            segment_ids=segment_ids,
            reverse=options.get("reverse", False),
            return_final_state=True,
            **how,
        )
        return {"out": out, "final_state": state}

    return Drawn(inputs, call, ("q", "k", "v"))


def draw_scan_step(case: NumericCase, source: Source) -> Drawn:
    B, H, K, V = case.sizes
    decays = -np.abs(source.random.standard_normal((B, H, K)))
    inputs = {
        "q": source.normal(B, H, K),
        "k": source.normal(B, H, K),
        "v": source.normal(B, H, V),
        "state": source.single(source.random.standard_normal((B, H, K, V))),
        "log_decay": source.single(decays),
    }

    def call(x: Arrays, **how) -> Arrays:
        out, state = linear_scan_step(
            x["q"],
            x["k"],
            x["v"],
            x["state"],
            x["log_decay"],
            **how,
        )
        return {"out": out, "new_state": state}

    return Drawn(inputs, call, ("q", "k", "v"))


def _log_decays(case: NumericCase, source: Source) -> np.ndarray:
    """[B, T, H, K], or [B, T, H] where the rank is 3; some forget everything."""
    B, T, H, K, _ = case.sizes
    shape = (B, T, H, K) if case.options["rank"] == 4 else (B, T, H)
    strongest = source.random.random(shape) < STRONGEST_FRACTION
    # log sigmoid(x) / 16, of GLA's size.
    usual = -np.logaddexp(0, -source.random.standard_normal(shape)) / 16
    return source.single(np.where(strongest, STRONGEST_DECAY, usual))


def draw_delta(case: NumericCase, source: Source) -> Drawn:
    """With an initial state; keys and queries are given any length, and divided by it."""
    B, T, H, K, V = case.sizes
    options = case.options
    inputs = {
        "q": source.normal(B, T, H, K),
        "k": source.normal(B, T, options.get("Hk", H), K),
        "v": source.normal(B, T, H, V),
        "beta": source.single(options.get("beta", 1.0) * source.random.random((B, T, H))),
        "state": source.single(source.random.standard_normal((B, H, K, V))),
    }
    if options["rank"]:
        inputs["log_decay"] = _log_decays(case, source)
    segment_ids = source.segment_ids(B, T, 4) if options.get("segments") else None

    def call(x: Arrays, **how) -> Arrays:
        out, state = delta_scan(
            x["q"],
            x["k"],
            x["v"],
            x["beta"],
            x.get("log_decay"),
            initial_state=x["state"],
            segment_ids=segment_ids,
            l2_norm=True,
            return_final_state=True,
            **how,
        )
        return {"out": out, "final_state": state}

    return Drawn(inputs, call, ("q", "k", "v"))


def draw_attention(case: NumericCase, source: Source) -> Drawn:
    B, T, H, Hk, D = case.sizes
    options = case.options
    inputs = {
        "q": source.normal(B, T, H, D),
        "k": source.normal(B, T, Hk, D),
        "v": source.normal(B, T, Hk, D),
    }
    operands = ["q", "k", "v"]
    if options.get("gate"):
        gates = D if options["gate"] == "element" else 1
        inputs["gate_logits"] = source.normal(B, T, H, gates)
        operands.append("gate_logits")
    if options.get("sinks"):
        inputs["sink_logits"] = source.single(source.random.standard_normal(H))
    if options.get("slopes"):
        inputs["alibi_slopes"] = source.single(source.random.random(H))
    segment_ids = source.segment_ids(B, T, 3) if options.get("segments") else None
    # Some depend on the number of keys.
    normalizer = NORMALIZERS[options.get("normalizer", "softmax")].for_length(T)

    def call(x: Arrays, **how) -> Arrays:
        out = attention(
            x["q"],
            x["k"],
            x["v"],
            gate_logits=x.get("gate_logits"),
            sink_logits=x.get("sink_logits"),
            alibi_slopes=x.get("alibi_slopes"),
            normalizer=normalizer,
            window=options.get("window"),
            segment_ids=segment_ids,
            logits_soft_cap=options.get("logits_soft_cap"),
            **how,
        )
        return {"out": out}

    return Drawn(inputs, call, tuple(operands))


def draw_attention_step(case: NumericCase, source: Source) -> Drawn:
    """Half of the cache's slots hold a token."""
    B, S, H, Hk, D = case.sizes
    inputs = {
        "q": source.normal(B, H, D),
        "k": source.normal(B, S, Hk, D),
        "v": source.normal(B, S, Hk, D),
    }
    valid = source.random.random((B, S)) < 0.5

    def call(x: Arrays, **how) -> Arrays:
        return {"out": attention_step(x["q"], x["k"], x["v"], valid=valid, **how)}

    return Drawn(inputs, call, tuple(inputs))


def draw_grouped(case: NumericCase, source: Source) -> Drawn:
    M, K, N, G = case.sizes
    group_sizes = _group_sizes(source, M, G)
    inputs = {
        "lhs": source.normal(M, K),
        "rhs": source.normal(G, K, N),
    }

    def call(x: Arrays, **how) -> Arrays:
        return {"out": grouped_matmul(x["lhs"], x["rhs"], group_sizes, **how)}

    return Drawn(inputs, call, tuple(inputs))


def draw_expert(case: NumericCase, source: Source) -> Drawn:
    M, K, N, G = case.sizes
    group_sizes = _group_sizes(source, M, G)
    inputs = {
        "rows": source.normal(M, K),
        "gate": source.operand(source.normal(G, K, N) / 8),
        "up": source.operand(source.normal(G, K, N) / 8),
        "down": source.operand(source.normal(G, N, K) / 8),
    }

    def call(x: Arrays, **how) -> Arrays:
        matrices = (x["gate"], x["up"], x["down"])
        return {"out": expert_mlp(x["rows"], *matrices, group_sizes, **how)}

    return Drawn(inputs, call, tuple(inputs))


def _group_sizes(source: Source, rows: int, groups: int) -> np.ndarray:
    """Unequal, perhaps empty; the last rows belong to no group."""
    cuts: Iterable[int] = np.sort(source.random.integers(0, rows, groups - 1))
    bounds = [0, *cuts, rows - SPARE_ROWS]
    return np.diff(bounds).clip(0).astype(np.int32)
