"""OLMo-Hybrid: Gated DeltaNet with norms before, attention with norms after (OLMo 2's)."""

from collections.abc import Iterator
from typing import Any

from gatedjax.config import (
    BlockConfig,
    DeltaAttentionConfig,
    FrozenDict,
    GatedAttentionConfig,
    GatedMLPConfig,
    ModelConfig,
)
from gatedjax.interop.families import parts
from gatedjax.interop.families.base import (
    Family,
    NamedLayer,
    Shapes,
    assembled,
    json_values,
    kinds_of_layers,
    model_values,
    the_layer,
)
from gatedjax.interop.families.dense import FULL, attention_of, attention_to_json
from gatedjax.interop.families.qwen_hybrid import LINEAR, delta_to_json
from gatedjax.interop.hf_config import HFConfig, Rope, rope_of
from gatedjax.interop.links import Link, in_blocks, matrix, vector

MODEL_TYPE = "olmo_hybrid"
# Of the norm after the delta rule; it stands in the code of transformers.
_DELTA_EPS = 1e-5
# Where a file names none.
_ROPE_BASE = 10_000.0


def to_model(config: HFConfig) -> ModelConfig:
    """beta up to 2; queries and keys of attention are normed over all heads together."""
    config.require("hidden_act", ("silu",))
    config.require("attention_bias", (False,))
    heads = config.size("num_attention_heads")
    key_heads = config.size("linear_num_key_heads", default=heads)
    key_dim = config.size(
        "linear_key_head_dim",
        default=max(1, 3 * config.size("hidden_size") // (4 * key_heads)),
    )
    mixers = {
        "delta": DeltaAttentionConfig(
            num_heads=config.size("linear_num_value_heads", default=heads),
            num_key_heads=key_heads,
            key_dim=key_dim,
            value_dim=config.size("linear_value_head_dim", default=2 * key_dim),
            conv_width=config.size("linear_conv_kernel_dim", default=4),
            negative_eigenvalues=config.flag("linear_allow_neg_eigval", True),
            norm_eps=_DELTA_EPS,
        ),
        "attention": attention_of(
            config,
            _rope(config),
            qk_norm=True,
            qk_norm_kind="rms_all_heads",
        ),
    }
    count = config.size("num_hidden_layers")
    default = [FULL if i % 4 == 3 else LINEAR for i in range(count)]
    layers = []
    for kind in kinds_of_layers(config, default, (LINEAR, FULL)):
        layers.append(NamedLayer("delta" if kind == LINEAR else "attention", "mlp"))
    has_attention = any(layer.mixer == "attention" for layer in layers)
    return assembled(
        layers,
        mixers,
        {"mlp": GatedMLPConfig(hidden=config.size("intermediate_size"))},
        norm_placement=FrozenDict(attention="post") if has_attention else FrozenDict(),
        **model_values(config),
    )


def _rope(config: HFConfig) -> Rope:
    """No positions where the base of the rotation is null, as in the released files.

    transformers takes its default where no base is named: `rope_parameters: null` alone rotates.
    """
    rope = config.group("rope_parameters")
    named = rope if "rope_theta" in rope.values else config
    if named.values.get("rope_theta", _ROPE_BASE) is None:
        return Rope(_ROPE_BASE, fraction=0.0)
    return rope_of(config, _ROPE_BASE)


def to_json(model: ModelConfig) -> dict[str, Any]:
    """The same, back."""
    attention = the_layer(model, GatedAttentionConfig, MODEL_TYPE)
    delta = the_layer(model, DeltaAttentionConfig, MODEL_TYPE)
    kinds = []
    for i in range(model.num_layers):
        kinds.append(LINEAR if isinstance(model.layer(i)[0], DeltaAttentionConfig) else FULL)
    values = attention_to_json(attention)
    if attention.rope_fraction == 0:
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": None}
    return (
        json_values(model)
        | values
        | delta_to_json(delta)
        | {
            "intermediate_size": the_layer(model, GatedMLPConfig, MODEL_TYPE).hidden,
            "layer_types": kinds,
            "linear_allow_neg_eigval": delta.negative_eigenvalues,
        }
    )


def links(model: ModelConfig, shapes: Shapes | None = None) -> Iterator[Link]:
    """All tensors.

    Args:
      model: of the checkpoint.
      shapes: of the tensors of a file. transformers has one convolution for queries, keys and
        values, and cuts it into three equal parts when it saves, wherever the values begin.
    """

    def of_layer(block: BlockConfig, i: int) -> Iterator[Link]:
        if isinstance(block.mixer, DeltaAttentionConfig):
            tensor = f"model.layers.{i}.linear_attn."
            yield from _delta(block.mixer, model.width, _conv_channels(tensor, shapes or {}))
        else:
            assert isinstance(block.mixer, GatedAttentionConfig)
            yield from _attention(block.mixer, model.width)
        assert isinstance(block.feed_forward, GatedMLPConfig)
        yield from parts.gated_mlp(block.feed_forward.hidden, model.width)

    yield from parts.ends(model)
    yield from in_blocks(model, of_layer)


def _conv_channels(tensor: str, shapes: Shapes) -> tuple[int, int, int] | None:
    """How many channels the three convolutions of a file have; None where they are not there."""
    found = [shapes.get(f"{tensor}{name}_conv1d.weight") for name in "qkv"]
    channels = [shape[0] for shape in found if shape]
    if len(channels) < len(found):
        return None
    query, key, value = channels
    return query, key, value


def _delta(
    c: DeltaAttentionConfig,
    width: int,
    conv_channels: tuple[int, int, int] | None,
) -> Iterator[Link]:
    before = vector("attention_layer_norm.weight", ("mixer_norm", parts.SCALE), (width,))
    yield before._replace(also=("input_layernorm.weight",))
    after = vector("feedforward_layer_norm.weight", ("ffn_norm", parts.SCALE), (width,))
    yield after._replace(also=("post_attention_layernorm.weight",))
    tensor = "linear_attn."
    yield from parts.delta_ends(c, width, tensor, "o_norm", "o_proj")
    yield from parts.delta_projections(c, width, tensor, conv_channels)
    yield matrix(f"{tensor}a_proj.weight", ("mixer", "decay", "kernel"), (width,), (c.num_heads,))
    values = (c.num_heads, c.value_dim)
    yield matrix(f"{tensor}g_proj.weight", ("mixer", "output_gate", "kernel"), (width,), values)


def _attention(c: GatedAttentionConfig, width: int) -> Iterator[Link]:
    yield from parts.attention(c, width)
    after = vector("post_attention_layernorm.weight", ("mixer_post_norm", parts.SCALE), (width,))
    # Saved by transformers, which calls two norms alike, under the name of the other one.
    yield after._replace(also=("feedforward_layer_norm.weight",))
    last = "post_feedforward_layernorm.weight"
    yield vector(last, ("ffn_post_norm", parts.SCALE), (width,))


FAMILIES = (
    Family(
        MODEL_TYPE,
        "OlmoHybridForCausalLM",
        to_model,
        to_json,
        links,
        links_as_saved=links,
    ),
)
