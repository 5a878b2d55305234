"""What layers take from layers before them: the memory of a scan, the keys and values of attention.

SambaY (arXiv 2507.06607) is made of both. A layer takes from the last one before it that has what
it takes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from gatedjax.config.attention import GatedAttentionConfig
from gatedjax.config.checks import Checked, Size, divides
from gatedjax.errors import require

if TYPE_CHECKING:
    from gatedjax.config.model import BlockConfig

# What keys and values in a cache depend on, and which of them a query sees. The names of keys, with
# those of the values that are compared where they are others.
_OF_KEYS = {
    "num_kv_heads": "kv_heads",
    "head_dim": "head_dim",
    "window": "window",
    "rope_fraction": "rope_fraction",
    "rope_base": "rope_base",
    "rope_layout": "rope_layout",
    "yarn_factor": "yarn_factor",
    "yarn_original_length": "yarn_original_length",
    "yarn_truncate": "yarn_truncate",
    "llama3_factor": "llama3_factor",
    "llama3_low": "llama3_low",
    "llama3_high": "llama3_high",
    "llama3_original_length": "llama3_original_length",
    "token_sinks": "token_sinks",
    "selective_rope": "selective_rope",
    "similarity": "similarity",
    "causal": "causal",
}


@dataclass(frozen=True)
class GatedMemoryConfig(Checked):
    """The gated memory unit of SambaY (arXiv 2507.06607): norm(M silu(x W_1)) W_2.

    M is what the last scan before it (mamba2, delta_attention, gated_linear_attention) reads from
    its state for the token, before its own norm and gate. It needs no cache.
    """

    kind: Literal["gated_memory"] = "gated_memory"
    # of that scan's output: num_heads x head_dim (mamba2), num_heads x value_dim (the others)
    num_heads: Size = 4
    head_dim: Size = 32
    # An RMSNorm of the product. Published without it for Mamba-1, with it for all scans here.
    norm: bool = True
    # of neighboring heads, which are normed together; published: one of all
    num_groups: Size = 1

    def check(self) -> None:
        divides("num_groups", self.num_groups, self.num_heads)


def memory_of(mixer: Any) -> tuple[int, int] | None:
    """Heads and channels of what a mixer reads from its state; None for one that hands on none."""
    return getattr(mixer, "memory", None)


def has_own_keys(mixer: Any) -> bool:
    """Whether a mixer's keys and values may be other layers' too."""
    if not isinstance(mixer, GatedAttentionConfig) or mixer.kind != "gated_attention":
        return False
    return not mixer.shares_weights and not mixer.shares_cache


def takes_keys(mixer: Any) -> TypeGuard[GatedAttentionConfig]:
    """Whether a mixer has the keys and values of another layer."""
    return isinstance(mixer, GatedAttentionConfig) and mixer.shares_cache


def check_sources(
    blocks: Sequence["BlockConfig"],
    key_of: Callable[["BlockConfig"], str],
) -> None:
    """InputError unless every layer that takes something finds it, in its own sizes.

    Args:
      blocks: of the program, in order.
      key_of: the key of a block's mixer, for the message.
    """
    for i, block in enumerate(blocks):
        key = key_of(block)
        if isinstance(block.mixer, GatedMemoryConfig):
            what = "a scan (mamba2, delta_attention, gated_linear_attention)"
            source = _source(blocks, i, lambda mixer: memory_of(mixer) is not None, key, what)
            sizes = memory_of(source.mixer)
            found = (block.mixer.num_heads, block.mixer.head_dim)
            expected = f"{sizes}, as {key_of(source)} has them"
            require(found == sizes, f"{key}.num_heads and head_dim", found, expected)
        if takes_keys(block.mixer):
            what = "gated_attention with keys of its own"
            source = _source(blocks, i, has_own_keys, f"{key}.shares_cache", what)
            for name, value in _OF_KEYS.items():
                own = getattr(block.mixer, value)
                other = getattr(source.mixer, value)
                expected = f"{other!r}, as in {key_of(source)}, whose keys it has"
                require(own == other, f"{key}.{name}", own, expected)


def cross_decoder(blocks: Sequence["BlockConfig"]) -> str | None:
    """The first block of a model's second decoder, which holds nothing of the tokens before.

    Of a prompt its layers need see the last token alone. It ends the model, and begins in the
    prefix, with the first period or in the suffix. None where no such layer takes from another.

    Args:
      blocks: of the program, in order.
    """
    first = None
    takes = False
    # A period's layers are passed again and again: all of them hold nothing, or none may be cut.
    periods_hold = any(block.is_repeated and not _holds_nothing(block) for block in blocks)
    for i in reversed(range(len(blocks))):
        block = blocks[i]
        if not _holds_nothing(block) or (block.is_repeated and periods_hold):
            break
        takes = takes or isinstance(block.mixer, GatedMemoryConfig) or takes_keys(block.mixer)
        is_inside = block.is_repeated and i > 0 and blocks[i - 1].is_repeated
        if takes and not is_inside:
            first = block.name
    return first


def _holds_nothing(block: "BlockConfig") -> bool:
    """Whether a block computes a token from it alone and from what others hold of the others."""
    is_mixer = block.mixer.kind in ("gated_memory", "no_mixer") or takes_keys(block.mixer)
    return is_mixer and block.feed_forward.kind != "rwkv7_channel_mix"


def _source(
    blocks: Sequence["BlockConfig"],
    reader: int,
    has: Callable[[Any], bool],
    key: str,
    what: str,
) -> "BlockConfig":
    """The last block before a reader that has what it takes.

    Args:
      blocks: of the program, in order.
      reader: the place of the block that takes.
      has: whether a mixer has it.
      key: for the message.
      what: for the message.
    """
    is_repeated = blocks[reader].is_repeated
    before = [block for block in blocks[:reader] if has(block.mixer)]
    require(bool(before), key, "no layer before it to take from", what)
    source = before[-1]
    expected = f"{what} in the prefix, or in the same pattern or suffix before it"
    # The arrays of a period stay in it.
    require(is_repeated or not source.is_repeated, key, "one in the pattern", expected)
    # One that comes after it in the period is before it in the next period.
    of_period = any(has(block.mixer) for block in blocks if block.is_repeated)
    is_clear = source.is_repeated or not is_repeated or not of_period
    require(is_clear, key, "one after it in the pattern", expected)
    return source
