"""The configuration of multi-head latent attention."""

from dataclasses import dataclass
from typing import Annotated, Literal

from gatedjax.config.checks import (
    Checked,
    Count,
    NonNegative,
    Positive,
    Range,
    Size,
    SizeOrZero,
)
from gatedjax.errors import require


@dataclass(frozen=True)
class MLAConfig(Checked):
    """Multi-head latent attention (arXiv 2405.04434): keys and values of all heads are made from
    one latent vector a token, which is all that decoding keeps.

    Defaults: DeepSeek-V2's layer, small and with whole queries.
    """

    kind: Literal["mla"] = "mla"
    num_heads: Size = 4
    # channels of the latent
    kv_rank: Size = 64
    # of a latent that queries are made from; None: queries are made from the layer's input
    q_rank: Size | None = None
    # Channels of a head's query and key: its own, and those whose keys all heads share. Only the
    # latter rotate.
    nope_dim: Size = 32
    rope_dim: SizeOrZero = 16
    # channels of a head's value
    value_dim: Size = 32
    # of the norms on the latents
    latent_norm_eps: Annotated[float, Range(0, 1, includes_low=False)] = 1e-6
    # How the shared channels rotate: channel 2i with 2i + 1 (DeepSeek), i with i + rope_dim / 2,
    # or not at all (Kimi-Linear).
    rope: Literal["interleaved", "halves", "none"] = "interleaved"
    # below 1 the slowest channels would rotate the fastest, and overflow
    rope_base: Annotated[float, Range(1)] = 10_000.0
    # context extension factor of YaRN (arXiv 2309.00071); 1 for none
    yarn_factor: Annotated[float, Range(1)] = 1.0
    yarn_original_length: Count = 4096
    # With g(m) = 0.1 m log(yarn_factor) + 1: rotated channels are multiplied by g(yarn_mscale) /
    # g(yarn_mscale_all), logits by g(yarn_mscale_all)^2.
    yarn_mscale: NonNegative = 1.0
    yarn_mscale_all: NonNegative = 0.0
    # What multiplies q k, before YaRN; None: (nope_dim + rope_dim)^-0.5.
    attention_scale: Positive | None = None
    # keys in (i - window, i]
    window: Count | None = None
    # how logits become weights; as in gated attention, those without a length
    normalizer: Literal[
        "softmax",
        "softpick",
        "self_adjust",
        "stablemax",
        "softplus",
        "adaptive_temperature",
        "sparsemax",
    ] = "softmax"
    # one learned logit per head in the denominator
    sinks: bool = False
    logits_soft_cap: Annotated[float, Range(1e-3)] | None = None
    # The gate on the heads' outputs, before the last projection, as in gated attention. Ling 3:
    # sdpa, headwise.
    gate_position: Literal["none", "sdpa"] = "none"
    gate_granularity: Literal["elementwise", "headwise"] = "elementwise"
    gate_shared: bool = False
    gate_mode: Literal["multiplicative", "additive"] = "multiplicative"
    gate_activation: Literal["sigmoid", "silu", "ns_sigmoid", "identity", "softplus"] = "sigmoid"
    gate_input: Literal["token", "constant"] = "token"

    def check(self) -> None:
        require(
            self.rope == "none" or self.rope_dim % 2 == 0,
            "rope_dim",
            self.rope_dim,
            f"an even number of channels with rope {self.rope!r}",
        )
        require(
            self.normalizer == "softmax" or not self.sinks,
            "sinks",
            self.sinks,
            f"false with normalizer {self.normalizer!r}",
        )

    @property
    def key_dim(self) -> int:
        """Channels of a head's query and key."""
        return self.nope_dim + self.rope_dim

    @property
    def cached_dim(self) -> int:
        """Numbers that decoding keeps of a token, for all heads."""
        return self.kv_rank + self.rope_dim
