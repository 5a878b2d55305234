"""RWKV-6 as flash-linear-attention writes it."""

from collections.abc import Iterator
from typing import Any

from gatedjax.config import BlockConfig, ModelConfig, RWKV6ChannelMixConfig, RWKV6Config
from gatedjax.interop.families import rwkv
from gatedjax.interop.families.base import Family, the_layer
from gatedjax.interop.families.parts import KERNEL
from gatedjax.interop.hf_config import HFConfig
from gatedjax.interop.links import Link, matrix, vector

MODEL_TYPE = "rwkv6"
# Token shifts, in the order of the files and of the parameters.
_SHIFTS = 5


def to_model(config: HFConfig) -> ModelConfig:
    """LayerNorms with biases, one more behind the embeddings."""
    rwkv.require_norms(config)
    # The width of the model is that of the values.
    config.require("expand_v", (1.0, 1))
    width = config.size("hidden_size")
    heads = config.size("num_heads", default=4)
    keys = round(width * config.number("expand_k", default=0.5))
    for name, channels in {"hidden_size": width, "expand_k": keys}.items():
        if channels < heads or channels % heads:
            raise config.refuse(name, f"whole channels for each of num_heads = {heads}")
    mixer = RWKV6Config(
        num_heads=heads,
        key_dim=keys // heads,
        value_dim=width // heads,
        shift_rank=config.size("proj_low_rank_dim", default=32),
        decay_rank=config.size("gate_low_rank_dim", default=64),
        norm_eps=rwkv.norm_eps(config),
    )
    return rwkv.model_of(config, mixer, RWKV6ChannelMixConfig, hidden_ratio=3.5)


def to_json(model: ModelConfig) -> dict[str, Any]:
    """The same, back."""
    c = the_layer(model, RWKV6Config, MODEL_TYPE)
    return rwkv.json_of(model) | {
        "num_heads": c.num_heads,
        "expand_k": c.num_heads * c.key_dim / model.width,
        "expand_v": 1.0,
        "proj_low_rank_dim": c.shift_rank,
        "gate_low_rank_dim": c.decay_rank,
        "intermediate_size": the_layer(model, RWKV6ChannelMixConfig, MODEL_TYPE).hidden,
    }


def links(model: ModelConfig) -> Iterator[Link]:
    """All tensors."""
    width = model.width

    def of_layer(block: BlockConfig, _: int) -> Iterator[Link]:
        assert isinstance(block.mixer, RWKV6Config)
        yield from _mixer(block.mixer, width)
        assert isinstance(block.feed_forward, RWKV6ChannelMixConfig)
        hidden = (block.feed_forward.hidden,)
        yield from _shifted("ffn.key", ("ffn", "shift"), ("ffn", "up"), width, hidden)
        yield matrix("ffn.value.weight", ("ffn", "down", KERNEL), hidden, (width,))
        yield from _shifted(
            "ffn.receptance",
            ("ffn", "gate_shift"),
            ("ffn", "gate"),
            width,
            (width,),
        )

    yield from rwkv.with_norms(model, of_layer)


def _mixer(c: RWKV6Config, width: int) -> Iterator[Link]:
    """Time mixing."""
    keys = (c.num_heads, c.key_dim)
    values = (c.num_heads, c.value_dim)
    low = (_SHIFTS * c.shift_rank,)
    yield from _shifted("attn.x_proj.0", ("mixer", "shift"), ("mixer", "shift_down"), width, low)
    up = ("mixer", "shift_up")
    yield matrix("attn.x_proj.2.weight", up, (_SHIFTS, c.shift_rank), (width,))
    shape = (_SHIFTS, width)
    yield vector("attn.x_bias", ("mixer", "shift_bias"), shape, shape)
    projected = {
        "r": ("receptance", keys),
        "k": ("key", keys),
        "v": ("value", values),
        "g": ("output_gate", values),
    }
    for letter, (name, heads) in projected.items():
        tensor = f"attn.{letter}_proj.linear.weight"
        yield matrix(tensor, ("mixer", name, KERNEL), (width,), heads)
    lora = "attn.w_proj.linear.lora"
    rank = (c.decay_rank,)
    yield matrix(f"{lora}.0.weight", ("mixer", "decay_down", KERNEL), (width,), rank)
    yield matrix(f"{lora}.2.weight", ("mixer", "decay_up", KERNEL), rank, keys)
    yield vector(f"{lora}.2.bias", ("mixer", "decay_bias"), keys)
    yield vector("attn.bonus", ("mixer", "bonus"), keys, keys)
    yield vector("attn.g_norm.weight", ("mixer", "norm_scale"), values)
    yield vector("attn.g_norm.bias", ("mixer", "norm_bias"), values)
    yield matrix("attn.o_proj.weight", ("mixer", "out", KERNEL), values, (width,))


def _shifted(
    tensor: str,
    shift: tuple[str, ...],
    projection: tuple[str, ...],
    width: int,
    outputs: tuple[int, ...],
) -> Iterator[Link]:
    """A projection of a token shift.

    Args:
      tensor: what stands before the names.
      shift: the parameter of the shift.
      projection: the module of the matrix.
      width: of the model.
      outputs: of the projection.
    """
    yield vector(f"{tensor}.mu", shift, (width,))
    yield matrix(f"{tensor}.linear.weight", (*projection, KERNEL), (width,), outputs)


FAMILIES = (
    Family(
        MODEL_TYPE,
        "RWKV6ForCausalLM",
        to_model,
        to_json,
        links,
    ),
)
