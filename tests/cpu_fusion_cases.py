"""Random calls of every op, layer and step, for tests/test_xla_cpu_fusions.py.

A case is a function of named arrays, and the arrays. Inside the function some arrays become
broadcasts: of one number, of one column, of one row, of ones, of zeros. The cotangents of a sum are
broadcasts too. The compiler sees all of this.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gatedjax.config import (
    GatedAttentionConfig,
    GatedLinearAttentionConfig,
    GatedMLPConfig,
    LoRAMixtureConfig,
    RouterConfig,
    SoftMoEConfig,
    SparseMoEConfig,
)
from gatedjax.layers import FEED_FORWARDS, MIXERS, TokenInfo
from gatedjax.training.training_loss import training_loss
from kernels_pallas.attention import NORMALIZERS
from kernels_pallas.ops import (
    attention,
    attention_step,
    expert_mlp,
    grouped_matmul,
    linear_scan,
    linear_scan_step,
)

DTYPES = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.02}
SIZES = (1, 3, 8, 16, 24, 32, 64)


class Case(NamedTuple):
    """`function(arrays)` returns a tree of arrays; `tolerance` bounds the largest error."""

    name: str
    function: Callable
    arrays: dict
    tolerance: float


def as_broadcast(kind: str, x: jax.Array) -> jax.Array:
    """An array of x's shape that the compiler knows to be a broadcast, of x's values if it can."""
    if kind == "ones":
        return jnp.ones_like(x)
    if kind == "zeros":
        return jnp.zeros_like(x)
    if kind == "number":
        return jnp.broadcast_to(x.reshape(-1)[0], x.shape)
    if kind == "column":
        return jnp.broadcast_to(x[..., :1], x.shape)
    if kind == "row" and x.ndim > 1:
        return jnp.broadcast_to(x[..., :1, :], x.shape)
    if kind == "batch":
        return jnp.broadcast_to(x[:1], x.shape)
    return x


BROADCASTS = ("given", "ones", "zeros", "number", "column", "row", "batch")


class Draw:
    """Random sizes, options and arrays, all from one seed."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)
        self._numpy = np.random.default_rng(seed)

    def of(self, *choices):
        return self._random.choice(choices)

    def normal(self, *shape: int, dtype: str = "float32") -> np.ndarray:
        return np.asarray(jnp.asarray(self._numpy.normal(size=shape), dtype))

    def length(self) -> int:
        return self.of(1, 2, 7, 8, 16, 24, 32, 48, 64, 65, 100, 128, 200, 256, 300)

    def batch(self) -> int:
        return self.of(1, 2, 3, 4, 8, 9)

    def segments(self, B: int, T: int) -> np.ndarray | None:
        if self.of(True, True, False):
            return None
        return np.sort(self._numpy.integers(0, 4, (B, T)), axis=1).astype(np.int32)

    def group_sizes(self, groups: int, rows: int) -> np.ndarray:
        ids = self._numpy.integers(0, groups, rows)
        return np.bincount(ids, minlength=groups).astype(np.int32)

    def kinds(self, names, broadcasts=BROADCASTS) -> dict[str, str]:
        """For each array, what it is inside the function: half of them are as given."""
        return {name: self.of("given", self.of(*broadcasts)) for name in names}

    def loss(self) -> str:
        return self.of("none", "none", "sum", "mean", "weighted", "column")


def total(loss: str, y: jax.Array) -> jax.Array:
    """A number; its cotangent is a constant ("sum", "mean"), one a row ("column") or "weighted"."""
    y = y.astype(jnp.promote_types(jnp.float32, y.dtype))
    if loss == "mean":
        return jnp.mean(y)
    if loss == "column" and y.ndim > 1:
        y = jnp.sum(y, axis=-1)
    if loss in ("column", "weighted"):
        y = y * np.cos(np.arange(y.size, dtype=np.float32)).reshape(y.shape)
    return jnp.sum(y)


