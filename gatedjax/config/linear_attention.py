"""The configuration of gated linear attention and of the delta rule."""

from dataclasses import dataclass
from typing import Annotated, Literal

from gatedjax.config.checks import (
    Checked,
    Count,
    Fraction,
    NonNegative,
    Positive,
    Range,
    Seed,
    Size,
    divides,
)
from gatedjax.config.features import WIDER_MAPS, feature_dim
from gatedjax.config.rope import RopeBase, check_rope
from gatedjax.errors import require


@dataclass(frozen=True)
class GatedLinearAttentionConfig(Checked):
    """Gated linear attention (arXiv 2312.06635) and its relatives.

    They differ by their decay: RetNet's, one like Mamba-2's, none at all (plain linear attention).
    The layer of Mamba-2 itself is `mamba2`.
    """

    kind: Literal["gated_linear_attention"] = "gated_linear_attention"
    num_heads: Size = 4
    # None: as many as num_heads
    num_kv_heads: Size | None = None
    # channels per head; the paper has K = M / 2 / H, V = M / H
    key_dim: Size = 16
    value_dim: Size = 32
    decay: Literal["vector", "scalar", "constant", "none"] = "vector"
    # logsigmoid: g = logsigmoid(x W1 W2 + b) / decay_temperature (GLA). softplus: g = -exp(A_log)
    # softplus(x W + b), and values are multiplied by that softplus (as in Mamba-2). A constant
    # decay is RetNet's log(1 - 2^(-5-h)). forget_gate: g = log f with f = floor + (1 - floor)
    # sigmoid(x W) for every key channel, and 1 - f in place of keys (HGRN2).
    decay_form: Literal["logsigmoid", "softplus", "forget_gate"] = "logsigmoid"
    # of the forget gate. by_depth: rises from 0 at the first layer, learned by the model
    decay_floor: Literal["none", "by_depth"] = "none"
    decay_rank: Size = 16
    decay_temperature: Annotated[float, Range(1e-3)] = 16.0
    # What queries and keys become. cosformer: nearer tokens weigh more (arXiv 2202.08791); favor+:
    # positive random features, whose products are exponentials on average (2009.14794)
    feature_map: Literal[
        "identity", "silu", "elu_plus_one", "relu", "unit_silu", "cosformer", "favor+"
    ] = "identity"
    # cosformer: tokens so far apart weigh nothing; the length of documents, or more
    feature_length: Count = 4096
    # favor+: features of a head, None for key_dim log key_dim; and the seed of the random matrix
    num_features: Size | None = None
    feature_seed: Seed = 0
    # divide by the sum of the weights (linear attention with a positive feature map)
    normalize: bool = False
    output_gate: Literal["swish", "sigmoid", "none"] = "swish"
    # of the output: each head by itself, or the channels of all heads together (HGRN2)
    norm_heads: Literal["each", "all"] = "each"
    # of that norm; None for the model's
    norm_eps: Annotated[float, Range(0, 1, includes_low=False)] | None = None
    # causal depthwise convolution on q, k, v; 0 for none
    conv_width: Annotated[int, Range(0, 256)] = 0
    # of the convolution, before its SiLU
    conv_bias: bool = False
    # RetNet rotates q and k
    rope_fraction: Fraction = 0.0
    rope_base: RopeBase = 10_000.0
    # RoPE whose angles are sums over the document of what the layer's input says (Selective RoPE,
    # arXiv 2511.17388): by a matrix of selective_rank from the whole input, or by one matrix for
    # each key head from its slice of the input.
    selective_rope: Literal["none", "low_rank", "per_head"] = "none"
    selective_rank: Size = 16
    # taps of the causal convolution on the angles' steps, and what follows it
    selective_conv: Annotated[int, Range(1, 256)] = 4
    selective_activation: Literal["silu", "none"] = "silu"
    # the steps times a sigmoid of the input, one for each key head
    selective_gate: bool = False
    # the steps plus exp(b), b = 0 at the start: 1, the step of RoPE
    selective_bias: bool = False
    chunk_size: Size | None = None

    def check(self) -> None:
        divides("num_kv_heads", self.kv_heads, self.num_heads)
        check_rope(self.rotary_dim, self.rope_fraction, self.selective_rope)
        if self.decay_form == "softplus":
            is_scalar = self.decay == "scalar" and self.kv_heads == self.num_heads
            require(
                is_scalar,
                "decay_form",
                self.decay_form,
                "logsigmoid unless decay is 'scalar' and num_kv_heads is num_heads",
            )
        if self.decay_form == "forget_gate":
            self._check_forget_gate()
        if self.feature_map in WIDER_MAPS:
            self._check_features()
        require(
            self.decay_floor == "none" or self.decay_form == "forget_gate",
            "decay_floor",
            self.decay_floor,
            f"'none' with decay_form {self.decay_form!r}",
        )

    def _check_features(self) -> None:
        """What has a place beside features that are more than the key's channels."""
        is_plain = (
            self.normalize
            and self.decay != "vector"
            and self.decay_form != "forget_gate"
            and self.rope_fraction == 0
        )
        require(
            is_plain,
            "feature_map",
            self.feature_map,
            "a map of channels unless normalize is true, decay is not 'vector' and rope_fraction "
            "is 0",
        )

    def _check_forget_gate(self) -> None:
        """What has a place beside keys that are made of the gate."""
        is_plain = self.kv_heads == self.num_heads and not self.conv_width and not self.normalize
        require(
            self.decay == "vector" and is_plain,
            "decay_form",
            self.decay_form,
            "logsigmoid unless decay is 'vector', num_kv_heads is num_heads, conv_width is 0 and "
            "normalize is false",
        )

    @property
    def kv_heads(self) -> int:
        """The number of key and value heads: `num_kv_heads`, or `num_heads` where that is None."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def memory(self) -> tuple[int, int]:
        """Heads and channels of what is read from the state (`config/sources.py`)."""
        return self.num_heads, self.value_dim

    @property
    def features_per_head(self) -> int:
        """Channels of a head's features, of queries and keys."""
        return feature_dim(self.feature_map, self.key_dim, self.num_features)

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that rotate."""
        return int(self.key_dim * self.rope_fraction)


@dataclass(frozen=True)
class DeltaAttentionConfig(Checked):
    """The delta rule: DeltaNet (arXiv 2406.06484) and what gates it.

    Gated DeltaNet (2412.06464), the default; Kimi Delta Attention (2510.26692): decay "vector", a
    sigmoid output gate; Gated DeltaNet-2 (2605.22791): erase_and_write "channels" too.
    DeltaProduct (2502.10297): num_householder; Comba (2506.02475): the two feedbacks.
    """

    kind: Literal["delta_attention"] = "delta_attention"
    # one state, one value and one output per head
    num_heads: Size = 4
    # query and key heads; None: as many as num_heads
    num_key_heads: Size | None = None
    key_dim: Size = 32
    value_dim: Size = 32
    # none: DeltaNet; one decay per head or per key channel
    decay: Literal["none", "scalar", "vector"] = "scalar"
    # softplus: -exp(A_log) softplus(x W + b); bounded: -decay_bound sigmoid(exp(A_log) (x W + b)),
    # KDA's safe gate
    decay_form: Literal["softplus", "bounded"] = "softplus"
    decay_bound: Positive = 5.0
    # channels between the two matrices of a vector decay; None: one matrix
    decay_rank: Size | None = None
    # channels: an erase gate for each key channel and a write gate for each value channel
    erase_and_write: Literal["heads", "channels"] = "heads"
    # beta up to 2: a state may change its sign (arXiv 2411.12537)
    negative_eigenvalues: bool = False
    output_gate: Literal["swish", "sigmoid", "none"] = "swish"
    # channels between the two matrices of the output gate; None: one matrix
    output_gate_rank: Size | None = None
    # causal depthwise convolution and SiLU on q, k, v; 0 for none
    conv_width: Annotated[int, Range(0, 256)] = 4
    # of the convolution, before its SiLU
    conv_bias: bool = False
    # of the norm of the heads' outputs (1e-5 in OLMo-Hybrid); None: the model's
    norm_eps: Annotated[float, Range(0, 1, includes_low=False)] | None = None
    # steps of the rule a token, each with a key and a value of its own (DeltaProduct)
    num_householder: Size = 1
    # Comba: a learned fraction of beta erases, of the state before its decay.
    state_feedback: bool = False
    # Comba: queries less a learned multiple of the key, which starts from this; None: no such
    output_feedback: NonNegative | None = None
    chunk_size: Size | None = None

    def check(self) -> None:
        self._check_steps()
        divides("num_key_heads", self.key_heads, self.num_heads)
        require(
            self.decay_form == "softplus" or self.decay == "vector",
            "decay_form",
            self.decay_form,
            "softplus unless decay is 'vector'",
        )
        require(
            self.decay_rank is None or self.decay == "vector",
            "decay_rank",
            self.decay_rank,
            "none unless decay is 'vector'",
        )
        require(
            self.output_gate_rank is None or self.output_gate != "none",
            "output_gate_rank",
            self.output_gate_rank,
            "none without an output gate",
        )

    def _check_steps(self) -> None:
        """What has a place beside several steps a token, and beside an erase key of its own."""
        has_one_key = not self.state_feedback and self.output_feedback is None
        require(
            self.num_householder == 1 or (self.erase_and_write == "heads" and has_one_key),
            "num_householder",
            self.num_householder,
            "1 unless erase_and_write is 'heads', without state_feedback and output_feedback",
        )
        require(
            not self.state_feedback or self.erase_and_write == "heads",
            "state_feedback",
            self.state_feedback,
            "false unless erase_and_write is 'heads'",
        )

    @property
    def memory(self) -> tuple[int, int]:
        """Heads and channels of what is read from the state (`config/sources.py`)."""
        return self.num_heads, self.value_dim

    @property
    def key_heads(self) -> int:
        """The number of query and key heads: `num_key_heads`, or `num_heads` where it is None."""
        return self.num_heads if self.num_key_heads is None else self.num_key_heads
