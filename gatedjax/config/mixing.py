"""The configuration of mixers whose gates mix tokens."""

from dataclasses import dataclass
from typing import Annotated, Literal

from gatedjax.config.checks import Checked, Fraction, Positive, Range, Size, SizeOrZero
from gatedjax.errors import require

# Rows and columns.
Sides = tuple[Size, ...]


@dataclass(frozen=True)
class SpatialGateConfig(Checked):
    """Channels multiplied by a linear map of other tokens' channels: gMLP (arXiv 2105.08050).

    Over blocks and a grid it is the multi-axis block of MAXIM (2201.02973). For rows of one length.
    """

    kind: Literal["spatial_gate"] = "spatial_gate"
    # tokens: all of them, by one matrix. blocks_and_grid: half of the channels within blocks of
    # neighboring patches, the other half between patches at the same place of grid cells
    over: Literal["tokens", "blocks_and_grid"] = "tokens"
    # of tokens: channels of queries, keys and values of an attention of one head, which is added to
    # the map of tokens (aMLP; published: 64); 0 for none
    tiny_attention: SizeOrZero = 0
    # before the gate halves them; of blocks_and_grid, in each of its two branches
    hidden: Size = 256
    # of blocks_and_grid: patches of a block, rows and columns; cells of the grid
    block: Sides = (2, 2)
    grid: Sides = (2, 2)
    not_causal = "kind 'spatial_gate': tokens see later ones"
    only_causal = None

    def check(self) -> None:
        require(self.hidden % 2 == 0, "hidden", self.hidden, "an even number: half of it gates")
        require(
            self.over == "tokens" or not self.tiny_attention,
            "tiny_attention",
            self.tiny_attention,
            "0 over blocks and a grid",
        )
        for name in ("block", "grid"):
            sides = getattr(self, name)
            require(len(sides) == 2, name, sides, "two numbers, rows and columns")


@dataclass(frozen=True)
class MixerGateConfig(Checked):
    """Channels multiplied by what an MLP-Mixer block makes of all tokens: NiNformer (2403.02411).

    For rows of one length.
    """

    kind: Literal["mixer_gate"] = "mixer_gate"
    # of the MLP over tokens, and of the one over channels
    token_hidden: Size = 64
    channel_hidden: Size = 256
    not_causal = "kind 'mixer_gate': tokens see later ones"
    only_causal = None


@dataclass(frozen=True)
class GatedUnitConfig(Checked):
    """A gated attention unit: one head without softmax, in chunks and over them.

    FLASH (arXiv 2202.10447), or MossFormer's, whose gate attends too (2302.11824). Published:
    key_dim 128, chunks of 256 tokens.
    """

    kind: Literal["gated_unit"] = "gated_unit"
    form: Literal["flash", "mossformer"] = "flash"
    # channels of the values and of what gates them, each
    hidden: Size = 256
    # of queries and keys
    key_dim: Size = 64
    # Tokens that see each other by relu(q k / chunk)^2; those of other chunks by q k / chunk, or
    # q k / T where tokens see later ones.
    chunk: Size = 64
    # False: tokens also see later ones. For encoders, and rows of one document.
    causal: bool = True
    # half of the channels of the input are those of the token before (MossFormer)
    token_shift: bool = False
    # of a depthwise convolution that is added to u, v and z, and to the output behind a norm and
    # a SiLU (MossFormer: 17); 0: none of them
    conv_width: Annotated[int, Range(0, 256)] = 0
    # fraction of the channels of queries and keys that rotate
    rope_fraction: Fraction = 0.25
    rope_base: Annotated[float, Range(1)] = 10_000.0

    def check(self) -> None:
        require(
            self.rotary_dim % 2 == 0,
            "rope_fraction",
            self.rope_fraction,
            "an even number of rotated channels",
        )
        for name in ("token_shift", "conv_width"):
            value = getattr(self, name)
            require(not (self.causal and value), name, value, "none with causal true")

    @property
    def rotary_dim(self) -> int:
        """Channels of queries and keys that rotate."""
        return int(self.key_dim * self.rope_fraction)

    @property
    def not_causal(self) -> str | None:
        """Why a causal model cannot have this mixer, or None."""
        return None if self.causal else "causal false: tokens see later ones"

    @property
    def only_causal(self) -> str | None:
        """Why an encoder cannot have it, or None."""
        return "causal true: tokens do not see later ones" if self.causal else None


@dataclass(frozen=True)
class AssociativeMemoryConfig(Checked):
    """A causal convolution and a learned memory, a sigmoid gate each (GAM, arXiv 2509.00605)."""

    kind: Literal["associative_memory"] = "associative_memory"
    # the model's
    width: Size = 128
    # rows of the memory; published: 512
    slots: Size = 128
    conv_width: Annotated[int, Range(1, 256)] = 3
    not_causal = None
    only_causal = "kind 'associative_memory': a token sees those before it"


@dataclass(frozen=True)
class GatedPositionalConfig(Checked):
    """ConViT's attention: by content and by position, blended by a gate a head (arXiv 2103.10697).

    For images whose tokens are all patches (model.patches.pooling mean).
    """

    kind: Literal["gated_positional"] = "gated_positional"
    # divides the model's width
    num_heads: Size = 4
    # how sharply heads look at their place at the start
    locality: Positive = 1.0
    not_causal = "kind 'gated_positional': tokens see later ones"
    only_causal = None
