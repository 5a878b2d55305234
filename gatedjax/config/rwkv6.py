"""The configuration of RWKV-6's two layers."""

from dataclasses import dataclass
from typing import Annotated, Literal

from gatedjax.config.checks import Checked, Range, Size, SizeOrZero


@dataclass(frozen=True)
class RWKV6Config(Checked):
    """RWKV-6's time mixing (arXiv 2404.05892). num_heads x value_dim is the width of the model.

    The published key_dim and value_dim are 64. With shift_rank = 0 and decay_rank = 0, where
    nothing but receptance, key, value and gate follows the token, it is RWKV-5's.
    """

    kind: Literal["rwkv6"] = "rwkv6"
    num_heads: Size = 4
    # channels per head
    key_dim: Size = 32
    value_dim: Size = 32
    # between the two matrices of each of the five token shifts; published: 32, 64 from a width of
    # 4096 on; 0: every token has the same shifts
    shift_rank: SizeOrZero = 32
    # of the decay; published: 64, 128 from a width of 4096 on; 0: every token has the same decays
    decay_rank: SizeOrZero = 64
    # of the LayerNorm of every head's output (1e-5 in flash-linear-attention)
    norm_eps: Annotated[float, Range(0, 1, includes_low=False)] = 64e-5
    chunk_size: Size | None = None

    @property
    def width(self) -> int:
        """Value channels of all heads."""
        return self.num_heads * self.value_dim


@dataclass(frozen=True)
class RWKV6ChannelMixConfig(Checked):
    """RWKV-6's feed-forward: sigmoid(x W) times relu(x W)^2 W, of two token shifts.

    The published hidden is 3.5 width.
    """

    kind: Literal["rwkv6_channel_mix"] = "rwkv6_channel_mix"
    hidden: Size = 448
    not_causal = None  # no token sees a later one
