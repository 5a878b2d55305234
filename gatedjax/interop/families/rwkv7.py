"""RWKV-7 as flash-linear-attention writes it."""

from collections.abc import Iterator
from typing import Any

from gatedjax.config import (
    BlockConfig,
    ModelConfig,
    RWKV7ChannelMixConfig,
    RWKV7Config,
)
from gatedjax.interop.families import rwkv
from gatedjax.interop.families.base import Family, the_layer
from gatedjax.interop.families.parts import KERNEL
from gatedjax.interop.hf_config import HFConfig
from gatedjax.interop.links import Link, matrix, vector

MODEL_TYPE = "rwkv7"
# Letter of a tensor -> what is called so here.
_SHIFTS = {
    "r": "receptance",
    "w": "decay",
    "k": "key",
    "v": "value",
    "a": "rate",
    "g": "output_gate",
}


def to_model(config: HFConfig) -> ModelConfig:
    """LayerNorms with biases, one more behind the embeddings."""
    rwkv.require_norms(config)
    width = config.size("hidden_size")
    count = config.size("num_hidden_layers")
    config.require("value_dim", (width, [width] * count))
    heads = config.optional_size("num_heads")
    head_dim = config.size("head_dim", default=width // heads if heads else 64)
    if width % head_dim:
        raise config.refuse("head_dim", f"a divisor of hidden_size = {width}")
    mixer = RWKV7Config(
        num_heads=width // head_dim,
        head_dim=head_dim,
        decay_rank=config.size("decay_low_rank_dim", default=64),
        rate_rank=config.size("a_low_rank_dim", default=64),
        value_rank=config.size("v_low_rank_dim", default=16),
        output_gate_rank=config.size("gate_low_rank_dim", default=128),
        norm_eps=head_dim * rwkv.norm_eps(config),
    )
    return rwkv.model_of(config, mixer, RWKV7ChannelMixConfig, hidden_ratio=4.0)


def to_json(model: ModelConfig) -> dict[str, Any]:
    """The same, back."""
    c = the_layer(model, RWKV7Config, MODEL_TYPE)
    return rwkv.json_of(model) | {
        "head_dim": c.head_dim,
        "num_heads": c.num_heads,
        "value_dim": [model.width] * model.num_layers,
        "decay_low_rank_dim": c.decay_rank,
        "a_low_rank_dim": c.rate_rank,
        "v_low_rank_dim": c.value_rank,
        "gate_low_rank_dim": c.output_gate_rank,
        "intermediate_size": the_layer(model, RWKV7ChannelMixConfig, MODEL_TYPE).hidden,
    }


def links(model: ModelConfig) -> Iterator[Link]:
    """All tensors."""
    width = model.width

    def of_layer(block: BlockConfig, i: int) -> Iterator[Link]:
        assert isinstance(block.mixer, RWKV7Config)
        yield from _mixer(block.mixer, width, is_first=i == 0)
        assert isinstance(block.feed_forward, RWKV7ChannelMixConfig)
        hidden = (block.feed_forward.hidden,)
        yield vector("ffn.x_k", ("ffn", "shift"), (width,))
        yield matrix("ffn.key.weight", ("ffn", "up", KERNEL), (width,), hidden)
        yield matrix("ffn.value.weight", ("ffn", "down", KERNEL), hidden, (width,))

    yield from rwkv.with_norms(model, of_layer)


def _mixer(c: RWKV7Config, width: int, is_first: bool) -> Iterator[Link]:
    """Time mixing; the first layer's gate on values does nothing, and no tensor holds it."""
    heads = (c.num_heads, c.head_dim)
    for letter, name in _SHIFTS.items():
        yield vector(f"attn.x_{letter}", ("mixer", f"{name}_shift"), (width,), (1, 1, width))
    for letter in "rkv":
        path = ("mixer", _SHIFTS[letter], KERNEL)
        yield matrix(f"attn.{letter}_proj.weight", path, (width,), heads)
    yield matrix("attn.o_proj.weight", ("mixer", "out", KERNEL), heads, (width,))
    yield vector("attn.k_k", ("mixer", "removal_scale"), heads)
    yield vector("attn.k_a", ("mixer", "rate_weight"), heads)
    yield vector("attn.r_k", ("mixer", "bonus"), heads, heads)
    yield vector("attn.g_norm.weight", ("mixer", "norm_scale"), heads)
    yield vector("attn.g_norm.bias", ("mixer", "norm_bias"), heads)
    yield from _low_rank("attn.w_lora", "decay", c.decay_rank, heads, width)
    yield from _low_rank("attn.a_lora", "rate", c.rate_rank, heads, width)
    for link in _low_rank("attn.g_lora", "output_gate", c.output_gate_rank, heads, width):
        # This one has no bias.
        if link.path[-1] == KERNEL:
            yield link
    names = {"value_gate_bias": "value_bias"}
    for link in _low_rank("attn.v_lora", "value_gate", c.value_rank, heads, width):
        path = tuple(names.get(name, name) for name in link.path)
        yield link._replace(path=path, is_absent=is_first)


def _low_rank(
    tensor: str,
    name: str,
    rank: int,
    heads: tuple[int, int],
    width: int,
) -> Iterator[Link]:
    """Two matrices and a bias.

    Args:
      tensor: what stands before the names.
      name: of the three here.
      rank: channels between the matrices.
      heads: heads and their channels.
      width: of the model.
    """
    down = ("mixer", f"{name}_down", KERNEL)
    yield matrix(f"{tensor}.lora.0.weight", down, (width,), (rank,))
    up = ("mixer", f"{name}_up", KERNEL)
    yield matrix(f"{tensor}.lora.2.weight", up, (rank,), heads)
    yield vector(f"{tensor}.lora.2.bias", ("mixer", f"{name}_bias"), heads)


FAMILIES = (
    Family(
        MODEL_TYPE,
        "RWKV7ForCausalLM",
        to_model,
        to_json,
        links,
    ),
)
