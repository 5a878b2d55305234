"""Qwen3-Next and Qwen3.5: three layers of Gated DeltaNet to one of gated attention."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from gatedjax.config import (
    BlockConfig,
    DeltaAttentionConfig,
    GatedAttentionConfig,
    GatedMLPConfig,
    ModelConfig,
    SparseMoEConfig,
)
from gatedjax.interop.families import parts
from gatedjax.interop.families.base import (
    Family,
    NamedLayer,
    assembled,
    json_values,
    kinds_of_layers,
    model_values,
    the_layer,
)
from gatedjax.interop.families.dense import (
    FULL,
    attention_of,
    attention_to_json,
    is_sparse,
    moe_to_json,
    softmax_moe,
)
from gatedjax.interop.hf_config import HFConfig, rope_of
from gatedjax.interop.links import Link, in_blocks, matrix

LINEAR = "linear_attention"
# Multi-token prediction and what sees images are no part of the language model.
_LEFT_OUT = ("mtp.*", "model.mtp.*", "model.visual.*", "visual.*")


def hybrid_kinds(config: HFConfig) -> list[str]:
    """The kinds of all layers; every fourth has attention where the file does not say."""
    interval = config.size("full_attention_interval", default=4)
    count = config.size("num_hidden_layers")
    default = [LINEAR if (i + 1) % interval else FULL for i in range(count)]
    return kinds_of_layers(config, default, (LINEAR, FULL))


def delta_of(config: HFConfig, **values: Any) -> DeltaAttentionConfig:
    """Gated DeltaNet of a config.json."""
    return DeltaAttentionConfig(
        num_heads=config.size("linear_num_value_heads", default=32),
        num_key_heads=config.size("linear_num_key_heads", default=16),
        key_dim=config.size("linear_key_head_dim", default=128),
        value_dim=config.size("linear_value_head_dim", default=128),
        conv_width=config.size("linear_conv_kernel_dim", default=4),
        **values,
    )


def delta_to_json(c: DeltaAttentionConfig) -> dict[str, Any]:
    """The same, back."""
    return {
        "linear_num_value_heads": c.num_heads,
        "linear_num_key_heads": c.key_heads,
        "linear_key_head_dim": c.key_dim,
        "linear_value_head_dim": c.value_dim,
        "linear_conv_kernel_dim": c.conv_width,
    }


def to_model(config: HFConfig, experts: Literal["none", "all", "some"]) -> ModelConfig:
    """Norms scale by 1 + w, but for the one after the delta rule.

    Args:
      config: of the checkpoint.
      experts: in which layers the family has them; some: where the file says.
    """
    config.require("hidden_act", ("silu",))
    config.require("attention_bias", (False,))
    config.require("attn_output_gate", (True,))
    rope = rope_of(config, 1e7, fraction=0.25)
    mixers = {
        "delta": delta_of(config),
        "attention": attention_of(
            config,
            rope,
            gate_position="sdpa",
            fused_gate=True,
            qk_norm=True,
            zero_centered_norm=True,
        ),
    }
    layers = []
    for i, kind in enumerate(hybrid_kinds(config)):
        sparse = experts == "all" or (experts == "some" and is_sparse(config, i))
        layers.append(NamedLayer("delta" if kind == LINEAR else "attention", _ffn_name(sparse)))
    return assembled(
        layers,
        mixers,
        _ffns(config, layers),
        zero_centered_norm=True,
        **model_values(config),
    )


def _ffn_name(sparse: bool) -> str:
    return "moe" if sparse else "mlp"


def _ffns(config: HFConfig, layers: list[NamedLayer]) -> dict[str, Any]:
    names = {layer.ffn for layer in layers}
    ffns: dict[str, Any] = {}
    if "mlp" in names:
        ffns["mlp"] = GatedMLPConfig(hidden=config.size("intermediate_size"))
    if "moe" in names:
        moe = softmax_moe(
            config,
            config.size("moe_intermediate_size"),
            config.flag("norm_topk_prob", True),
        )
        shared = config.size("shared_expert_intermediate_size", default=512)
        ffns["moe"] = dataclasses.replace(moe, shared_hidden=shared, shared_gate=True)
    return ffns


def _to_json(model: ModelConfig, family: str) -> dict[str, Any]:
    attention = the_layer(model, GatedAttentionConfig, family)
    values = json_values(model) | attention_to_json(attention, with_fraction=True)
    values |= delta_to_json(the_layer(model, DeltaAttentionConfig, family))
    kinds = []
    dense = []
    for i in range(model.num_layers):
        mixer, ffn = model.layer(i)
        kinds.append(FULL if isinstance(mixer, GatedAttentionConfig) else LINEAR)
        if isinstance(ffn, GatedMLPConfig):
            dense.append(i)
            values["intermediate_size"] = ffn.hidden
    values["layer_types"] = kinds
    if len(dense) < model.num_layers:
        moe = the_layer(model, SparseMoEConfig, family)
        values |= moe_to_json(moe) | {
            "moe_intermediate_size": moe.hidden,
            "shared_expert_intermediate_size": moe.shared_hidden,
        }
        if family == "qwen3_next":
            values["norm_topk_prob"] = moe.router.renormalize
            values |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    return values


def _links(model: ModelConfig, is_split: bool) -> Iterator[Link]:
    """All of Qwen3.5 (split projections) or of Qwen3-Next."""

    def of_layer(block: BlockConfig, _: int) -> Iterator[Link]:
        yield from parts.norms(model.width)
        if isinstance(block.mixer, GatedAttentionConfig):
            yield from parts.attention(block.mixer, model.width)
        else:
            assert isinstance(block.mixer, DeltaAttentionConfig)
            yield from _delta(block.mixer, model.width, is_split)
        yield from _feed_forward(block, model.width)

    yield from parts.ends(model)
    yield from in_blocks(model, of_layer)


def _delta(c: DeltaAttentionConfig, width: int, is_split: bool) -> Iterator[Link]:
    tensor = "linear_attn."
    yield from parts.delta_ends(c, width, tensor)
    if is_split:
        yield from parts.delta_joint(c, width, tensor)
        yield from _split_gates(c, width, tensor)
    else:
        yield from parts.delta_by_key_head(c, width, tensor)


def _feed_forward(block: BlockConfig, width: int) -> Iterator[Link]:
    ffn = block.feed_forward
    if isinstance(ffn, GatedMLPConfig):
        yield from parts.gated_mlp(ffn.hidden, width)
        return
    assert isinstance(ffn, SparseMoEConfig)
    yield from parts.router(ffn, width)
    yield from parts.experts(ffn, width)
    shared = ("ffn", "shared")
    yield from parts.gated_mlp(ffn.shared_hidden, width, "mlp.shared_expert.", shared)
    gate = ("ffn", "shared_gate", parts.KERNEL)
    yield matrix("mlp.shared_expert_gate.weight", gate, (width,), (1,))


def _split_gates(c: DeltaAttentionConfig, width: int, tensor: str) -> Iterator[Link]:
    values = (c.num_heads, c.value_dim)
    gate = ("mixer", "output_gate", parts.KERNEL)
    yield matrix(f"{tensor}in_proj_z.weight", gate, (width,), values)
    for name, path in (("b", "beta"), ("a", "decay")):
        tensor_name = f"{tensor}in_proj_{name}.weight"
        yield matrix(tensor_name, ("mixer", path, parts.KERNEL), (width,), (c.num_heads,))


def _family(
    model_type: str,
    architecture: str,
    experts: Literal["none", "all", "some"],
    also: tuple[str, ...] = (),
) -> Family:
    def read(config: HFConfig) -> ModelConfig:
        return to_model(config, experts)

    def to_json(model: ModelConfig) -> dict[str, Any]:
        return _to_json(model, model_type)

    def links(model: ModelConfig) -> Iterator[Link]:
        return _links(model, is_split=model_type != "qwen3_next")

    return Family(
        model_type,
        architecture,
        read,
        to_json,
        links,
        renamed=("model.language_model.* -> model.*",),
        left_out=_LEFT_OUT,
        also=also,
    )


FAMILIES = (
    _family("qwen3_next", "Qwen3NextForCausalLM", experts="some"),
    _family("qwen3_5_text", "Qwen3_5ForCausalLM", "none", ("qwen3_5",)),
    _family("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", "all", ("qwen3_5_moe",)),
)
