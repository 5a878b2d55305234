"""What the mixers that a trained attention layer is converted into take over from it.

They have its parameters, under its names, and those of its options that make sense for them.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

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
