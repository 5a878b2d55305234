"""The configuration: frozen, validated dataclasses. ConfigDict stops here.

A file in `configs/` returns `config_dict()` with some values changed, absl flags override single values
(`--config.optim.lr=3e-4`), and `from_config_dict` turns the result into a `Config` or names the key that is wrong.
Layers come by kind: to add one, write its dataclass here, enter it in MixerConfig or FeedForwardConfig, and name its
module in `layers/__init__.py` under the same kind.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from flax.core import FrozenDict
from ml_collections import ConfigDict
from ml_collections import config_dict as ml_config_dict

from gatedjax.errors import InputError
from gatedjax.errors import require as _require
from gatedjax.moe_config import LoRAMixtureConfig, RouterConfig, SoftMoEConfig, SparseMoEConfig

Remat = Literal["none", "full", "dots", "kernels"]


@dataclass(frozen=True)
class GatedAttentionConfig:
    """Gated softmax attention (arXiv 2505.06708). Defaults: the study's best variant, G1, elementwise sigmoid."""

    kind: Literal["gated_attention"] = "gated_attention"
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 32
    # After SDPA (G1), value (G2), key (G3), query (G4), dense output (G5). Keys, queries: after QK-norm, before RoPE.
    gate_position: Literal["none", "sdpa", "value", "key", "query", "output"] = "sdpa"
    gate_granularity: Literal["elementwise", "headwise"] = "elementwise"
    gate_shared: bool = False  # scores averaged over heads, then applied to all of them
    gate_mode: Literal["multiplicative", "additive"] = "multiplicative"
    gate_activation: Literal["sigmoid", "silu", "ns_sigmoid", "identity"] = "sigmoid"
    gate_input: Literal["token", "constant"] = "token"  # constant: a zero-initialised parameter, no input
    fused_gate: bool = False  # queries and gate in one projection, [q | gate] in every head, as Qwen3-Next
    qk_norm: bool = True
    qk_norm_kind: Literal["rms", "l2"] = "rms"  # l2: queries and keys of length 1, without parameters
    zero_centred_norm: bool = False  # the rms QK-norm scales by 1 + w
    # What multiplies q k: head_dim^-0.5; a learned number, log2(L^2 - L) at the start (arXiv 2010.04245); log head_dim.
    logit_scale: Literal["inverse_sqrt", "learned", "log_dim"] = "inverse_sqrt"
    # What queries are multiplied by, n the keys that a token sees: log n; s log n with a learned s per head (scalable
    # softmax, arXiv 2501.19399); or by the token and log n, values by the token too (selective attention, 2411.12892).
    query_scale: Literal["none", "log_length", "scalable_softmax", "selective"] = "none"
    rope_fraction: float = 1.0  # share of a head's channels that rotate; 0 for no position encoding
    rope_base: float = 10_000.0
    yarn_factor: float = 1.0  # context extension factor of YaRN (arXiv 2309.00071); 1 for none
    yarn_original_length: int = 4096
    window: int | None = None  # keys in (i - window, i]
    # How logits become weights: names of kernels_pallas.attention.SCORES.
    score: Literal[
        "softmax", "sigmoid", "relu", "relu_squared", "softpick", "self_adjust", "stablemax", "softplus",
        "clipped_softmax", "reweighted_softplus", "adaptive_temperature", "sparsemax", "entmax",
    ] = "softmax"  # fmt: skip
    # n of sigmoid's -log n, of relu's 1 / n, of the clip; L of the learned scales' start. A constant, so that training
    # and decoding agree: the length of training rows.
    score_length: int | None = None
    entmax_alpha: float = 1.5  # above 1 (softmax) up to 2 (sparsemax)
    clip_alpha: float = 4.0  # of clipped softmax: gamma = -alpha / n
    reweight_power: int = 15  # of reweighted softplus
    sinks: bool = False  # one learned logit per head in the denominator
    soft_cap: float | None = None
    # Logits less slope x distance. fixed: slopes 2^(-8 h / H); balanced: 2^-h for one half of the heads, the negatives
    # for the other (arXiv 2502.18845); learned: a parameter, fixed at the start.
    alibi: Literal["none", "fixed", "balanced", "learned"] = "none"

    def __post_init__(self):
        _require_divides("num_kv_heads", self.num_kv_heads, self.num_heads)
        _require(0.0 <= self.rope_fraction <= 1.0, "rope_fraction", self.rope_fraction, "a share between 0 and 1")
        _require(self.rotary_dim % 2 == 0, "rope_fraction", self.rope_fraction, "an even number of rotated channels")
        _require(self.window is None or self.window >= 1, "window", self.window, "None or at least 1")
        _require(self.yarn_factor >= 1.0, "yarn_factor", self.yarn_factor, "at least 1")
        has_heads = self.gate_position != "output" or (self.gate_granularity == "elementwise" and not self.gate_shared)
        _require(has_heads, "gate_position", "output", "an elementwise gate, not shared: the output has no heads")
        fusable = self.gate_position == "sdpa" and self.gate_input == "token" and not self.gate_shared
        wanted = "false: only a gate of tokens after sdpa that is not shared comes with the queries"
        _require(fusable or not self.fused_gate, "fused_gate", True, wanted)
        self._check_score()

    def _check_score(self):
        needs = {
            f"score {self.score!r}": self.score in ("sigmoid", "relu", "relu_squared", "clipped_softmax"),
            "query_scale 'scalable_softmax'": self.query_scale == "scalable_softmax",
            "logit_scale 'learned'": self.logit_scale == "learned",
        }
        for what, needed in needs.items():
            _require(self.score_length or not needed, "score_length", self.score_length, f"a length for {what}")
        _require(self.score_length is None or self.score_length >= 1, "score_length", self.score_length, "at least 1")
        _require(self.score == "softmax" or not self.sinks, "sinks", True, f"false with score {self.score!r}")
        _require(self.soft_cap is None or self.soft_cap > 0, "soft_cap", self.soft_cap, "None or above 0")
        _require(1 < self.entmax_alpha <= 2, "entmax_alpha", self.entmax_alpha, "above 1 and at most 2")
        _require(self.clip_alpha >= 0, "clip_alpha", self.clip_alpha, "at least 0")
        _require(self.reweight_power >= 2, "reweight_power", self.reweight_power, "at least 2")
        unit = self.qk_norm and self.qk_norm_kind == "l2"
        wanted = "inverse_sqrt unless qk_norm is true of kind 'l2'; learned or log_dim if so"
        _require(unit == (self.logit_scale != "inverse_sqrt"), "logit_scale", self.logit_scale, wanted)
        halves = self.alibi != "balanced" or self.num_heads % 2 == 0
        _require(halves, "alibi", "balanced", f"an even number of heads, not {self.num_heads}")

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rope_fraction)


