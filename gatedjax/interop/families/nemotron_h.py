"""Nemotron-H: every block is one of Mamba-2, attention, a squared-ReLU MLP or experts of those."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from gatedjax.config import (
    BlockConfig,
    GatedAttentionConfig,
    Mamba2Config,
    MLPConfig,
    ModelConfig,
    NoFeedForwardConfig,
    NoMixerConfig,
    RouterConfig,
    SparseMoEConfig,
)
from gatedjax.interop.families import parts
from gatedjax.interop.families.base import (
    Family,
    NamedLayer,
    assembled,
    json_values,
    model_values,
)
from gatedjax.interop.families.dense import FULL, attention_of
from gatedjax.interop.families.qwen_hybrid import LINEAR
from gatedjax.interop.hf_config import HFConfig, Rope
from gatedjax.interop.links import Link, Shape, in_blocks, matrix, rows, vector

MODEL_TYPE = "nemotron_h"
MOE = "moe"
MLP = "mlp"
# Letters of `hybrid_override_pattern`, and names that were in use before.
_LETTERS = {"M": LINEAR, "E": MOE, "*": FULL, "-": MLP}
_OLD_NAMES = {"mamba": LINEAR, "attention": FULL}
_LAYERS = {
    LINEAR: NamedLayer("mamba", "none"),
    FULL: NamedLayer("attention", "none"),
    MLP: NamedLayer("none", "mlp"),
    MOE: NamedLayer("none", "moe"),
}


def to_model(config: HFConfig) -> ModelConfig:
    """Attention without positions; a block has one norm, before its one layer."""
    config.require("attention_bias", (False,))
    config.require("mlp_bias", (False,))
    config.require("use_bias", (False,))
    config.require("mamba_proj_bias", (False,))
    config.require("mlp_hidden_act", ("relu2",))
    config.require("mamba_hidden_act", ("silu",))
    config.require("sliding_window", ())
    config.require("residual_in_fp32", (False,))
    layers = [_LAYERS[kind] for kind in _kinds(config)]
    used = {layer.ffn for layer in layers} | {layer.mixer for layer in layers}
    mixers: dict[str, Any] = {
        "mamba": Mamba2Config(
            num_heads=config.size("mamba_num_heads", default=128),
            head_dim=config.size("mamba_head_dim", default=64),
            state_dim=config.size("ssm_state_size", default=128),
            num_groups=config.size("n_groups", default=8),
            conv_width=config.size("conv_kernel", default=4),
            conv_bias=config.flag("use_conv_bias", True),
            min_step_size=config.number("time_step_min", default=0.001),
        ),
        "attention": attention_of(config, Rope(10_000.0, fraction=0.0)),
        "none": NoMixerConfig(),
    }
    ffns: dict[str, Any] = {"none": NoFeedForwardConfig()}
    if MLP in used:
        ffns["mlp"] = MLPConfig(hidden=config.size("intermediate_size"))
    if MOE in used:
        ffns["moe"] = _moe(config)
    values = model_values(config)
    values["norm_eps"] = config.number("layer_norm_epsilon", default=1e-5)
    return assembled(layers, mixers, ffns, **values)


def _kinds(config: HFConfig) -> list[str]:
    """What every block is."""
    pattern = config.text("hybrid_override_pattern")
    name = "layers_block_type" if "layers_block_type" in config else "layer_types"
    kinds = [_OLD_NAMES.get(kind, kind) for kind in config.texts(name) or ()]
    if not kinds and pattern:
        name = "hybrid_override_pattern"
        kinds = [_LETTERS.get(letter, "") for letter in pattern[:4096]]
    if not kinds or not set(kinds) <= set(_LAYERS):
        raise config.refuse(name, f"names of {', '.join(_LAYERS)}")
    return kinds


def _moe(config: HFConfig) -> SparseMoEConfig:
    num_groups = config.size("n_group", default=1)
    has_shared = config.count("n_shared_experts", 1) > 0
    shared = config.size("moe_shared_expert_intermediate_size", default=7688)
    return SparseMoEConfig(
        num_experts=config.size("n_routed_experts", "num_local_experts", default=8),
        experts_per_token=config.size("num_experts_per_tok", default=2),
        hidden=config.size("moe_intermediate_size"),
        gated=False,
        activation="relu_squared",
        latent=config.optional_size("moe_latent_size") or 0,
        router=RouterConfig(
            scoring="sigmoid",
            selection="grouped_topk" if num_groups > 1 else "topk",
            num_groups=num_groups,
            kept_groups=config.size("topk_group", default=1) if num_groups > 1 else 1,
            renormalize=config.flag("norm_topk_prob", True),
            scale=config.number("routed_scaling_factor", default=1.0),
            bias_rule="sign",
        ),
        shared_hidden=shared if has_shared else 0,
        shared_gate=False,
        balance_loss=0.0,
        z_loss=0.0,
    )


def to_json(model: ModelConfig) -> dict[str, Any]:
    """The same, back."""
    values = json_values(model)
    values["layer_norm_epsilon"] = values.pop("rms_norm_eps")
    values["mlp_hidden_act"] = "relu2"
    values |= {"attention_bias": False, "mlp_bias": False, "use_bias": False}
    values["mamba_proj_bias"] = False
    kinds = []
    for i in range(model.num_layers):
        kind, of_layer = _layer_to_json(*model.layer(i))
        kinds.append(kind)
        values |= of_layer
    return values | {"layers_block_type": kinds}


def _layer_to_json(mixer: Any, ffn: Any) -> tuple[str, dict[str, Any]]:
    """What a block is, and its values."""
    if isinstance(mixer, Mamba2Config):
        return LINEAR, {
            "mamba_num_heads": mixer.num_heads,
            "mamba_head_dim": mixer.head_dim,
            "ssm_state_size": mixer.state_dim,
            "n_groups": mixer.num_groups,
            "conv_kernel": mixer.conv_width,
            "use_conv_bias": mixer.conv_bias,
            "time_step_min": mixer.min_step_size,
        }
    if isinstance(mixer, GatedAttentionConfig):
        return FULL, {
            "num_attention_heads": mixer.num_heads,
            "num_key_value_heads": mixer.kv_heads,
            "head_dim": mixer.head_dim,
        }
    if isinstance(ffn, MLPConfig):
        return MLP, {"intermediate_size": ffn.hidden}
    if isinstance(ffn, SparseMoEConfig):
        return MOE, {
            "n_routed_experts": ffn.num_experts,
            "num_experts_per_tok": ffn.experts_per_token,
            "moe_intermediate_size": ffn.hidden,
            "moe_latent_size": ffn.latent or None,
            "n_shared_experts": 1 if ffn.shared_hidden else 0,
            "moe_shared_expert_intermediate_size": ffn.shared_hidden or ffn.hidden,
            "n_group": ffn.router.num_groups,
            "topk_group": ffn.router.kept_groups,
            "norm_topk_prob": ffn.router.renormalize,
            "routed_scaling_factor": ffn.router.scale,
        }
    # What reads it again will name the difference.
    return MLP, {}


def links(model: ModelConfig) -> Iterator[Link]:
    """All tensors, in the names of the released files."""
    width = model.width

    def of_layer(block: BlockConfig, _: int) -> Iterator[Link]:
        has_mixer = not isinstance(block.mixer, NoMixerConfig)
        norm = "mixer_norm" if has_mixer else "ffn_norm"
        yield vector("norm.weight", (norm, parts.SCALE), (width,))
        if isinstance(block.mixer, Mamba2Config):
            yield from _mamba(block.mixer, width)
        elif isinstance(block.mixer, GatedAttentionConfig):
            yield from parts.attention(block.mixer, width, "mixer.")
        elif isinstance(block.feed_forward, MLPConfig):
            yield from _mlp(block.feed_forward.hidden, width, "mixer.", ("ffn",))
        else:
            assert isinstance(block.feed_forward, SparseMoEConfig)
            yield from _experts(block.feed_forward, width)

    yield from parts.ends(model, "backbone.embeddings.weight", "backbone.norm_f.weight")
    yield from in_blocks(model, of_layer, "backbone.layers.")


def _mamba(c: Mamba2Config, width: int) -> Iterator[Link]:
    """One matrix for gate, values, keys, queries and step sizes, in this order."""
    heads = (c.num_heads, c.head_dim)
    groups = (c.num_groups, c.state_dim)
    inner = c.num_heads * c.head_dim
    of_groups = c.num_groups * c.state_dim
    projected: tuple[tuple[str, Shape], ...] = (
        ("output_gate", heads),
        ("value", heads),
        ("key", groups),
        ("query", groups),
        ("dt", (c.num_heads,)),
    )
    total = 2 * inner + 2 * of_groups + c.num_heads
    first = 0
    for name, outputs in projected:
        path = ("mixer", name, parts.KERNEL)
        yield rows("mixer.in_proj.weight", path, (width,), outputs, first, total)
        first += int(np.prod(outputs))
    channels = inner + 2 * of_groups
    yield from parts.convolution_with_bias(c.conv_width, channels, "mixer.conv1d.", c.conv_bias)
    of_heads = (c.num_heads,)
    yield vector("mixer.A_log", ("mixer", "a_log"), of_heads)
    yield vector("mixer.dt_bias", ("mixer", "dt_bias"), of_heads)
    yield vector("mixer.D", ("mixer", "skip"), of_heads)
    yield vector("mixer.norm.weight", ("mixer", "norm_scale"), heads)
    yield matrix("mixer.out_proj.weight", ("mixer", "out", parts.KERNEL), heads, (width,))


def _mlp(
    hidden: int,
    width: int,
    tensor: str,
    path: tuple[str, ...],
) -> Iterator[Link]:
    """Two matrices.

    Args:
      hidden: channels between them.
      width: of the model.
      tensor: what stands before their names.
      path: of the layer.
    """
    yield matrix(f"{tensor}up_proj.weight", (*path, "up", parts.KERNEL), (width,), (hidden,))
    yield matrix(f"{tensor}down_proj.weight", (*path, "down", parts.KERNEL), (hidden,), (width,))


def _experts(c: SparseMoEConfig, width: int) -> Iterator[Link]:
    yield from parts.biased_router(c, width, "mixer.gate.")
    yield from parts.experts(c, width, "mixer.experts.", ("", "up_proj", "down_proj"))
    if c.latent:
        low = (c.latent,)
        down = ("ffn", "latent_down", parts.KERNEL)
        yield matrix("mixer.fc1_latent_proj.weight", down, (width,), low)
        up = ("ffn", "latent_up", parts.KERNEL)
        yield matrix("mixer.fc2_latent_proj.weight", up, low, (width,))
    if c.shared_hidden:
        yield from _mlp(c.shared_hidden, width, "mixer.shared_experts.", ("ffn", "shared"))


FAMILIES = (
    Family(
        MODEL_TYPE,
        "NemotronHForCausalLM",
        to_model,
        to_json,
        links,
        # In memory transformers calls the whole "model".
        renamed=("model.* -> backbone.*",),
        left_out=("mtp.*", "backbone.mtp.*"),
    ),
)
