"""Flax modules: they own parameters, names, logical axes and dtypes; the arithmetic is in plain functions.

A mixer is called as `(x, info, cache) -> (y, cache)`, a feed-forward as `(x, info, router_logits) -> (y,
statistics, router_logits)`: what a sparse one tells the next sparse one, handed on by all others. To add one: a file
here, a line below, and its dataclass in `config/layers.py` (CONTRIBUTING.md walks through it).
"""

from gatedjax.layers import attention, linear_attention
from gatedjax.layers.attention import GatedAttention
from gatedjax.layers.linear_attention import GatedLinearAttention
from gatedjax.layers.mlp import GatedMLP
from gatedjax.layers.moe.lora import LoRAMixture
from gatedjax.layers.moe.soft import SoftMoE
from gatedjax.layers.moe.sparse import SparseMoE
from gatedjax.layers.token_info import TokenInfo as TokenInfo

# By the config's `kind`. A mixer comes with the function that makes its empty decoding cache.
MIXERS = {
    "gated_attention": (GatedAttention, attention.init_cache),
    "gated_linear_attention": (GatedLinearAttention, linear_attention.init_cache),
}
FEED_FORWARDS = {
    "gated_mlp": GatedMLP,
    "sparse_moe": SparseMoE,
    "soft_moe": SoftMoE,
    "lora_mixture": LoRAMixture,
}