def case(
    name: str, draw: Draw, call: Callable, arrays: dict, dtype: str, broadcasts=BROADCASTS
) -> Case:
    """`call(arrays)`, some arrays as broadcasts; by chance also the gradients of a sum over it."""
    kinds = draw.kinds(arrays, broadcasts)
    loss = draw.loss()

    def run(arrays):
        inside = {key: as_broadcast(kinds[key], x) for key, x in arrays.items()}
        return call(inside)

    def summed(arrays):
        y = run(arrays)
        return sum(total(loss, leaf) for leaf in jax.tree.leaves(y))

    function = run if loss == "none" else jax.value_and_grad(summed)
    said = " ".join(f"{key}={kind}" for key, kind in kinds.items() if kind != "given")
    tolerance = DTYPES[dtype]
    return Case(f"{name} {dtype} loss={loss} {said}", function, arrays, tolerance)


def decay(draw: Draw, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Logs of decays, <= 0: [H], [..., H] or [..., H, K] of a shape [..., H, K]."""
    shapes = {"constant": shape[-2:-1], "scalar": shape[:-1], "vector": shape}
    logits = draw.normal(*shapes[kind]).astype(np.float64)
    return -np.log1p(np.exp(logits)).astype(np.float32)


def linear_scan_case(draw: Draw) -> Case:
    B, T, H = draw.batch(), draw.length(), draw.of(1, 2, 4)
    K, V = draw.of(*SIZES), draw.of(*SIZES)
    dtype = draw.of("float32", "float32", "float32", "bfloat16", "float16")
    kv_heads = draw.of(H, 1)
    arrays = {
        "q": draw.normal(B, T, H, K, dtype=dtype),
        "k": draw.normal(B, T, kv_heads, K, dtype=dtype),
        "v": draw.normal(B, T, kv_heads, V, dtype=dtype),
    }
    options = {
        "implementation": "xla",
        "reverse": draw.of(False, False, True),
        "normalize": draw.of(False, False, True),
        "segment_ids": draw.segments(B, T),
        "chunk_size": draw.of(None, None, 4, 16, 32),
        "inclusive": draw.of(True, False),
    }
    kind = draw.of("none", "constant", "scalar", "vector")
    if kind != "none":
        arrays["log_decay"] = decay(draw, kind, (B, T, H, K))
    if not options["inclusive"] and draw.of(True, False):
        arrays["bonus"] = draw.normal(H, K)
    columns = V + options["normalize"]
    initial = draw.of("none", "zeros", "given")
    if initial == "given":
        arrays["initial_state"] = draw.normal(B, H, K, columns)
    returned = draw.of("outputs", "both", "state")

    def call(x):
        x = dict(x)
        if "log_decay" in x:
            x["log_decay"] = -jnp.abs(x["log_decay"])
        if options["normalize"]:
            # Positive features: no quotient has a denominator near 0.
            x["q"], x["k"] = jnp.abs(x["q"]) + 0.1, jnp.abs(x["k"]) + 0.1
        if initial == "zeros":
            x["initial_state"] = jnp.zeros((B, H, K, columns))
        o, state = linear_scan(**x, return_final_state=True, **options)
        return {"outputs": (o,), "both": (o, state), "state": (state,)}[returned]

    plain = {key: value for key, value in options.items() if key != "segment_ids"}
    has_segments = options["segment_ids"] is not None
    sizes = f"B{B} T{T} H{H} kv{kv_heads} K{K} V{V}"
    name = f"linear_scan {sizes} {kind} {plain} segments={has_segments} {initial} {returned}"
    return case(name, draw, call, arrays, dtype)


def linear_scan_step_case(draw: Draw) -> Case:
    B, H, K, V = draw.batch(), draw.of(1, 2, 4), draw.of(*SIZES), draw.of(*SIZES)
    dtype = draw.of("float32", "float32", "bfloat16")
    normalize = draw.of(False, True)
    arrays = {
        "q": draw.normal(B, H, K, dtype=dtype),
        "k": draw.normal(B, H, K, dtype=dtype),
        "v": draw.normal(B, H, V, dtype=dtype),
        "state": draw.normal(B, H, K, V + normalize),
    }
    kind = draw.of("none", "constant", "scalar", "vector")
    if kind != "none":
        arrays["log_decay"] = decay(draw, kind, (B, H, K))
    inclusive = draw.of(True, False)
    if not inclusive:
        arrays["bonus"] = draw.normal(H, K)

    def call(x):
        x = dict(x)
        if "log_decay" in x:
            x["log_decay"] = -jnp.abs(x["log_decay"])
        if normalize:
            x["q"], x["k"], x["state"] = (
                jnp.abs(x["q"]) + 0.1,
                jnp.abs(x["k"]) + 0.1,
                jnp.abs(x["state"]) + 0.1,
            )
        return linear_scan_step(**x, inclusive=inclusive, normalize=normalize, implementation="xla")

    name = (
        f"linear_scan_step B{B} H{H} K{K} V{V} {kind} inclusive={inclusive} normalize={normalize}"
    )
    return case(name, draw, call, arrays, dtype)


def _normalizer(draw: Draw, T: int) -> tuple[str, object]:
    name = draw.of("softmax", "softmax", *NORMALIZERS)
    return name, NORMALIZERS[name].for_length(T)


def attention_case(draw: Draw) -> Case:
    B, T, H = draw.batch(), draw.length(), draw.of(1, 2, 4)
    K, V = draw.of(*SIZES), draw.of(*SIZES)
    kv_heads = draw.of(H, 1)
    dtype = draw.of("float32", "float32", "bfloat16")
    normalizer_name, normalizer = _normalizer(draw, T)
    arrays = {
        "q": draw.normal(B, T, H, K, dtype=dtype),
        "k": draw.normal(B, T, kv_heads, K, dtype=dtype),
        "v": draw.normal(B, T, kv_heads, V, dtype=dtype),
    }
    if draw.of(True, False):
        arrays["gate_logits"] = draw.normal(B, T, H, draw.of(1, V), dtype=dtype)
    if normalizer.takes_sinks and draw.of(True, False):
        arrays["sink_logits"] = draw.normal(H)
    if draw.of(True, False, False):
        arrays["alibi_slopes"] = np.abs(draw.normal(H))
    options = {
        "normalizer": normalizer,
        "window": draw.of(None, None, 1, 16, 100),
        "causal": draw.of(True, True, False),
        "logits_soft_cap": draw.of(None, None, 5.0),
        "segment_ids": draw.segments(B, T),
        "implementation": draw.of("xla", "xla", "reference"),
    }

    def call(x):
        return attention(**x, **options)

    said = {
        key: value for key, value in options.items() if key not in ("normalizer", "segment_ids")
    }
    name = f"attention B{B} T{T} H{H} kv{kv_heads} K{K} V{V} {normalizer_name} {said}"
    return case(name, draw, call, arrays, dtype)


def attention_step_case(draw: Draw) -> Case:
    B, S, H, K, V = draw.batch(), draw.length(), draw.of(1, 2, 4), draw.of(*SIZES), draw.of(*SIZES)
    normalizer_name, normalizer = _normalizer(draw, S)
    arrays = {
        "q": draw.normal(B, H, K),
        "k_cache": draw.normal(B, S, H, K),
        "v_cache": draw.normal(B, S, H, V),
    }
    if draw.of(True, False):
        arrays["gate_logits"] = draw.normal(B, H, V)
    valid = np.arange(S)[None] <= np.arange(B)[:, None] + S // 2

    def call(x):
        return attention_step(
            **x, valid=jnp.asarray(valid), normalizer=normalizer, implementation="xla"
        )

    return case(
        f"attention_step B{B} S{S} H{H} K{K} V{V} {normalizer_name}", draw, call, arrays, "float32"
    )


def grouped_matmul_case(draw: Draw) -> Case:
    M, K, N, G = draw.of(1, 5, 16, 64, 200), draw.of(*SIZES), draw.of(*SIZES), draw.of(1, 2, 4, 8)
    dtype = draw.of("float32", "bfloat16")
    sizes = draw.group_sizes(G, M)
    arrays = {"lhs": draw.normal(M, K, dtype=dtype), "rhs": draw.normal(G, K, N, dtype=dtype)}

    def call(x):
        return grouped_matmul(x["lhs"], x["rhs"], jnp.asarray(sizes), implementation="xla")

    return case(f"grouped_matmul M{M} K{K} N{N} {sizes.tolist()}", draw, call, arrays, dtype)


def expert_mlp_case(draw: Draw) -> Case:
    R, M, F, G = draw.of(1, 16, 64, 200), draw.of(*SIZES), draw.of(*SIZES), draw.of(1, 2, 4, 8)
    sizes = draw.group_sizes(G, R)
    arrays = {
        "rows": draw.normal(R, M),
        "gate": draw.normal(G, M, F),
        "up": draw.normal(G, M, F),
        "down": draw.normal(G, F, M),
    }
    if draw.of(True, False):
        arrays["weights"] = draw.normal(R)

    def call(x):
        return expert_mlp(
            group_sizes=jnp.asarray(sizes), activation="silu", implementation="xla", **x
        )

    return case(f"expert_mlp R{R} M{M} F{F} {sizes.tolist()}", draw, call, arrays, "float32")


def cross_entropy_case(draw: Draw) -> Case:
    B, T, M, X = draw.batch(), draw.length(), draw.of(*SIZES), draw.of(16, 32, 256)
    chunk = draw.of(0, 0, 16, 100)
    generator = np.random.default_rng(draw.of(*range(99)))
    targets = generator.integers(0, X, (B, T)).astype(np.int32)
    arrays = {
        "hidden": draw.normal(B, T, M),
        "weights": draw.normal(X, M),
        "mask": np.ones((B, T), np.float32),
    }

    def call(x):
        return training_loss(
            x["hidden"], x["weights"], jnp.asarray(targets), x["mask"], jnp.float32(1), chunk, 1e-3
        )

    return case(f"cross_entropy B{B} T{T} M{M} X{X} chunk={chunk}", draw, call, arrays, "float32")


def _gated_attention(draw: Draw) -> GatedAttentionConfig:
    position = draw.of("none", "sdpa", "value", "key", "query", "output")
    elementwise = position == "output" or draw.of(True, False)
    return GatedAttentionConfig(
        num_heads=4,
        num_kv_heads=draw.of(1, 2, 4),
        head_dim=draw.of(4, 8, 16),
        gate_position=position,
        gate_granularity="elementwise" if elementwise else "headwise",
        gate_shared=position != "output" and draw.of(False, False, True),
        gate_mode=draw.of("multiplicative", "multiplicative", "additive"),
        gate_activation=draw.of("sigmoid", "silu", "ns_sigmoid", "identity"),
        gate_input=draw.of("token", "token", "constant"),
        qk_norm=draw.of(True, False),
        query_scale=draw.of("none", "none", "log_length", "scalable_softmax", "selective"),
        rope_fraction=draw.of(0.0, 0.5, 1.0),
        window=draw.of(None, None, 5),
        normalizer=draw.of("softmax", "softmax", "sigmoid", "softpick", "stablemax", "entmax"),
        normalizer_length=16,
        alibi=draw.of("none", "none", "fixed", "learned"),
        logits_soft_cap=draw.of(None, None, 3.0),
    )


def _gated_linear_attention(draw: Draw) -> GatedLinearAttentionConfig:
    decay = draw.of("vector", "vector", "scalar", "constant", "none")
    softplus = decay == "scalar" and draw.of(True, False)
    normalize = draw.of(False, False, True)
    return GatedLinearAttentionConfig(
        num_heads=4,
        num_kv_heads=4 if softplus else draw.of(1, 2, 4),
        key_dim=draw.of(4, 8, 16),
        value_dim=draw.of(4, 8, 16, 32),
        decay=decay,
        decay_form="softplus" if softplus else "logsigmoid",
        feature_map="elu_plus_one" if normalize else draw.of("identity", "silu"),
        normalize=normalize,
        output_gate=draw.of("swish", "sigmoid", "none"),
        conv_width=draw.of(0, 0, 4),
        rope_fraction=0.0 if normalize else draw.of(0.0, 1.0),
        chunk_size=draw.of(None, None, 16),
    )


def _sparse_moe(draw: Draw) -> SparseMoEConfig:
    router = RouterConfig(
        scoring=draw.of("softmax", "sigmoid"),
        weighting=draw.of("scores", "selected"),
        renormalize=draw.of(True, False),
        affine=draw.of(True, False),
        residual=draw.of(True, False),
        bias_rule=draw.of("none", "sign"),
    )
    return SparseMoEConfig(
        num_experts=draw.of(2, 5, 8),
        copy_experts=draw.of(0, 0, 1),
        constant_experts=draw.of(0, 0, 2),
        hidden=draw.of(8, 12, 32),
        router=router,
        shared_hidden=draw.of(0, 16),
        capacity_factor=draw.of(0.0, 0.0, 1.0),
    )


def _lora_mixture(draw: Draw) -> LoRAMixtureConfig:
    gate = draw.of("xlora", "phatgoose", "sigmoid")
    kept = draw.of(1, 2) if gate == "phatgoose" else draw.of(0, 2)
    return LoRAMixtureConfig(
        hidden=draw.of(16, 32),
        num_experts=3,
        rank=draw.of(2, 8),
        gate=gate,
        experts_per_token=kept,
    )


LAYERS = {
    "gated_attention": _gated_attention,
    "gated_linear_attention": _gated_linear_attention,
    "gated_mlp": lambda draw: GatedMLPConfig(
        hidden=draw.of(16, 32, 64), activation=draw.of("silu", "gelu")
    ),
    "sparse_moe": _sparse_moe,
    "soft_moe": lambda draw: SoftMoEConfig(
        num_experts=draw.of(2, 4), slots_per_expert=draw.of(1, 2), hidden=16
    ),
    "lora_mixture": _lora_mixture,
}


def layer_case(draw: Draw, kind: str) -> Case:
    """A layer with given parameters, or with parameters made in the same program."""
    config = LAYERS[kind](draw)
    B, T, M = draw.batch(), draw.length(), draw.of(16, 32, 64)
    dtype = draw.of("float32", "float32", "bfloat16")
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    info = TokenInfo(positions, draw.segments(B, T), np.zeros((B, T), np.int32))
    layer_class = (MIXERS | FEED_FORWARDS)[kind]
    module = layer_class(config, init_std=0.3, dtype=jnp.dtype(dtype))
    x = draw.normal(B, T, M)
    key = jax.random.key(draw.of(*range(99)))
    made_inside = draw.of(True, False, False)

    def made(arrays):
        return module.init_with_output(key, arrays["x"], info)

    def applied(arrays):
        return module.apply({"params": arrays["params"]}, arrays["x"], info)

    loss = draw.loss()
    # A router's choice among equal tokens may turn on the last bit: its input is no broadcast.
    x_kind = "given" if kind == "sparse_moe" else draw.of("given", "given", *BROADCASTS)
    name = f"{kind} B{B} T{T} M{M} made_inside={made_inside} x={x_kind} {config}"
    if made_inside:
        inner = made
        arrays = {"x": x}
    else:
        inner = applied
        init = jax.jit(module.init, compiler_options={"xla_backend_optimization_level": 0})
        params = init(key, x, info)["params"]
        shift = draw.of(0.0, 0.1)
        arrays = {
            "params": jax.tree.map(lambda p: p + shift * draw.normal(*p.shape), params),
            "x": x,
        }

    def run(arrays):
        return inner(arrays | {"x": as_broadcast(x_kind, arrays["x"])})

    def summed(arrays):
        y = run(arrays)
        return total(loss, y[0] if made_inside else y)

    function = run if loss == "none" else jax.value_and_grad(summed)
    # Rounding may turn a router's choice in bfloat16, and then a whole token is another.
    if kind == "sparse_moe" and dtype != "float32":
        return layer_case(draw, kind)
    return Case(f"{name} {dtype} loss={loss}", function, arrays, DTYPES[dtype])


OPS = {
    "linear_scan": linear_scan_case,
    "linear_scan_step": linear_scan_step_case,
    "attention": attention_case,
    "attention_step": attention_step_case,
    "grouped_matmul": grouped_matmul_case,
    "expert_mlp": expert_mlp_case,
    "cross_entropy": cross_entropy_case,
}
FAMILIES = (*OPS, *LAYERS)


def draw_case(family: str, seed: int) -> Case:
    """The case of this family and seed, always the same one."""
    draw = Draw(seed)
    if family in OPS:
        return OPS[family](draw)
    return layer_case(draw, family)
