"""The configuration: frozen, validated dataclasses. `parse.py` is where ConfigDict stops."""

from flax.core import FrozenDict

from gatedjax.config.bidirectional import BIDIRECTIONAL, BidirectionalLinearAttentionConfig
from gatedjax.config.encoder import ImageConfig, MaskingConfig, PatchConfig, Task
from gatedjax.config.kalmanet import KalmaNetConfig
from gatedjax.config.layers import (
    FEED_FORWARDS,
    MIXERS,
    DeltaAttentionConfig,
    FeedForwardConfig,
    GatedAttentionConfig,
    GatedLinearAttentionConfig,
    GatedMLPConfig,
    LizardConfig,
    MixerConfig,
    MLPConfig,
    NoFeedForwardConfig,
    NoMixerConfig,
    RADRWKV6Config,
    RADRWKV7Config,
)
from gatedjax.config.lora import LoRAConfig
from gatedjax.config.mixing import (
    AssociativeMemoryConfig,
    GatedPositionalConfig,
    GatedUnitConfig,
    MixerGateConfig,
    SpatialGateConfig,
)
from gatedjax.config.mla import MLAConfig
from gatedjax.config.model import BlockConfig, ModelConfig, NormPlacement, Remat
from gatedjax.config.moe import LoRAMixtureConfig, SoftMoEConfig, SparseMoEConfig
from gatedjax.config.on_demand import AdaptiveMLPConfig, VersatileMLPConfig
from gatedjax.config.output import OutputConfig
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
from gatedjax.config.router import RouterConfig
from gatedjax.config.run import (
    IMAGE_KINDS,
    WITHOUT_PATH,
    Config,
    DataConfig,
    MeshConfig,
    OptimConfig,
    SourceConfig,
    StreamConfig,
    TrainConfig,
)
from gatedjax.config.rwkv6 import RWKV6ChannelMixConfig, RWKV6Config
from gatedjax.config.shared_router import SharedRouterConfig
from gatedjax.config.soft_adapters import SoftAdaptersConfig
from gatedjax.config.sources import GatedMemoryConfig
from gatedjax.config.teacher import TeacherConfig

__all__ = [
    "BIDIRECTIONAL",
    "FEED_FORWARDS",
    "IMAGE_KINDS",
    "MIXERS",
    "WITHOUT_PATH",
    "AdaptiveMLPConfig",
    "AssociativeMemoryConfig",
    "BidirectionalLinearAttentionConfig",
    "BlockConfig",
    "Config",
    "DataConfig",
    "DeltaAttentionConfig",
    "Difference",
    "FeedForwardConfig",
    "FrozenDict",
    "GatedAttentionConfig",
    "GatedLinearAttentionConfig",
    "GatedMLPConfig",
    "GatedMemoryConfig",
    "GatedPositionalConfig",
    "GatedUnitConfig",
    "ImageConfig",
    "KalmaNetConfig",
    "LizardConfig",
    "LoRAConfig",
    "LoRAMixtureConfig",
    "MLAConfig",
    "MLPConfig",
    "Mamba2Config",
    "MaskingConfig",
    "MeshConfig",
    "MixerConfig",
    "MixerGateConfig",
    "ModelConfig",
    "NoFeedForwardConfig",
    "NoMixerConfig",
    "NormPlacement",
    "OptimConfig",
    "OutputConfig",
    "PatchConfig",
    "RADRWKV6Config",
    "RADRWKV7Config",
    "RWKV6ChannelMixConfig",
    "RWKV6Config",
    "RWKV7ChannelMixConfig",
    "RWKV7Config",
    "Remat",
    "RouterConfig",
    "SharedRouterConfig",
    "SoftAdaptersConfig",
    "SoftMoEConfig",
    "SourceConfig",
    "SparseMoEConfig",
    "SpatialGateConfig",
    "StreamConfig",
    "Task",
    "TeacherConfig",
    "TrainConfig",
    "VersatileMLPConfig",
    "config_dict",
    "differing_keys",
    "flat",
    "from_config_dict",
    "layer",
    "nearest_key",
    "to_dict",
]
