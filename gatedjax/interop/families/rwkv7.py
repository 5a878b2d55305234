"""RWKV-7 as flash-linear-attention writes it."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from gatedjax.config import (
    BlockConfig,
    ModelConfig,
    RWKV7ChannelMixConfig,
    RWKV7Config,
)
from gatedjax.interop.families import parts
from gatedjax.interop.families.base import (
    Family,
    NamedLayer,
    assembled,
    json_values,
    model_values,
    the_layer,
)
from gatedjax.interop.hf_config import HFConfig
from gatedjax.interop.links import Link, in_blocks, matrix, vector
from gatedjax.layers.tree import Path

MODEL_TYPE = "rwkv7"
# Widths of feed-forwards that a file does not name are multiples of this.
_MLP_MULTIPLE = 32
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
    config.require("norm_bias", (True,))
    config.require("norm_first", (True,))
    config.require("hidden_act", ("sqrelu",))
    config.require("attn", ())
    width = config.size("hidden_size")
    count = config.size("num_hidden_layers")
    config.require("value_dim", (width, [width] * count))
    heads = config.optional_size("num_heads")
    head_dim = config.size("head_dim", default=width // heads if heads else 64)
    if width % head_dim:
        raise config.refuse("head_dim", f"a divisor of hidden_size = {width}")
    eps = config.number("norm_eps", default=1e-5)
    mixer = RWKV7Config(
        num_heads=width // head_dim,
        head_dim=head_dim,
        decay_rank=config.size("decay_low_rank_dim", default=64),
        rate_rank=config.size("a_low_rank_dim", default=64),
        value_rank=config.size("v_low_rank_dim", default=16),
        output_gate_rank=config.size("gate_low_rank_dim", default=128),
        norm_eps=head_dim * eps,
    )
    least = int(width * config.number("hidden_ratio", default=4.0))
    hidden = -(-max(least, 1) // _MLP_MULTIPLE) * _MLP_MULTIPLE
    values = model_values(config) | {"norm_eps": eps}
    return assembled(
        [NamedLayer("rwkv7", "channel_mix")] * count,
        {"rwkv7": mixer},
        {
            "channel_mix": RWKV7ChannelMixConfig(
                hidden=config.size("intermediate_size", default=hidden)
            )
        },
        norm_kind="layer",
        embedding_norm=True,
        **values,
    )


def to_json(model: ModelConfig) -> dict[str, Any]:
    """The same, back."""
    c = the_layer(model, RWKV7Config, MODEL_TYPE)
    values = json_values(model)
    values["norm_eps"] = values.pop("rms_norm_eps")
    return values | {
        "hidden_act": "sqrelu",
        "head_dim": c.head_dim,
        "num_heads": c.num_heads,
        "value_dim": [model.width] * model.num_layers,
        "decay_low_rank_dim": c.decay_rank,
        "a_low_rank_dim": c.rate_rank,
        "v_low_rank_dim": c.value_rank,
        "gate_low_rank_dim": c.output_gate_rank,
        "intermediate_size": the_layer(model, RWKV7ChannelMixConfig, MODEL_TYPE).hidden,
        "norm_bias": True,
        "norm_first": True,
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
        yield matrix("ffn.key.weight", ("ffn", "up", parts.KERNEL), (width,), hidden)
        yield matrix("ffn.value.weight", ("ffn", "down", parts.KERNEL), hidden, (width,))

    yield from with_norms(model, of_layer)


def with_norms(
    model: ModelConfig,
    of_layer: Callable[[BlockConfig, int], Iterable[Link]],
) -> Iterator[Link]:
    """What RWKV's models have around the two halves of their layers.

    Args:
      model: which knows its blocks.
      of_layer: the links of a layer's two halves.
    """
    width = model.width

    def of_block(block: BlockConfig, i: int) -> Iterator[Link]:
        yield from _norm("attn_norm", ("mixer_norm",), width)
        yield from _norm("ffn_norm", ("ffn_norm",), width)
        yield from of_layer(block, i)

    shape = (model.vocab_size, width)
    yield vector("model.embeddings.weight", ("embedding",), shape, shape)
    yield from _norm("model.layers.0.pre_norm", ("embedding_norm",), width)
    yield from in_blocks(model, of_block)
    yield from _norm("model.norm", ("final_norm",), width)
    if not model.tie_embeddings:
        yield vector("lm_head.weight", ("head",), shape, shape)


def _norm(tensor: str, path: Path, width: int) -> Iterator[Link]:
    yield vector(f"{tensor}.weight", (*path, parts.SCALE), (width,))
    yield vector(f"{tensor}.bias", (*path, parts.BIAS), (width,))


def _mixer(c: RWKV7Config, width: int, is_first: bool) -> Iterator[Link]:
    """Time mixing; the first layer's gate on values does nothing, and no tensor holds it."""
    heads = (c.num_heads, c.head_dim)
    for letter, name in _SHIFTS.items():
        yield vector(f"attn.x_{letter}", ("mixer", f"{name}_shift"), (width,), (1, 1, width))
    for letter in "rkv":
        path = ("mixer", _SHIFTS[letter], parts.KERNEL)
        yield matrix(f"attn.{letter}_proj.weight", path, (width,), heads)
    yield matrix("attn.o_proj.weight", ("mixer", "out", parts.KERNEL), heads, (width,))
    yield vector("attn.k_k", ("mixer", "removal_scale"), heads)
    yield vector("attn.k_a", ("mixer", "rate_weight"), heads)
    yield vector("attn.r_k", ("mixer", "bonus"), heads, heads)
    yield vector("attn.g_norm.weight", ("mixer", "norm_scale"), heads)
    yield vector("attn.g_norm.bias", ("mixer", "norm_bias"), heads)
    yield from _low_rank("attn.w_lora", "decay", c.decay_rank, heads, width)
    yield from _low_rank("attn.a_lora", "rate", c.rate_rank, heads, width)
    for link in _low_rank("attn.g_lora", "output_gate", c.output_gate_rank, heads, width):
        # This one has no bias.
        if link.path[-1] == parts.KERNEL:
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
    down = ("mixer", f"{name}_down", parts.KERNEL)
    yield matrix(f"{tensor}.lora.0.weight", down, (width,), (rank,))
    up = ("mixer", f"{name}_up", parts.KERNEL)
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
