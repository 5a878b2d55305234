"""The configuration of mixers and feed-forwards.

Layers come by kind: to add one, write its dataclass, here or in a file beside, enter it in
MixerConfig or FeedForwardConfig, and name its module in `gatedjax/layers/__init__.py` under the
same kind.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from gatedjax.config.attention import GatedAttentionConfig
from gatedjax.config.bidirectional import BidirectionalLinearAttentionConfig
from gatedjax.config.checks import Checked
from gatedjax.config.converted import LizardConfig, RADRWKV6Config, RADRWKV7Config
from gatedjax.config.feed_forward import GatedMLPConfig, MLPConfig, NoFeedForwardConfig
from gatedjax.config.kalmanet import KalmaNetConfig
from gatedjax.config.linear_attention import DeltaAttentionConfig, GatedLinearAttentionConfig
from gatedjax.config.mixing import (
    AssociativeMemoryConfig,
    GatedPositionalConfig,
    GatedUnitConfig,
    MixerGateConfig,
    SpatialGateConfig,
)
from gatedjax.config.mla import MLAConfig
from gatedjax.config.moe import LoRAMixtureConfig, SoftMoEConfig, SparseMoEConfig
from gatedjax.config.on_demand import AdaptiveMLPConfig, VersatileMLPConfig
from gatedjax.config.recurrent import Mamba2Config, RWKV7ChannelMixConfig, RWKV7Config
from gatedjax.config.rwkv6 import RWKV6ChannelMixConfig, RWKV6Config
from gatedjax.config.sources import GatedMemoryConfig


@dataclass(frozen=True)
class NoMixerConfig(Checked):
    """A block that is a feed-forward alone, as in Nemotron-H."""

    kind: Literal["no_mixer"] = "no_mixer"
    not_causal = None
    only_causal = None


# A kind is causal unless it says otherwise: `only_causal = None` for one that an encoder may have
# too (tasks masked_lm and classify), and `not_causal`, the reason in words, for one in which a
# token sees later ones. Both may be properties of the values. In an encoder a mixer gets no cache,
# and `info.grid` says how the patches of an image lie (None for text).
MixerConfig = (
    GatedAttentionConfig
    | LizardConfig
    | RADRWKV6Config
    | RADRWKV7Config
    | MLAConfig
    | GatedLinearAttentionConfig
    | DeltaAttentionConfig
    | Mamba2Config
    | RWKV6Config
    | RWKV7Config
    | GatedMemoryConfig
    | GatedUnitConfig
    | AssociativeMemoryConfig
    | SpatialGateConfig
    | GatedPositionalConfig
    | MixerGateConfig
    | KalmaNetConfig
    | BidirectionalLinearAttentionConfig
    | NoMixerConfig
)
FeedForwardConfig = (
    GatedMLPConfig
    | MLPConfig
    | SparseMoEConfig
    | SoftMoEConfig
    | LoRAMixtureConfig
    | RWKV6ChannelMixConfig
    | RWKV7ChannelMixConfig
    | AdaptiveMLPConfig
    | VersatileMLPConfig
    | NoFeedForwardConfig
)
MIXERS: dict[str, type] = {config.kind: config for config in get_args(MixerConfig)}
FEED_FORWARDS: dict[str, type] = {config.kind: config for config in get_args(FeedForwardConfig)}
