"""The configuration: frozen, validated dataclasses. `parse.py` is where ConfigDict stops."""

from flax.core import FrozenDict

from gatedjax.config.layers import (
    FEED_FORWARDS,
    MIXERS,
    DeltaAttentionConfig,
    FeedForwardConfig,
    GatedAttentionConfig,
    GatedLinearAttentionConfig,
    GatedMLPConfig,
    MixerConfig,
    NoFeedForwardConfig,
)
from gatedjax.config.mla import MLAConfig
from gatedjax.config.moe import LoRAMixtureConfig, RouterConfig, SoftMoEConfig, SparseMoEConfig
from gatedjax.config.parse import (
    Difference,
    config_dict,
    differing_keys,
    flat,
    from_config_dict,
    layer,
    nearest_key,
    to_dict,
)
from gatedjax.config.recurrent import Mamba2Config, RWKV7ChannelMixConfig, RWKV7Config
from gatedjax.config.run import (
    Config,
    DataConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    Remat,
    SourceConfig,
    TrainConfig,
)

__all__ = [
    "FEED_FORWARDS",
    "MIXERS",
    "Config",
    "DataConfig",
    "DeltaAttentionConfig",
    "Difference",
    "FeedForwardConfig",
    "FrozenDict",
    "GatedAttentionConfig",
    "GatedLinearAttentionConfig",
    "GatedMLPConfig",
    "LoRAConfig",
    "LoRAMixtureConfig",
    "MLAConfig",
    "Mamba2Config",
    "MeshConfig",
    "MixerConfig",
    "ModelConfig",
    "NoFeedForwardConfig",
    "OptimConfig",
    "RWKV7ChannelMixConfig",
    "RWKV7Config",
    "Remat",
    "RouterConfig",
    "SoftMoEConfig",
    "SourceConfig",
    "SparseMoEConfig",
    "TrainConfig",
    "config_dict",
    "differing_keys",
    "flat",
    "from_config_dict",
    "layer",
    "nearest_key",
    "to_dict",
]
