"""gatedjax: gates in sequence models, in JAX and Flax.

    layer = gatedjax.GatedAttention(gatedjax.GatedAttentionConfig(num_heads=4, head_dim=16))
    y, params = layer.init_with_output(jax.random.key(0), x)
    gates = gatedjax.gate_values(layer, params, x)

The axis legend: every letter of a docstring, an einsum or a shape annotation, in both packages.

  B   batch: rows of a batch (a row may hold several packed documents)
  T   time: query positions; also plain sequence length
  S   key positions, where they differ from T (a cache, a window); slots of a buffer
  H   query heads;  Hk, Hv: key and value heads (each divides H: grouped heads);  Hq: query heads
      where H counts states (delta_scan)
  K   key and query channels of a head
  V   value channels of a head
  D   channels of a head where K = V
  J   pairs of channels that rotate (rotary embeddings)
  M   model width (the residual stream)
  F   feed-forward hidden width; channels of a convolution
  W   width of a convolution, in tokens
  E   experts;  k: experts chosen per token;  s: slots of an expert of a soft mixture
  R   rows: tokens of all rows of the batch, one after the other;  Rk: R k rows, one an assignment
  I   channels into a matrix with low-rank experts, O: out of it;  r: the rank
  L   layers;  P: periods of the layer pattern; numbers of a patch of an image
  C   chunk: tokens per chunk of a scan;  N: number of chunks
  X   vocabulary entries, classes
  n   devices along a mesh axis
  _   a size that is not named; ..., *name: any number of axes

`grouped_matmul` alone uses M, K, N, G for rows, inner width, outer width and groups, as the matmul
literature does.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gatedjax.config import (
        AdaptiveMLPConfig,
        AssociativeMemoryConfig,
        BidirectionalLinearAttentionConfig,
        Config,
        DeltaAttentionConfig,
        GatedAttentionConfig,
        GatedLinearAttentionConfig,
        GatedMemoryConfig,
        GatedMLPConfig,
        GatedPositionalConfig,
        GatedUnitConfig,
        KalmaNetConfig,
        LoRAMixtureConfig,
        Mamba2Config,
        MixerGateConfig,
        MLAConfig,
        ModelConfig,
        RouterConfig,
        RWKV6ChannelMixConfig,
        RWKV6Config,
        RWKV7ChannelMixConfig,
        RWKV7Config,
        SoftMoEConfig,
        SparseMoEConfig,
        SpatialGateConfig,
        VersatileMLPConfig,
    )
    from gatedjax.layers import (
        MLA,
        RWKV6,
        RWKV7,
        AdaptiveMLP,
        AssociativeMemory,
        BidirectionalLinearAttention,
        DeltaAttention,
        GatedAttention,
        GatedLinearAttention,
        GatedMemory,
        GatedMLP,
        GatedPositional,
        GatedUnit,
        Grid,
        KalmaNet,
        LoRAMixture,
        Mamba2,
        MixerGate,
        RWKV6ChannelMix,
        RWKV7ChannelMix,
        SoftMoE,
        SparseMoE,
        SpatialGate,
        TokenInfo,
        VersatileMLP,
        gate_values,
    )
    from gatedjax.model import LanguageModel
    from gatedjax.training.sparsemax_loss import sparsemax_loss

__version__ = "0.1.0"

__all__ = [
    "MLA",
    "MLP",
    "RWKV6",
    "RWKV7",
    "AdaptiveMLP",
    "AdaptiveMLPConfig",
    "AssociativeMemory",
    "AssociativeMemoryConfig",
    "BidirectionalLinearAttention",
    "BidirectionalLinearAttentionConfig",
    "Config",
    "DeltaAttention",
    "DeltaAttentionConfig",
    "GatedAttention",
    "GatedAttentionConfig",
    "GatedLinearAttention",
    "GatedLinearAttentionConfig",
    "GatedMLP",
    "GatedMLPConfig",
    "GatedMemory",
    "GatedMemoryConfig",
    "GatedPositional",
    "GatedPositionalConfig",
    "GatedUnit",
    "GatedUnitConfig",
    "Grid",
    "KalmaNet",
    "KalmaNetConfig",
    "LanguageModel",
    "LoRAMixture",
    "LoRAMixtureConfig",
    "MLAConfig",
    "MLPConfig",
    "Mamba2",
    "Mamba2Config",
    "MixerGate",
    "MixerGateConfig",
    "ModelConfig",
    "RWKV6ChannelMix",
    "RWKV6ChannelMixConfig",
    "RWKV6Config",
    "RWKV7ChannelMix",
    "RWKV7ChannelMixConfig",
    "RWKV7Config",
    "RouterConfig",
    "SoftMoE",
    "SoftMoEConfig",
    "SparseMoE",
    "SparseMoEConfig",
    "SpatialGate",
    "SpatialGateConfig",
    "TokenInfo",
    "VersatileMLP",
    "VersatileMLPConfig",
    "gate_values",
    "sparsemax_loss",
]


def __getattr__(name: str) -> Any:
    """The public names are imported when they are first asked for.

    Commands set environment variables that jax reads when it is imported; `import gatedjax` must
    not be earlier than they are.
    """
    if name not in __all__:
        raise AttributeError(f"module 'gatedjax' has no attribute {name!r}")
    # First: it says which jax is needed, where a module of ours would only miss some name.
    importlib.import_module("kernels_pallas")
    if name == "LanguageModel":
        module = "gatedjax.model"
    elif name == "sparsemax_loss":
        module = "gatedjax.training.sparsemax_loss"
    elif name == "Config" or name.endswith("Config"):
        module = "gatedjax.config"
    else:
        module = "gatedjax.layers"
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