@dataclass(frozen=True)
class GatedLinearAttentionConfig:
    """Gated linear attention (arXiv 2312.06635) and its relatives by decay: RetNet, Mamba-2's core, plain linear."""

    kind: Literal["gated_linear_attention"] = "gated_linear_attention"
    num_heads: int = 4
    num_kv_heads: int = 4
    key_dim: int = 16  # channels per head; the paper has K = M / 2 / H, V = M / H
    value_dim: int = 32
    decay: Literal["vector", "scalar", "constant", "none"] = "vector"
    # logsigmoid: g = logsigmoid(x W1 W2 + b) / decay_temperature (GLA). softplus: g = -exp(A_log) softplus(x W + b),
    # and values are multiplied by that softplus (Mamba-2). A constant decay is RetNet's log(1 - 2^(-5-h)).
    decay_form: Literal["logsigmoid", "softplus"] = "logsigmoid"
    decay_rank: int = 16
    decay_temperature: float = 16.0
    feature_map: Literal["identity", "silu", "elu_plus_one"] = "identity"
    normalize: bool = False  # divide by the sum of the weights (linear attention with a positive feature map)
    output_gate: Literal["swish", "sigmoid", "none"] = "swish"
    conv_width: int = 0  # causal depthwise convolution on q, k, v; 0 for none
    rope_fraction: float = 0.0  # RetNet rotates q and k
    rope_base: float = 10_000.0
    chunk_size: int | None = None

    def __post_init__(self):
        _require_divides("num_kv_heads", self.num_kv_heads, self.num_heads)
        _require(self.rotary_dim % 2 == 0, "rope_fraction", self.rope_fraction, "an even number of rotated channels")
        _require(self.conv_width >= 0, "conv_width", self.conv_width, "0 for none, or a width")
        is_mamba = self.decay == "scalar" and self.num_kv_heads == self.num_heads
        wanted = "logsigmoid unless decay is 'scalar' and num_kv_heads is num_heads (Mamba-2)"
        _require(self.decay_form != "softplus" or is_mamba, "decay_form", self.decay_form, wanted)

    @property
    def rotary_dim(self) -> int:
        return int(self.key_dim * self.rope_fraction)


