"""Flax modules: they own parameters, names, logical axes and dtypes; the arithmetic is in plain
functions.

`base.py` says what a model asks of a mixer and of a feed-forward. To add one: a file here, its
import and a line below, its dataclass in `config/layers.py` (CONTRIBUTING.md does it step by step).
"""

from gatedjax.layers.adaptive_mlp import AdaptiveMLP
from gatedjax.layers.associative_memory import AssociativeMemory
from gatedjax.layers.attention import GatedAttention
from gatedjax.layers.base import FeedForward, Mixer
from gatedjax.layers.bidirectional_linear_attention import BidirectionalLinearAttention
from gatedjax.layers.channel_mix import RWKV6ChannelMix, RWKV7ChannelMix
from gatedjax.layers.converted import RADRWKV, Lizard
from gatedjax.layers.delta import DeltaAttention
from gatedjax.layers.gate_values import gate_values
from gatedjax.layers.gated_memory import GatedMemory
from gatedjax.layers.gated_unit import GatedUnit
from gatedjax.layers.gpsa import GatedPositional
from gatedjax.layers.kalmanet import KalmaNet
from gatedjax.layers.linear_attention import GatedLinearAttention
from gatedjax.layers.mamba2 import Mamba2
from gatedjax.layers.mixer_gate import MixerGate
from gatedjax.layers.mla import MLA
from gatedjax.layers.mlp import MLP, GatedMLP, NoFeedForward
from gatedjax.layers.moe.lora import LoRAMixture
from gatedjax.layers.moe.soft import SoftMoE
from gatedjax.layers.moe.sparse import SparseMoE
from gatedjax.layers.no_mixer import NoMixer
from gatedjax.layers.rwkv6 import RWKV6
from gatedjax.layers.rwkv7 import RWKV7
from gatedjax.layers.spatial_gate import SpatialGate
from gatedjax.layers.token_info import Grid, TokenInfo
from gatedjax.layers.versatile_mlp import VersatileMLP

# By the `kind` of their configuration.
MIXERS: dict[str, type[Mixer]] = {
    "gated_attention": GatedAttention,
    "lizard": Lizard,
    "rad_rwkv6": RADRWKV,
    "rad_rwkv7": RADRWKV,
    "mla": MLA,
    "gated_linear_attention": GatedLinearAttention,
    "delta_attention": DeltaAttention,
    "mamba2": Mamba2,
    "rwkv6": RWKV6,
    "rwkv7": RWKV7,
    "gated_memory": GatedMemory,
    "gated_unit": GatedUnit,
    "associative_memory": AssociativeMemory,
    "spatial_gate": SpatialGate,
    "gated_positional": GatedPositional,
    "mixer_gate": MixerGate,
    "kalmanet": KalmaNet,
    "bidirectional_linear_attention": BidirectionalLinearAttention,
    "no_mixer": NoMixer,
}
FEED_FORWARDS: dict[str, type[FeedForward]] = {
    "gated_mlp": GatedMLP,
    "mlp": MLP,
    "sparse_moe": SparseMoE,
    "soft_moe": SoftMoE,
    "lora_mixture": LoRAMixture,
    "rwkv6_channel_mix": RWKV6ChannelMix,
    "rwkv7_channel_mix": RWKV7ChannelMix,
    "adaptive_mlp": AdaptiveMLP,
    "versatile_mlp": VersatileMLP,
    "none": NoFeedForward,
}

__all__ = [
    "FEED_FORWARDS",
    "MIXERS",
    "MLA",
    "MLP",
    "RADRWKV",
    "RWKV6",
    "RWKV7",
    "AdaptiveMLP",
    "AssociativeMemory",
    "BidirectionalLinearAttention",
    "DeltaAttention",
    "FeedForward",
    "GatedAttention",
    "GatedLinearAttention",
    "GatedMLP",
    "GatedMemory",
    "GatedPositional",
    "GatedUnit",
    "Grid",
    "KalmaNet",
    "Lizard",
    "LoRAMixture",
    "Mamba2",
    "Mixer",
    "MixerGate",
    "NoFeedForward",
    "NoMixer",
    "RWKV6ChannelMix",
    "RWKV7ChannelMix",
    "SoftMoE",
    "SparseMoE",
    "SpatialGate",
    "TokenInfo",
    "VersatileMLP",
    "gate_values",
]
