"""What the mixers that a trained attention layer is converted into take over from it.

They have its parameters, under its names, and those of its options that make sense for them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from gatedjax.config.attention import GatedAttentionConfig
from gatedjax.config.checks import Count, Size
from gatedjax.errors import require

# All other options of gated attention stay at their defaults.
KEPT = (
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "gate_position",
    "gate_granularity",
    "gate_shared",
    "gate_mode",
    "gate_activation",
    "gate_input",
    "gate_hidden",
    "gate_start",
    "gate_fine_tuning",
    "fused_gate",
    "bias",
    "qk_norm",
    "qk_norm_kind",
    "zero_centered_norm",
    "attention_scale",
    "rope_fraction",
    "rope_base",
    "rope_layout",
    "yarn_factor",
    "yarn_original_length",
    "yarn_truncate",
    "llama3_factor",
    "llama3_low",
    "llama3_high",
    "llama3_original_length",
)
# The kinds of these mixers.
CONVERTED = ("lizard", "rad_rwkv6", "rad_rwkv7")


def check_taken_over(config: Any, attention: type) -> None:
    """InputError if a converted mixer has an option that it makes nothing of.

    Args:
      config: of the mixer, a subclass of gated attention's.
      attention: gated attention's own class.
    """
    require(
        config.gate_position in ("none", "sdpa"),
        "gate_position",
        config.gate_position,
        f"'none' or 'sdpa' in a layer of kind {config.kind!r}",
    )
    for field in fields(attention):
        name = field.name
        if name in (*KEPT, *config.OWN):
            continue
        value = getattr(config, name)
        expected = f"{field.default!r} in a layer of kind {config.kind!r}"
        require(value == field.default, name, value, expected)


def check_windows(mixers: Mapping[str, Any], seq_len: int, prefix: str = "") -> None:
    """InputError if a converted layer's window is longer than the rows of its training.

    The other part of the layer, which is for what the window does not reach, would learn nothing.

    Args:
      mixers: of the model.
      seq_len: of the rows.
      prefix: of the keys, for the message.
    """
    for name, mixer in mixers.items():
        if mixer.kind == "lizard":
            require(
                mixer.window <= seq_len,
                f"{prefix}model.mixers.{name}.window",
                mixer.window,
                f"at most {prefix}data.seq_len = {seq_len}",
            )


@dataclass(frozen=True)
class LizardConfig(GatedAttentionConfig):
    """Lizard (arXiv 2507.09025): gated linear attention for all tokens plus softmax attention for
    the last ones, for a layer that was gated attention. It has the keys of that layer too.
    """

    kind: Literal["lizard"] = "lizard"  # pyrefly: ignore  (a kind of its own)
    # the softmax sees keys in (i - window, i]; at most the length of the rows of training
    window: Count = 128
    # learned logits of every head in the denominator of the window's softmax, which have no values
    meta_logits: Size = 4
    # Features of a head are softmax(x W) and softmax(-x W), so many each; None: head_dim.
    feature_dim: Size | None = None
    chunk_size: Size | None = None

    only_causal = "kind 'lizard': a state passes from each token to the next"
    OWN = ("kind", "window")

    def check(self) -> None:
        super().check()
        check_taken_over(self, GatedAttentionConfig)

    @property
    def features(self) -> int:
        """Columns of a feature map's matrix."""
        return self.head_dim if self.feature_dim is None else self.feature_dim


@dataclass(frozen=True)
class RADRWKV6Config(GatedAttentionConfig):
    """RAD-RWKV6 (arXiv 2505.03005): a scan with a decay for each key channel, for a layer that was
    gated attention. No norm; `gate_position` "sdpa" is the gate that the paper adds. It has the
    keys of gated attention too.
    """

    kind: Literal["rad_rwkv6"] = "rad_rwkv6"  # pyrefly: ignore  (a kind of its own)
    # channels between the two matrices of the decay
    decay_rank: Size = 32
    chunk_size: Size | None = None

    only_causal = "kind 'rad_rwkv6': a state passes from each token to the next"
    OWN = ("kind",)

    def check(self) -> None:
        super().check()
        check_taken_over(self, GatedAttentionConfig)


@dataclass(frozen=True)
class RADRWKV7Config(GatedAttentionConfig):
    """RAD-RWKV7 (arXiv 2505.03005): RWKV-7's rule, for a layer that was gated attention.

    No token shift, no bonus, no norm; `gate_position` "sdpa" is the gate that the paper adds. It
    has the keys of gated attention too.
    """

    kind: Literal["rad_rwkv7"] = "rad_rwkv7"  # pyrefly: ignore  (a kind of its own)
    # channels between the two matrices of the decay
    decay_rank: Size = 32
    # of the in-context learning rate
    rate_rank: Size = 32
    chunk_size: Size | None = None

    only_causal = "kind 'rad_rwkv7': a state passes from each token to the next"
    OWN = ("kind",)

    def check(self) -> None:
        super().check()
        check_taken_over(self, GatedAttentionConfig)
