"""What RWKV-6 and RWKV-7 have in common in files of flash-linear-attention: all but the mixers."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from gatedjax.config import (
    BlockConfig,
    ModelConfig,
    RWKV6ChannelMixConfig,
    RWKV6Config,
    RWKV7ChannelMixConfig,
    RWKV7Config,
)
from gatedjax.interop.families.base import NamedLayer, assembled, json_values, model_values
from gatedjax.interop.families.parts import BIAS, SCALE
from gatedjax.interop.hf_config import HFConfig
from gatedjax.interop.links import Link, in_blocks, vector
from gatedjax.layers.tree import Path

# Widths of feed-forwards that a file does not name are multiples of this.
_MLP_MULTIPLE = 32


def require_norms(config: HFConfig) -> None:
    """Refuses what is not as published: LayerNorms with biases, one more behind the embeddings."""
    config.require("norm_bias", (True,))
    config.require("norm_first", (True,))
    config.require("hidden_act", ("sqrelu",))
    config.require("attn", ())


def model_of(
    config: HFConfig,
    mixer: RWKV6Config | RWKV7Config,
    channel_mix: type[RWKV6ChannelMixConfig | RWKV7ChannelMixConfig],
    *,
    hidden_ratio: float,
) -> ModelConfig:
    """All layers with this mixer.

    Args:
      config: of the file.
      mixer: of every layer.
      channel_mix: the kind of every feed-forward.
      hidden_ratio: its channels for each of the width, where the file names neither.
    """
    width = config.size("hidden_size")
    least = int(width * config.number("hidden_ratio", default=hidden_ratio))
    hidden = -(-max(least, 1) // _MLP_MULTIPLE) * _MLP_MULTIPLE
    values = model_values(config) | {"norm_eps": norm_eps(config)}
    return assembled(
        [NamedLayer(mixer.kind, "channel_mix")] * config.size("num_hidden_layers"),
        {mixer.kind: mixer},
        {"channel_mix": channel_mix(hidden=config.size("intermediate_size", default=hidden))},
        norm_kind="layer",
        embedding_norm=True,
        **values,
    )


def norm_eps(config: HFConfig) -> float:
    """Of the norms of the residual stream."""
    return config.number("norm_eps", default=1e-5)


def json_of(model: ModelConfig) -> dict[str, Any]:
    """The same, back, without what the mixers and feed-forwards say."""
    values = json_values(model)
    values["norm_eps"] = values.pop("rms_norm_eps")
    return values | {"hidden_act": "sqrelu", "norm_bias": True, "norm_first": True}


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
    yield vector(f"{tensor}.weight", (*path, SCALE), (width,))
    yield vector(f"{tensor}.bias", (*path, BIAS), (width,))
