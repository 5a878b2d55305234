"""Checkpoints of flash-linear-attention's own models: GLA, RetNet, HGRN2, Gated DeltaNet and Gated
DeltaProduct.
"""

import math
from collections.abc import Iterator
from typing import Any

from gatedjax.config import (
    BlockConfig,
    DeltaAttentionConfig,
    GatedLinearAttentionConfig,
    GatedMLPConfig,
    MixerConfig,
    ModelConfig,
)
from gatedjax.interop.families import delta_product, parts
from gatedjax.interop.families.base import (
    Family,
    NamedLayer,
    assembled,
    json_values,
    model_values,
    the_layer,
)
from gatedjax.interop.hf_config import HFConfig
from gatedjax.interop.links import Link, convolution, in_blocks, matrix, vector

GLA = "gla"
RETNET = "retnet"
HGRN2 = "hgrn2"
GATED_DELTANET = "gated_deltanet"
GATED_DELTAPRODUCT = "gated_deltaproduct"
# In the code of fla: ranks and temperature of GLA's gate, the base of RetNet's rotation.
_DECAY_RANK = 16
_DECAY_TEMPERATURE = 16.0
_ROPE_BASE = 10_000.0
# Of HGRN2: what a head expands to, and the norm of its output, which is not the file's.
_EXPANSION = 128
_HGRN2_EPS = 1e-5
# Widths of feed-forwards that a file does not name are multiples of this.
_MLP_MULTIPLE = 256


# --- config.json


def gla_to_model(config: HFConfig) -> ModelConfig:
    """One low-rank decay for every key channel."""
    config.require("clamp_min", ())
    config.require("use_gk", (True,))
    config.require("use_gv", (False,))
    has_conv = config.flag("use_short_conv", False)
    mixer = _linear_attention(
        config,
        expand_k=0.5,
        expand_v=1.0,
        decay="vector",
        decay_rank=_DECAY_RANK,
        decay_temperature=_DECAY_TEMPERATURE,
        conv_width=config.size("conv_size", default=4) if has_conv else 0,
    )
    return _model(config, "gla", mixer, hidden_ratio=4)


def retnet_to_model(config: HFConfig) -> ModelConfig:
    """A constant decay, and rotated queries and keys."""
    config.require("use_short_conv", (False,))
    mixer = _linear_attention(
        config,
        expand_k=1.0,
        expand_v=2.0,
        decay="constant",
        rope_fraction=1.0,
        rope_base=_ROPE_BASE,
    )
    return _model(config, "retention", mixer, hidden_ratio=2)


def hgrn2_to_model(config: HFConfig) -> ModelConfig:
    """Keys are what a forget gate leaves, and its floor rises from layer to layer."""
    config.require("use_short_conv", (False,))
    config.require("elementwise_affine", (True,))
    width = config.size("hidden_size")
    key_dim = config.size("expand_ratio", default=_expansion(config, width))
    if width % key_dim:
        raise config.refuse("expand_ratio", f"a divisor of hidden_size {width}")
    heads = width // key_dim
    mixer = GatedLinearAttentionConfig(
        num_heads=heads,
        key_dim=key_dim,
        value_dim=width // heads,
        decay_form="forget_gate",
        decay_floor="by_depth" if config.flag("use_lower_bound", True) else "none",
        feature_map="silu",
        output_gate="none",
        norm_heads="all",
        norm_eps=_HGRN2_EPS,
    )
    return _model(config, "hgrn2", mixer, hidden_ratio=4)