@dataclass(frozen=True)
class GatedMLPConfig:
    """SwiGLU (activation silu) or GEGLU (gelu), arXiv 2002.05202."""

    kind: Literal["gated_mlp"] = "gated_mlp"
    hidden: int = 256
    activation: Literal["silu", "gelu"] = "silu"
    not_causal = None  # no token sees a later one


MixerConfig = GatedAttentionConfig | GatedLinearAttentionConfig
FeedForwardConfig = GatedMLPConfig | SparseMoEConfig | SoftMoEConfig | LoRAMixtureConfig
MIXERS: dict[str, type] = {c.kind: c for c in get_args(MixerConfig)}
FEED_FORWARDS: dict[str, type] = {c.kind: c for c in get_args(FeedForwardConfig)}


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: `pattern` names entries of `mixers`, `ffn_pattern` of `ffns`; both repeat to fill the layers."""

    vocab_size: int = 0  # 0: what the tokenizer has
    width: int = 128
    num_layers: int = 2
    mixers: Mapping[str, MixerConfig] = field(default_factory=lambda: FrozenDict(attention=GatedAttentionConfig()))
    pattern: tuple[str, ...] = ("attention",)
    ffns: Mapping[str, FeedForwardConfig] = field(default_factory=lambda: FrozenDict(mlp=GatedMLPConfig()))
    ffn_pattern: tuple[str, ...] = ("mlp",)
    norm_eps: float = 1e-6
    zero_centred_norm: bool = False
    tie_embeddings: bool = True
    init_std: float = 0.02
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of activations; parameters are float32
    remat: Remat = "none"  # kernels: keep only what the kernels name; dots: keep matmul outputs; full: keep nothing
    scan_layers: bool = True  # false: every layer compiled by itself; small models run faster (nothing is stacked)
    loss_chunk: int = 0  # tokens of a device whose logits exist at once; 0 for all of them
    z_loss: float = 0.0  # weight of logsumexp(logits)^2

    def __post_init__(self):
        for name in self.pattern:
            _require(name in self.mixers, "pattern", name, f"one of mixers: {', '.join(self.mixers)}")
        for name in self.ffn_pattern:
            _require(name in self.ffns, "ffn_pattern", name, f"one of ffns: {', '.join(self.ffns)}")
            reason = self.ffns[name].not_causal
            _require(
                reason is None, f"ffns.{name}", reason, "a causal feed-forward: this model predicts the next token"
            )
        _require(len(self.pattern) > 0 and len(self.ffn_pattern) > 0, "pattern", (), "at least one layer")
        sparse = [f for f in map(self.ffns.get, self.ffn_pattern) if isinstance(f, SparseMoEConfig)]
        same = not any(f.router.residual for f in sparse) or len({f.total_experts for f in sparse}) == 1
        _require(same, "ffns", "router.residual", "the same number of experts in all sparse feed-forwards")
        first = {f for f in map(self.ffns.get, self.ffn_pattern) if getattr(f, "first_pass", False)}
        _require(len(first) <= 1, "ffns", "first_pass", "one mixture at most whose weights come from a first pass")
        whole = self.num_layers >= 1 and self.num_layers % self.period == 0
        _require(whole, "num_layers", self.num_layers, f"a multiple of the period {self.period}")

    @property
    def period(self) -> int:
        """Layers after which both patterns repeat."""
        return math.lcm(len(self.pattern), len(self.ffn_pattern))

    @property
    def router_residual(self) -> int:
        """Experts whose logits each sparse layer hands to the next; 0 where no router has a gating residual."""
        sparse = [f for f in map(self.ffns.get, self.ffn_pattern) if isinstance(f, SparseMoEConfig)]
        return max((f.total_experts for f in sparse if f.router.residual), default=0)

    @property
    def first_pass(self) -> LoRAMixtureConfig | None:
        """The mixture whose weights come from a first pass of the model without experts (X-LoRA), if there is one."""
        return next((f for f in map(self.ffns.get, self.ffn_pattern) if getattr(f, "first_pass", False)), None)

    def layer(self, i: int) -> tuple[MixerConfig, FeedForwardConfig]:
        """The mixer and the feed-forward of layer i."""
        return self.mixers[self.pattern[i % len(self.pattern)]], self.ffns[self.ffn_pattern[i % len(self.ffn_pattern)]]


@dataclass(frozen=True)
class SourceConfig:
    """One source of text. `path`: a folder or file; the standard library needs none."""

    kind: Literal["python_stdlib", "text", "jsonl", "parquet", "array_record", "hf_disk"] = "python_stdlib"
    path: str = ""
    field: str = "text"  # of a JSON record or a table
    weight: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it is cut into windows."""

    sources: Mapping[str, SourceConfig] = field(default_factory=lambda: FrozenDict(main=SourceConfig()))
    tokenizer: str = "bytes"  # or the path of a tokenizer.json
    seq_len: int = 256
    validation_share: float = 0.05
    cache_dir: str = ""  # "": gatedjax under the user's cache directory
    seed: int = 0

    def __post_init__(self):
        is_share = 0.0 < self.validation_share < 1.0
        _require(is_share, "validation_share", self.validation_share, "a share between 0 and 1")
        _require(self.seq_len >= 2, "seq_len", self.seq_len, "at least 2")
        _require(len(self.sources) > 0, "sources", "none", "at least one")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, schedule and the guard against bad steps."""

    name: Literal["adamw", "muon", "lion", "adabelief", "schedule_free"] = "adamw"
    lr: float = 1e-3
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: int = 20
    final_lr_share: float = 0.1  # of the peak rate, at the last step
    decay_share: float = 0.2  # wsd: share of the steps that decay
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # 0 for none
    ema_decay: float = 0.0  # of the averaged parameters kept for evaluation; 0 for none
    skip_factor: float = 0.0  # a step whose gradient norm exceeds this many times its running mean is skipped; 0: never
    max_skips: int = 10  # in a row; one more ends the run

    def __post_init__(self):
        _require(self.lr > 0, "lr", self.lr, "above 0")
        _require(0.0 <= self.ema_decay < 1.0, "ema_decay", self.ema_decay, "between 0 and 1")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis. `data = 0` takes all devices that the others leave."""

    data: int = 0
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1


