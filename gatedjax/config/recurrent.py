"""The configuration of Mamba-2 and of RWKV-7, whose layers are built as published."""

from dataclasses import dataclass
from typing import Annotated, Literal

from gatedjax.config.checks import (
    Checked,
    NonNegative,
    Positive,
    Range,
    Size,
    divides,
)
from gatedjax.errors import require


@dataclass(frozen=True)
class Mamba2Config(Checked):
    """Mamba-2 (arXiv 2405.21060). Sizes of the paper: head_dim 64, state_dim 128, one group.

    num_heads x head_dim is twice the width there.
    """

    kind: Literal["mamba2"] = "mamba2"
    num_heads: Size = 4
    # channels of x, of the skip and of the output gate, per head
    head_dim: Size = 32
    # channels of B and C, which the heads of a group share; the output is normed within a group
    state_dim: Size = 32
    num_groups: Size = 1
    # causal depthwise convolution and SiLU on x, B and C
    conv_width: Annotated[int, Range(1, 256)] = 4
    # of the convolution, before its SiLU
    conv_bias: bool = True
    # Step sizes softplus(x W + bias) are clipped to these; None: no upper limit.
    min_step_size: NonNegative = 0.0
    max_step_size: Positive | None = None
    chunk_size: Size | None = None

    def check(self) -> None:
        divides("num_groups", self.num_groups, self.num_heads)
        if self.max_step_size is not None:
            require(
                self.min_step_size < self.max_step_size,
                "min_step_size",
                self.min_step_size,
                f"less than max_step_size = {self.max_step_size}",
            )

    @property
    def memory(self) -> tuple[int, int]:
        """Heads and channels of what is read from the state (`config/sources.py`)."""
        return self.num_heads, self.head_dim


@dataclass(frozen=True)
class RWKV7Config(Checked):
    """RWKV-7's time mixing (arXiv 2503.14456). num_heads x head_dim is the width of the model.

    The published head_dim is 64. The ranks are the channels between two matrices.
    """

    kind: Literal["rwkv7"] = "rwkv7"
    num_heads: Size = 4
    head_dim: Size = 32
    # published: 2.5 sqrt(width), to a multiple of 32
    decay_rank: Size = 32
    # of the in-context learning rate; published as the decay's
    rate_rank: Size = 32
    # of the gate between a layer's values and the first layer's; published: 1.7 sqrt(width)
    value_rank: Size = 32
    # of the output gate; published: 5 sqrt(width)
    output_gate_rank: Size = 32
    # of the LayerNorm of every head's output; published: 1e-5 head_dim, of a head_dim of 64
    norm_eps: Annotated[float, Range(0, 1, includes_low=False)] = 64e-5
    chunk_size: Size | None = None

    @property
    def width(self) -> int:
        """Channels of all heads."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class RWKV7ChannelMixConfig(Checked):
    """RWKV-7's feed-forward: a token shift, then relu(x W)^2 W. The published hidden is 4 width."""

    kind: Literal["rwkv7_channel_mix"] = "rwkv7_channel_mix"
    hidden: Size = 512
    not_causal = None  # no token sees a later one
