"""The configuration of mixers and feed-forwards.

Layers come by kind: to add one, write its dataclass here, enter it in MixerConfig or FeedForwardConfig, and name its
module in `gatedjax/layers/__init__.py` under the same kind.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from gatedjax.config.moe import LoRAMixtureConfig, SoftMoEConfig, SparseMoEConfig
from gatedjax.errors import require as _require


@dataclass(frozen=True)
class GatedAttentionConfig:
    """Gated softmax attention (arXiv 2505.06708). Defaults: the study's best variant, G1, elementwise sigmoid."""

    kind: Literal["gated_attention"] = "gated_attention"
    num_heads: int = 4
    num_kv_heads: int | None = None  # None: as many as num_heads
    head_dim: int = 32
    # After SDPA (G1), value (G2), key (G3), query (G4), dense output (G5). Keys, queries: after QK-norm, before RoPE.
    gate_position: Literal["none", "sdpa", "value", "key", "query", "output"] = "sdpa"
    gate_granularity: Literal["elementwise", "headwise"] = "elementwise"
    gate_shared: bool = False  # scores averaged over heads, then applied to all of them
    gate_mode: Literal["multiplicative", "additive"] = "multiplicative"
    gate_activation: Literal["sigmoid", "silu", "ns_sigmoid", "identity"] = "sigmoid"
    # constant: a zero-initialized parameter, no input
    gate_input: Literal["token", "constant"] = "token"
    # queries and gate in one projection, [q | gate] in every head, as Qwen3-Next
    fused_gate: bool = False
    qk_norm: bool = True
    # l2: queries and keys of length 1, without parameters
    qk_norm_kind: Literal["rms", "l2"] = "rms"
    zero_centered_norm: bool = False  # the rms QK-norm scales by 1 + w
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
    # How logits become weights: names of kernels_pallas.attention.NORMALIZERS.
    normalizer: Literal[
        "softmax",
        "sigmoid",
        "relu",
        "relu_squared",
        "softpick",
        "self_adjust",
        "stablemax",
        "softplus",
        "clipped_softmax",
        "reweighted_softplus",
        "adaptive_temperature",
        "sparsemax",
        "entmax",
    ] = "softmax"
    # n of sigmoid's -log n, of relu's 1 / n, of the clip; L of the learned scales' start. A constant, so that training
    # and decoding agree: the length of training rows.
    normalizer_length: int | None = None
    entmax_alpha: float = 1.5  # above 1 (softmax) up to 2 (sparsemax)
    clip_alpha: float = 4.0  # of clipped softmax: gamma = -alpha / n
    reweight_power: int = 15  # of reweighted softplus
    sinks: bool = False  # one learned logit per head in the denominator
    logits_soft_cap: float | None = None
    # Logits less slope x distance. fixed: slopes 2^(-8 h / H); balanced: 2^-h for one half of the heads, the negatives
    # for the other (arXiv 2502.18845); learned: a parameter, fixed at the start.
    alibi: Literal["none", "fixed", "balanced", "learned"] = "none"

    def __post_init__(self):
        _require_divides("num_kv_heads", self.kv_heads, self.num_heads)
        _require(
            0.0 <= self.rope_fraction <= 1.0,
            "rope_fraction",
            self.rope_fraction,
            "a fraction between 0 and 1",
        )
        _require(
            self.rotary_dim % 2 == 0,
            "rope_fraction",
            self.rope_fraction,
            "an even number of rotated channels",
        )
        _require(
            self.window is None or self.window >= 1, "window", self.window, "None or at least 1"
        )
        _require(self.yarn_factor >= 1.0, "yarn_factor", self.yarn_factor, "at least 1")
        has_heads = self.gate_position != "output" or (
            self.gate_granularity == "elementwise" and not self.gate_shared
        )
        _require(
            has_heads,
            "gate_position",
            "output",
            "an elementwise gate, not shared: the output has no heads",
        )
        fusable = (
            self.gate_position == "sdpa" and self.gate_input == "token" and not self.gate_shared
        )
        expected = (
            "false: only a gate of tokens after sdpa that is not shared comes with the queries"
        )
        _require(fusable or not self.fused_gate, "fused_gate", True, expected)
        self._check_normalizer()

    def _check_normalizer(self):
        needs = {
            f"normalizer {self.normalizer!r}": self.normalizer
            in ("sigmoid", "relu", "relu_squared", "clipped_softmax"),
            "query_scale 'scalable_softmax'": self.query_scale == "scalable_softmax",
            "logit_scale 'learned'": self.logit_scale == "learned",
        }
        for what, needed in needs.items():
            _require(
                self.normalizer_length or not needed,
                "normalizer_length",
                self.normalizer_length,
                f"a length for {what}",
            )
        _require(
            self.normalizer_length is None or self.normalizer_length >= 1,
            "normalizer_length",
            self.normalizer_length,
            "at least 1",
        )
        _require(
            self.normalizer == "softmax" or not self.sinks,
            "sinks",
            True,
            f"false with normalizer {self.normalizer!r}",
        )
        _require(
            self.logits_soft_cap is None or self.logits_soft_cap > 0,
            "logits_soft_cap",
            self.logits_soft_cap,
            "None or above 0",
        )
        _require(
            1 < self.entmax_alpha <= 2, "entmax_alpha", self.entmax_alpha, "above 1 and at most 2"
        )
        _require(self.clip_alpha >= 0, "clip_alpha", self.clip_alpha, "at least 0")
        _require(self.reweight_power >= 2, "reweight_power", self.reweight_power, "at least 2")
        unit = self.qk_norm and self.qk_norm_kind == "l2"
        expected = "inverse_sqrt unless qk_norm is true of kind 'l2'; learned or log_dim if so"
        _require(
            unit == (self.logit_scale != "inverse_sqrt"), "logit_scale", self.logit_scale, expected
        )
        halves = self.alibi != "balanced" or self.num_heads % 2 == 0
        _require(halves, "alibi", "balanced", f"an even number of heads, not {self.num_heads}")

    @property
    def kv_heads(self) -> int:
        """The number of key and value heads: `num_kv_heads`, or `num_heads` where that is None."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rope_fraction)


@dataclass(frozen=True)
class GatedLinearAttentionConfig:
    """Gated linear attention (arXiv 2312.06635) and its relatives by decay: RetNet, Mamba-2's core, plain linear."""

    kind: Literal["gated_linear_attention"] = "gated_linear_attention"
    num_heads: int = 4
    num_kv_heads: int | None = None  # None: as many as num_heads
    key_dim: int = 16  # channels per head; the paper has K = M / 2 / H, V = M / H
    value_dim: int = 32
    decay: Literal["vector", "scalar", "constant", "none"] = "vector"
    # logsigmoid: g = logsigmoid(x W1 W2 + b) / decay_temperature (GLA). softplus: g = -exp(A_log) softplus(x W + b),
    # and values are multiplied by that softplus (Mamba-2). A constant decay is RetNet's log(1 - 2^(-5-h)).
    decay_form: Literal["logsigmoid", "softplus"] = "logsigmoid"
    decay_rank: int = 16
    decay_temperature: float = 16.0
    feature_map: Literal["identity", "silu", "elu_plus_one"] = "identity"
    # divide by the sum of the weights (linear attention with a positive feature map)
    normalize: bool = False
    output_gate: Literal["swish", "sigmoid", "none"] = "swish"
    conv_width: int = 0  # causal depthwise convolution on q, k, v; 0 for none
    rope_fraction: float = 0.0  # RetNet rotates q and k
    rope_base: float = 10_000.0
    chunk_size: int | None = None

    def __post_init__(self):
        _require_divides("num_kv_heads", self.kv_heads, self.num_heads)
        _require(
            self.rotary_dim % 2 == 0,
            "rope_fraction",
            self.rope_fraction,
            "an even number of rotated channels",
        )
        _require(self.conv_width >= 0, "conv_width", self.conv_width, "0 for none, or a width")
        is_mamba = self.decay == "scalar" and self.kv_heads == self.num_heads
        expected = "logsigmoid unless decay is 'scalar' and num_kv_heads is num_heads (Mamba-2)"
        _require(self.decay_form != "softplus" or is_mamba, "decay_form", self.decay_form, expected)

    @property
    def kv_heads(self) -> int:
        """The number of key and value heads: `num_kv_heads`, or `num_heads` where that is None."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

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


def _require_divides(name: str, part: int, whole: int) -> None:
    _require(part >= 1 and whole % part == 0, name, part, f"a divisor of {whole}")