def _expansion(config: HFConfig, width: int) -> int:
    """Key channels of a head where the file has no number: null asks for those of num_heads."""
    if "expand_ratio" in config.values:
        return max(1, width // config.size("num_heads"))
    return _EXPANSION


def deltanet_to_model(config: HFConfig) -> ModelConfig:
    """One decay a head."""
    config.require("use_short_conv", (True,))
    heads = config.size("num_heads", default=6)
    key_dim = config.size("head_dim", default=256)
    gates = {"swish": "swish", "silu": "swish", "sigmoid": "sigmoid"}
    config.require("output_gate_activation", tuple(gates))
    gate: Any = gates[config.text("output_gate_activation", "swish")]
    mixer = DeltaAttentionConfig(
        num_heads=config.size("num_v_heads", default=heads),
        num_key_heads=heads,
        key_dim=key_dim,
        value_dim=_whole(config, "expand_v", key_dim * config.number("expand_v", default=2.0)),
        negative_eigenvalues=config.flag("allow_neg_eigval", False),
        output_gate=gate if config.flag("use_gate", True) else "none",
        conv_width=config.size("conv_size", default=4),
    )
    return _model(config, "delta", mixer, hidden_ratio=4)


def deltaproduct_to_model(config: HFConfig) -> ModelConfig:
    """Several steps a token, with a decay or without."""
    config.require("use_short_conv", (True,))
    heads = config.size("num_heads", default=6)
    key_dim = config.size("head_dim", default=256)
    mixer = DeltaAttentionConfig(
        num_heads=heads,
        key_dim=key_dim,
        value_dim=_whole(config, "expand_v", key_dim * config.number("expand_v", default=2.0)),
        decay="scalar" if config.flag("use_forget_gate", False) else "none",
        num_householder=config.size("num_householder", default=1),
        negative_eigenvalues=config.flag("allow_neg_eigval", False),
        output_gate="swish" if config.flag("use_output_gate", True) else "none",
        conv_width=config.size("conv_size", default=4),
    )
    return _model(config, "delta_product", mixer, hidden_ratio=4)


def _linear_attention(
    config: HFConfig,
    *,
    expand_k: float,
    expand_v: float,
    **values: Any,
) -> GatedLinearAttentionConfig:
    """Heads and channels of GLA and RetNet.

    Args:
      config: of the checkpoint.
      expand_k: key channels over the width, where the file does not say.
      expand_v: value channels over the width, likewise.
      **values: of the decay.
    """
    config.require("feature_map", ())
    config.require("elementwise_affine", (True,))
    heads = config.size("num_heads", default=4)
    config.require("num_kv_heads", (heads,))
    width = config.size("hidden_size")
    keys = width * config.number("expand_k", default=expand_k) / heads
    value_channels = width * config.number("expand_v", default=expand_v) / heads
    return GatedLinearAttentionConfig(
        num_heads=heads,
        key_dim=_whole(config, "expand_k", keys),
        value_dim=_whole(config, "expand_v", value_channels),
        output_gate="swish" if config.flag("use_output_gate", True) else "none",
        **values,
    )


def _whole(config: HFConfig, name: str, value: float) -> int:
    if value < 1 or abs(value - round(value)) > 1e-3:
        raise config.refuse(name, "a number that gives whole channels")
    return round(value)


def _model(
    config: HFConfig,
    name: str,
    mixer: MixerConfig,
    hidden_ratio: int,
) -> ModelConfig:
    """A model with one mixer and SwiGLU.

    Args:
      config: of the checkpoint.
      name: of the mixer.
      mixer: of all layers.
      hidden_ratio: of the family, where the file has none.
    """
    config.require("hidden_act", ("swish", "silu"))
    config.require("attn", ())
    config.require("attnres_block_size", ())
    ratio = config.number("hidden_ratio", default=float(hidden_ratio))
    least = int(config.size("hidden_size") * ratio * 2 / 3)
    hidden = -(-max(least, 1) // _MLP_MULTIPLE) * _MLP_MULTIPLE
    values = model_values(config) | {"norm_eps": config.number("norm_eps", default=1e-6)}
    return assembled(
        [NamedLayer(name, "mlp")] * config.size("num_hidden_layers"),
        {name: mixer},
        {"mlp": GatedMLPConfig(hidden=config.size("intermediate_size", default=hidden))},
        **values,
    )


def _json(model: ModelConfig, family: str) -> dict[str, Any]:
    values = json_values(model)
    values["norm_eps"] = values.pop("rms_norm_eps")
    hidden = the_layer(model, GatedMLPConfig, family).hidden
    # The kernels of fla fuse the norm; its name tells.
    return values | {"intermediate_size": hidden, "hidden_act": "swish", "fuse_norm": True}


def _linear_json(model: ModelConfig, family: str) -> dict[str, Any]:
    c = the_layer(model, GatedLinearAttentionConfig, family)
    return _json(model, family) | {
        "num_heads": c.num_heads,
        "expand_k": c.num_heads * c.key_dim / model.width,
        "expand_v": c.num_heads * c.value_dim / model.width,
        "use_output_gate": c.output_gate != "none",
        "use_short_conv": c.conv_width > 0,
        "conv_size": c.conv_width or 4,
    }


def gla_to_json(model: ModelConfig) -> dict[str, Any]:
    """The same, back."""
    return _linear_json(model, GLA)


def retnet_to_json(model: ModelConfig) -> dict[str, Any]:
    """The same, back."""
    return _linear_json(model, RETNET)


def hgrn2_to_json(model: ModelConfig) -> dict[str, Any]:
    """The same, back."""
    c = the_layer(model, GatedLinearAttentionConfig, HGRN2)
    return _json(model, HGRN2) | {
        "num_heads": c.num_heads,
        "expand_ratio": c.key_dim,
        "use_lower_bound": c.decay_floor == "by_depth",
        "use_short_conv": False,
    }


def deltanet_to_json(model: ModelConfig) -> dict[str, Any]:
    """The same, back."""
    c = the_layer(model, DeltaAttentionConfig, GATED_DELTANET)
    return _json(model, GATED_DELTANET) | {
        "num_heads": c.key_heads,
        "num_v_heads": c.num_heads,
        "head_dim": c.key_dim,
        "expand_v": c.value_dim / c.key_dim,
        "allow_neg_eigval": c.negative_eigenvalues,
        "use_gate": c.output_gate != "none",
        "output_gate_activation": "sigmoid" if c.output_gate == "sigmoid" else "swish",
        "use_short_conv": c.conv_width > 0,
        "conv_size": c.conv_width or 4,
    }


def deltaproduct_to_json(model: ModelConfig) -> dict[str, Any]:
    """The same, back."""
    c = the_layer(model, DeltaAttentionConfig, GATED_DELTAPRODUCT)
    return _json(model, GATED_DELTAPRODUCT) | {
        "num_heads": c.num_heads,
        "head_dim": c.key_dim,
        "expand_v": c.value_dim / c.key_dim,
        "use_forget_gate": c.decay != "none",
        "num_householder": c.num_householder,
        "allow_neg_eigval": c.negative_eigenvalues,
        "use_output_gate": c.output_gate != "none",
        "use_short_conv": c.conv_width > 0,
        "conv_size": c.conv_width or 4,
    }


# --- tensors


def links(model: ModelConfig) -> Iterator[Link]:
    """All tensors of any of them."""

    def of_layer(block: BlockConfig, _: int) -> Iterator[Link]:
        yield from parts.norms(model.width, "attn_norm.weight", "mlp_norm.weight")
        if isinstance(block.mixer, DeltaAttentionConfig):
            yield from _delta(block.mixer, model.width)
        else:
            assert isinstance(block.mixer, GatedLinearAttentionConfig)
            is_hgrn2 = block.mixer.decay_form == "forget_gate"
            links_of_mixer = _hgrn2 if is_hgrn2 else _linear
            yield from links_of_mixer(block.mixer, model.width)
        assert isinstance(block.feed_forward, GatedMLPConfig)
        yield from parts.gated_mlp(block.feed_forward.hidden, model.width)

    yield from parts.ends(model, "model.embeddings.weight")
    if model.decay_floors is not None:
        floors = (model.num_layers, *model.decay_floors)
        on_disk = (model.num_layers, math.prod(model.decay_floors))
        yield vector("model.lower_bounds", ("decay_floors",), floors, on_disk)
    yield from in_blocks(model, of_layer)


def _linear(c: GatedLinearAttentionConfig, width: int) -> Iterator[Link]:
    tensor = "attn."
    keys = (c.num_heads, c.key_dim)
    values = (c.num_heads, c.value_dim)
    projected = [("q", "query", keys), ("k", "key", keys), ("v", "value", values)]
    if c.output_gate != "none":
        projected.append(("g", "output_gate", values))
    for name, path, heads in projected:
        yield matrix(f"{tensor}{name}_proj.weight", ("mixer", path, "kernel"), (width,), heads)
    if c.decay == "vector":
        low = (c.decay_rank,)
        down = ("mixer", "decay_down", "kernel")
        yield matrix(f"{tensor}gk_proj.0.weight", down, (width,), low)
        yield matrix(f"{tensor}gk_proj.1.weight", ("mixer", "decay_up", "kernel"), low, keys)
        yield vector(f"{tensor}gk_proj.1.bias", ("mixer", "decay_bias"), keys)
    if c.conv_width:
        channels = (c.num_heads * c.key_dim, c.num_heads * c.key_dim, c.num_heads * c.value_dim)
        first = 0
        for name, count in zip("qkv", channels):
            weight = f"{tensor}{name}_conv1d.weight"
            yield convolution(weight, ("mixer", "conv"), c.conv_width, count, first)
            first += count
    # The name says whether fla's kernel fuses norm and gate.
    names = (f"{tensor}g_norm_swish_gate.weight", f"{tensor}g_norm.weight")
    if c.output_gate == "none":
        names = names[::-1]
    norm = vector(names[0], ("mixer", "norm", parts.SCALE), (c.value_dim,))
    yield norm._replace(also=names[1:])
    yield matrix(f"{tensor}o_proj.weight", ("mixer", "out", "kernel"), values, (width,))


def _hgrn2(c: GatedLinearAttentionConfig, width: int) -> Iterator[Link]:
    tensor = "attn."
    keys = (c.num_heads, c.key_dim)
    values = (c.num_heads, c.value_dim)
    for name, path, heads in (("q", "query", keys), ("f", "forget", keys), ("i", "value", values)):
        yield matrix(f"{tensor}{name}_proj.weight", ("mixer", path, "kernel"), (width,), heads)
    yield vector(f"{tensor}g_norm.weight", ("mixer", "norm", parts.SCALE), values)
    yield matrix(f"{tensor}o_proj.weight", ("mixer", "out", "kernel"), values, (width,))


def _delta(c: DeltaAttentionConfig, width: int) -> Iterator[Link]:
    tensor = "attn."
    # Without a decay there is nothing of it.
    of_decay = {("mixer", "a_log"), ("mixer", "dt_bias")}
    for link in parts.delta_ends(c, width, tensor, "o_norm", "o_proj"):
        if c.decay != "none" or link.path not in of_decay:
            yield link
    if c.num_householder == 1:
        yield from parts.delta_projections(c, width, tensor)
    else:
        yield from delta_product.projections(c, width, tensor)
    if c.decay != "none":
        path = ("mixer", "decay", "kernel")
        yield matrix(f"{tensor}a_proj.weight", path, (width,), (c.num_heads,))
    if c.output_gate != "none":
        values = (c.num_heads, c.value_dim)
        path = ("mixer", "output_gate", "kernel")
        yield matrix(f"{tensor}g_proj.weight", path, (width,), values)


FAMILIES = (
    Family(GLA, "GLAForCausalLM", gla_to_model, gla_to_json, links),
    Family(RETNET, "RetNetForCausalLM", retnet_to_model, retnet_to_json, links),
    Family(HGRN2, "HGRN2ForCausalLM", hgrn2_to_model, hgrn2_to_json, links),
    Family(
        GATED_DELTANET,
        "GatedDeltaNetForCausalLM",
        deltanet_to_model,
        deltanet_to_json,
        links,
    ),
    Family(
        GATED_DELTAPRODUCT,
        "GatedDeltaProductForCausalLM",
        deltaproduct_to_model,
        deltaproduct_to_json,
        links,
    ),
)
