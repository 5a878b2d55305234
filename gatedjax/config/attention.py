"""The configuration of gated softmax attention."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from gatedjax.config.attention_checks import DOUBLY_STOCHASTIC, check_options
from gatedjax.config.checks import (
    Checked,
    Count,
    CountOrZero,
    Fraction,
    NonNegative,
    Positive,
    Range,
    Size,
    SizeOrZero,
)
from gatedjax.config.rope import RopeBase

# Where a sigmoid can start.
InsideUnit = Annotated[
    float,
    Range(0, 1, includes_low=False, includes_high=False, words="between 0 and 1, both left out"),
]


@dataclass(frozen=True)
class GatedAttentionConfig(Checked):
    """Gated softmax attention (arXiv 2505.06708).

    Defaults: the study's best variant, G1 with an elementwise sigmoid.
    """

    kind: Literal["gated_attention"] = "gated_attention"
    num_heads: Size = 4
    # None: as many as num_heads
    num_kv_heads: Size | None = None
    head_dim: Size = 32
    # After SDPA (G1), value (G2), key (G3), query (G4), dense output (G5). Keys and queries: after
    # QK-norm, before RoPE.
    gate_position: Literal["none", "sdpa", "value", "key", "query", "output"] = "sdpa"
    gate_granularity: Literal["elementwise", "headwise"] = "elementwise"
    # one gate for all heads, the mean over heads of their gates
    gate_shared: bool = False
    gate_mode: Literal["multiplicative", "additive"] = "multiplicative"
    gate_activation: Literal["sigmoid", "silu", "ns_sigmoid", "identity", "softplus"] = "sigmoid"
    # constant: a zero-initialized parameter, no input. head: one number a head, from the head's own
    # slice of the layer's input (arXiv 2306.12929)
    gate_input: Literal["token", "constant", "head"] = "token"
    # of gate_input head: channels of a ReLU between two matrices; None for one matrix
    gate_hidden: Size | None = None
    # What a head-wise gate is at the start, by its bias. None: 0.5; a gate of the whole token then
    # has no bias.
    gate_start: InsideUnit | None = None
    # The output is divided by gate_start and the gate's weights start small: a trained model that
    # is given the gate starts as what it was.
    gate_fine_tuning: bool = False
    # queries and gate in one projection, [q | gate] in every head, as Qwen3-Next
    fused_gate: bool = False
    # Biases of the projections: of queries, keys and values (Qwen2); of the output too (gpt-oss).
    bias: Literal["none", "qkv", "all"] = "none"
    qk_norm: bool = True
    # rms: every head by itself; rms_all_heads: the channels of all heads together (OLMo 2); l2:
    # queries and keys of length 1, without parameters.
    qk_norm_kind: Literal["rms", "rms_all_heads", "l2"] = "rms"
    # an rms QK-norm scales by 1 + w
    zero_centered_norm: bool = False
    # What multiplies q k: head_dim^-0.5; a learned number, log2(L^2 - L) at the start
    # (arXiv 2010.04245); log head_dim.
    logit_scale: Literal["inverse_sqrt", "learned", "log_dim"] = "inverse_sqrt"
    # in place of head_dim^-0.5
    attention_scale: Positive | None = None
    # What queries are multiplied by, where n is the number of keys that a token sees: log n; s log
    # n with a learned s per head (scalable softmax, arXiv 2501.19399); or by the token and log n,
    # values by the token too (selective attention, arXiv 2411.12892).
    query_scale: Literal["none", "log_length", "scalable_softmax", "selective"] = "none"
    # fraction of a head's channels that rotate; 0 for no position encoding
    rope_fraction: Fraction = 1.0
    rope_base: RopeBase = 10_000.0
    # Which channels are a pair, of n that rotate: i with i + n / 2 (Llama, Qwen), or 2i with 2i + 1
    # (GPT-J).
    rope_layout: Literal["halves", "interleaved"] = "halves"
    # Of images: half of the rotated channels turn by the row of a patch, half by its column; the
    # class token does not turn.
    rope_grid: bool = False
    # context extension factor of YaRN (arXiv 2309.00071); 1 for none
    yarn_factor: Annotated[float, Range(1)] = 1.0
    yarn_original_length: Count = 4096
    # YaRN's bounds are whole pairs; gpt-oss takes them as they come
    yarn_truncate: bool = True
    # Llama 3.1's extension; 1 for none. Pairs that rotate fewer than llama3_low times over the
    # original length are slowed so many times, those that rotate more than llama3_high times kept.
    llama3_factor: Annotated[float, Range(1)] = 1.0
    llama3_low: Positive = 1.0
    llama3_high: Positive = 4.0
    llama3_original_length: Count = 8192
    # RoPE whose angles are sums over the document of what the layer's input says (Selective RoPE,
    # arXiv 2511.17388): by a matrix of selective_rank from the whole input, or by one matrix for
    # each key head from its slice of the input. QK-norm is then after the rotation.
    selective_rope: Literal["none", "low_rank", "per_head"] = "none"
    selective_rank: Size = 16
    # taps of the causal convolution on the angles' steps, and what follows it
    selective_conv: Annotated[int, Range(1, 256)] = 4
    selective_activation: Literal["silu", "none"] = "silu"
    # the steps times a sigmoid of the input, one for each key head
    selective_gate: bool = False
    # the steps plus exp(b), b = 0 at the start: 1, the step of RoPE
    selective_bias: bool = False
    # keys in (i - window, i]
    window: Count | None = None
    # False: tokens also see later ones of their document, window - 1 of them where there is a
    # window. For encoders; the language model refuses it.
    causal: bool = True
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
        "learned_entmax",
        "reluformer",
        "exp",
        "exp_mean",
        "plain_self_adjust",
        "normalized_pooling",
        "centered_softmax",
        "sinkhorn",
        "qr",
    ] = "softmax"
    # n of sigmoid's -log n, of relu's 1 / n, of the clip; L of the learned scales' start. A
    # constant, so that training and decoding agree: the length of training rows.
    normalizer_length: Count | None = None
    # above 1 (softmax) up to 2 (sparsemax)
    entmax_alpha: Annotated[float, Range(1, 2, includes_low=False)] = 1.5
    # of clipped softmax: gamma = -alpha / n
    clip_alpha: NonNegative = 4.0
    # of reweighted softplus
    reweight_power: Annotated[int, Range(2, 100)] = 15
    # of exp and exp_mean: weights are exp(min(s, exp_cap))
    exp_cap: Positive = 5.0
    # Of sinkhorn, not causal: how often rows and columns are divided by their sums, by turns, and
    # the temperature (arXiv 2110.11773). qr is the other doubly stochastic one (2504.16275).
    sinkhorn_iterations: Count = 3
    sinkhorn_epsilon: Positive = 1.0
    # Weight of reluformer's loss, which keeps the sum of a row's weights near 1 and their entropy
    # from growing (arXiv 2302.06461); costs two more calls of the op with one value channel.
    reluformer_loss: NonNegative = 0.0
    # What logits say of queries and keys: their product, or gaussian: -|q - k|^2 / 2. Costs two
    # channels of queries and keys in float32, six in bfloat16.
    similarity: Literal["product", "gaussian"] = "product"
    # What follows the op, every head by itself, before a gate on its output (arXiv 2505.06708,
    # table 3).
    after_sdpa: Literal["none", "rms_norm", "layer_norm", "silu"] = "none"
    # The token's own value times a learned number per head, 1 at the start, added to the output
    # (arXiv 2306.17759, 2311.01906).
    value_skip: bool = False
    # one learned logit per head in the denominator
    sinks: bool = False
    # One of every token per head, a linear map of the layer's input (Inkling 2). Costs a channel of
    # queries and keys in float32, three in bfloat16.
    token_sinks: bool = False
    logits_soft_cap: Annotated[float, Range(1e-3)] | None = None
    # Logits less slope x distance. fixed: slopes 2^(-8 h / H); balanced: 2^-h for one half of the
    # heads, the negatives for the other (arXiv 2502.18845); learned: a parameter, fixed at the
    # start.
    alibi: Literal["none", "fixed", "balanced", "learned"] = "none"
    # Vectors of every token in a bank that all layers with one share. A gate each says how much of
    # them is added to the values (MoVE, arXiv 2601.22887).
    value_bank: SizeOrZero = 0
    # The weights of the attention layer before it that has its own: no queries, no keys, only
    # values; and a matrix of the input added to the output (UniAttn, arXiv 2502.00439).
    shares_weights: bool = False
    # The keys and values of the attention layer before it that has its own: queries alone, and no
    # cache (YOCO, arXiv 2405.05254; the cross-decoder of SambaY, 2507.06607).
    shares_cache: bool = False
    # Learned keys and values that every token sees beside the others; their logits a become
    # a + alpha tanh(tau a), alpha and tau learned (NoRGa, arXiv 2405.14124). 0 for none
    prefix: SizeOrZero = 0
    # Channels of a gate over blocks of 64 keys (SeerAttention, arXiv 2410.13276); 0 for none. It
    # learns the largest weight in every pair of blocks, by a loss of this weight, and nothing else
    # learns by that.
    block_gate: SizeOrZero = 0
    block_gate_loss: NonNegative = 10.0
    # Blocks that are attended to, beside a query's own: so many of the most likely ones, or those
    # of a probability from here on (published: 5e-3); 0: all. Single tokens that are decoded see
    # all.
    block_gate_top: CountOrZero = 0
    block_gate_threshold: Fraction = 0.0

    def check(self) -> None:
        check_options(self)

    def with_weights_of(self, other: "GatedAttentionConfig") -> "GatedAttentionConfig":
        """This layer, with what decides over the weights taken from another one."""
        of_layer = (
            "shares_weights",
            "value_bank",
            "bias",
            "value_skip",
            "after_sdpa",
            "reluformer_loss",
            "prefix",
            "block_gate",
        )
        own = {
            name: getattr(self, name)
            for name in vars(self)
            if name.startswith("gate_") or name in of_layer
        }
        return replace(other, fused_gate=False, **own)

    @property
    def kv_heads(self) -> int:
        """The number of key and value heads: `num_kv_heads`, or `num_heads` where that is None."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def not_causal(self) -> str | None:
        """Why a causal model cannot have this mixer, or None."""
        return None if self.causal else "causal false: tokens see later ones"

    @property
    def only_causal(self) -> str | None:
        """Why an encoder cannot have this mixer, or None."""
        return "causal true: tokens do not see later ones" if self.causal else None

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that rotate."""
        return int(self.head_dim * self.rope_fraction)

    @property
    def changes_output(self) -> bool:
        """Whether something stands between the op and the gate on its output."""
        return self.value_skip or self.after_sdpa != "none"

    @property
    def gates_in_op(self) -> bool:
        """Whether what the op returns is all that a gate on the output multiplies."""
        return not (self.changes_output or self.prefix or self.is_doubly_stochastic)

    @property
    def is_doubly_stochastic(self) -> bool:
        """Whether the weights of every key sum to 1, too."""
        return self.normalizer in DOUBLY_STOCHASTIC