@dataclass(frozen=True)
class TrainConfig:
    """The loop. `batch_size` counts rows of a whole optimizer step, over all devices and micro-batches."""

    steps: int = 100
    batch_size: int = 8
    accumulation_steps: int = 1
    seed: int = 0
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int = 8
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    stuck_seconds: float = 1800.0  # without progress: stacks are written; after as many again the run ends; 0: never
    sample_prompt: str = "def "
    sample_tokens: int = 200

    def __post_init__(self):
        wanted = f"a multiple of accumulation_steps = {self.accumulation_steps}"
        _require(self.batch_size % self.accumulation_steps == 0, "batch_size", self.batch_size, wanted)
        for name in ("steps", "log_every", "eval_every", "eval_batches", "checkpoint_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.stuck_seconds >= 0, "stuck_seconds", self.stuck_seconds, "0 for never, or seconds")


@dataclass(frozen=True)
class Config:
    """Everything that a run is made from, except the directory it writes to."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def config_dict() -> ConfigDict:
    """All defaults, as the ConfigDict that a file in `configs/` changes and returns."""
    return _to_config_dict(Config())


def layer(kind: str, **values: Any) -> ConfigDict:
    """A mixer or a feed-forward of this kind, with `values` over its defaults: an entry of `mixers` or `ffns`.

    A group of values is a dict over the group's defaults: `layer("sparse_moe", router={"score": "sigmoid"})`.
    """
    kinds = MIXERS | FEED_FORWARDS
    if kind not in kinds:
        raise InputError(f"kind: {kind!r} is unknown{_nearest(kind, kinds)}")
    result = _to_config_dict(kinds[kind]())
    for name, value in values.items():
        if name not in result:
            raise InputError(f"{kind}.{name}: unknown key{_nearest(name, result)}")
        if isinstance(result[name], ConfigDict):
            for inner, v in value.items():
                if inner not in result[name]:
                    raise InputError(f"{kind}.{name}.{inner}: unknown key{_nearest(inner, result[name])}")
                result[name][inner] = v
        else:
            result[name] = value
    return result


def from_config_dict(raw: Mapping[str, Any]) -> Config:
    """Checks every key and type and returns the frozen configuration.

    Raises:
      InputError: one line naming the key, what came and what was wanted; for an unknown key, the nearest known one.
    """
    return _build(Config, raw, "config")


def to_dict(config: Any) -> Any:
    """A configuration as plain dicts, lists and scalars, ready for JSON; `from_config_dict` is its inverse."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {name: to_dict(value) for name, value in config.items()}
    return list(config) if isinstance(config, tuple) else config


def differing_keys(a: Any, b: Any, path: str = "config") -> list[str]:
    """The dotted keys at which two `to_dict` results differ."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        names = list(a) + [n for n in b if n not in a]
        return [key for n in names for key in differing_keys(a.get(n), b.get(n), f"{path}.{n}")]
    return [] if a == b else [f"{path}: {a!r} and {b!r}"]


def nearest_key(key: str) -> str:
    """For a dotted key such as `model.widht` that the configuration does not have: "; did you mean ...?", or ""."""
    group, _, name = key.rpartition(".")
    if group.startswith(("model.mixers.", "model.ffns.")):
        kinds = [*MIXERS.values(), *FEED_FORWARDS.values(), RouterConfig]
        return _nearest(name, dict.fromkeys(f.name for kind in kinds for f in dataclasses.fields(kind)))
    return _nearest(key, [k for k, _ in _leaves(to_dict(Config()))])


def _require_divides(name: str, part: int, whole: int) -> None:
    _require(part >= 1 and whole % part == 0, name, part, f"a divisor of {whole}")


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _leaves(tree: Any, path: str = ""):
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _leaves(value, f"{path}.{name}" if path else name)
    else:
        yield path, tree


def _to_config_dict(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        hints = get_type_hints(type(value))
        result = ConfigDict()
        for f in dataclasses.fields(value):
            v = getattr(value, f.name)
            # A value that may be None keeps its type for the flags: --config....window=128 parses as int.
            typed_none = ml_config_dict.placeholder
            result[f.name] = typed_none(_optional_of(hints[f.name])) if v is None else _to_config_dict(v)
        return result
    if isinstance(value, Mapping):
        return ConfigDict({name: _to_config_dict(v) for name, v in value.items()})
    return value


def _optional_of(hint: Any) -> type:
    return next(t for t in get_args(hint) if t is not types.NoneType)


def _build(cls: type, raw: Any, path: str) -> Any:
    if not isinstance(raw, Mapping | ConfigDict):
        raise InputError(f"{path}: {raw!r} came, wanted a group of keys")
    hints = get_type_hints(cls)
    for name in raw:
        if name not in hints:
            raise InputError(f"{path}.{name}: unknown key{_nearest(name, hints)}")
    values = {name: _convert(hints[name], raw[name], f"{path}.{name}") for name in raw}
    try:
        return cls(**values)
    except InputError as e:
        raise InputError(f"{path}.{e}" if not str(e).startswith("config.") else str(e)) from None


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as the annotation `hint` wants it, or InputError."""
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path)
    if origin is Literal:
        if value not in args:
            raise InputError(f"{path}: {value!r} came, wanted one of {', '.join(map(str, args))}")
        return value
    if hint in (MixerConfig, FeedForwardConfig):
        return _build_kind({c.kind: c for c in args}, value, path)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(_optional_of(hint), value, path)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise InputError(f"{path}: {value!r} came, wanted a tuple of {args[0].__name__}")
        return tuple(_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping | ConfigDict):
            raise InputError(f"{path}: {value!r} came, wanted named entries")
        return FrozenDict({name: _convert(args[1], value[name], f"{path}.{name}") for name in value})
    return _scalar(hint, value, path)


def _build_kind(kinds: Mapping[str, type], raw: Any, path: str) -> Any:
    kind = raw.get("kind") if isinstance(raw, Mapping | ConfigDict) else None
    if kind not in kinds:
        raise InputError(f"{path}.kind: {kind!r} came, wanted one of {', '.join(kinds)}")
    return _build(kinds[kind], raw, path)


def _scalar(hint: type, value: Any, path: str) -> Any:
    # bool is an int in Python, but `steps=True` is a mistake; an int is a fine float.
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise InputError(f"{path}: {value!r} is {type(value).__name__}, wanted {hint.__name__}")
    return value
