"""Multi-head latent attention with DeepSeek's experts: DeepSeek-V3, and Kimi-Linear with KDA."""

from collections.abc import Iterator
from typing import Any

from gatedjax.config import (
    BlockConfig,
    DeltaAttentionConfig,
    GatedMLPConfig,
    MLAConfig,
    ModelConfig,
    RouterConfig,
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
from gatedjax.interop.families.dense import FULL
from gatedjax.interop.families.qwen_hybrid import LINEAR
from gatedjax.interop.hf_config import HFConfig, Rope, rope_to_json
from gatedjax.interop.links import Link, in_blocks, matrix, vector

DEEPSEEK = "deepseek_v3"
KIMI = "kimi_linear"
_DENSE = "dense"
_SPARSE = "sparse"
# Of the norms on latents; it stands in the code of both.
_LATENT_EPS = 1e-6


# --- DeepSeek-V3


def deepseek_to_model(config: HFConfig) -> ModelConfig:
    """The first layers are dense; experts come in groups."""
    config.require("hidden_act", ("silu",))
    config.require("attention_bias", (False,))
    count = config.size("num_hidden_layers")
    dense = config.count("first_k_dense_replace", 3)
    layers = [NamedLayer("mla", "mlp" if i < dense else "moe") for i in range(count)]
    moe = sigmoid_moe(
        config,
        chosen="num_experts_per_tok",
        experts=("n_routed_experts", "num_local_experts"),
        groups="n_group",
        shared="n_shared_experts",
        renormalize="norm_topk_prob",
        scale=2.5,
    )
    return assembled(
        layers, {"mla": _deepseek_mixer(config)}, _ffns(config, moe), **_values(config)
    )


def _deepseek_mixer(config: HFConfig) -> MLAConfig:
    rope = config.group("rope_parameters" if "rope_parameters" in config else "rope_scaling")
    values: dict[str, Any] = {}
    kind = rope.text("rope_type") or rope.text("type") or "default"
    base = rope.number("rope_theta", default=config.number("rope_theta", default=10_000.0))
    if kind == "yarn":
        rope.require("beta_fast", (32, 32.0))
        rope.require("beta_slow", (1, 1.0))
        rope.require("attention_factor", ())
        length = config.size("max_position_embeddings", default=4096)
        values["yarn_factor"] = rope.number("factor")
        values["yarn_original_length"] = rope.size(
            "original_max_position_embeddings", default=length
        )
        if rope.number("mscale", default=0.0) and rope.number("mscale_all_dim", default=0.0):
            values["yarn_mscale"] = rope.number("mscale")
            values["yarn_mscale_all"] = rope.number("mscale_all_dim")
        elif "mscale_all_dim" in rope:
            raise rope.refuse("mscale_all_dim", "mscale beside it, or neither")
    elif kind != "default":
        raise rope.refuse("rope_type", "'default' or 'yarn'")
    is_interleaved = config.flag("rope_interleave", True)
    return latent_of(
        config,
        rope="interleaved" if is_interleaved else "halves",
        rope_base=base,
        **values,
    )


def deepseek_to_json(model: ModelConfig) -> dict[str, Any]:
    """The same, back."""
    mixer = the_layer(model, MLAConfig, DEEPSEEK)
    moe = the_layer(model, SparseMoEConfig, DEEPSEEK)
    rope = rope_to_json(
        Rope(
            mixer.rope_base,
            yarn_factor=mixer.yarn_factor,
            yarn_original_length=mixer.yarn_original_length,
        )
    )
    if mixer.yarn_mscale_all:
        rope["mscale"] = mixer.yarn_mscale
        rope["mscale_all_dim"] = mixer.yarn_mscale_all
    dense = _dense_layers(model)
    return (
        json_values(model)
        | latent_to_json(mixer)
        | {
            "rope_parameters": rope,
            "rope_interleave": mixer.rope == "interleaved",
            "first_k_dense_replace": len(dense),
            "intermediate_size": _dense_hidden(model, moe),
            "moe_intermediate_size": moe.hidden,
            "n_routed_experts": moe.num_experts,
            "n_shared_experts": max(1, moe.shared_hidden // moe.hidden),
            "n_group": moe.router.num_groups,
            "topk_group": moe.router.kept_groups,
            "num_experts_per_tok": moe.experts_per_token,
            "norm_topk_prob": moe.router.renormalize,
            "routed_scaling_factor": moe.router.scale,
        }
    )


def deepseek_links(model: ModelConfig) -> Iterator[Link]:
    """All tensors."""

    def of_layer(block: BlockConfig, _: int) -> Iterator[Link]:
        assert isinstance(block.mixer, MLAConfig)
        yield from parts.norms(model.width)
        yield from parts.latent_attention(block.mixer, model.width)
        yield from _feed_forward(block, model.width, "mlp.", _PLAIN)

    yield from parts.ends(model)
    yield from in_blocks(model, of_layer)


# --- Kimi-Linear


def kimi_to_model(config: HFConfig) -> ModelConfig:
    """KDA, and MLA without any positions."""
    config.require("hidden_act", ("silu",))
    config.require("attention_bias", (False,))
    linear = config.group("linear_attn_config")
    heads = linear.size("num_heads", default=config.size("linear_num_heads", default=32))
    head_dim = linear.size("head_dim", default=config.size("linear_head_dim", default=128))
    width = config.size("linear_conv_kernel_dim", default=4)
    mixers = {
        "kda": DeltaAttentionConfig(
            num_heads=heads,
            num_key_heads=heads,
            key_dim=head_dim,
            value_dim=head_dim,
            decay="vector",
            decay_rank=head_dim,
            output_gate="sigmoid",
            output_gate_rank=head_dim,
            conv_width=linear.size("short_conv_kernel_size", default=width),
        ),
        "mla": latent_of(config, rope="none"),
    }
    moe = sigmoid_moe(
        config,
        chosen="num_experts_per_token",
        experts=("num_experts", "num_local_experts"),
        groups="num_expert_group",
        shared="num_shared_experts",
        renormalize="moe_renormalize",
        scale=2.446,
    )
    layers = []
    for kind, ffn in zip(_kimi_kinds(config, linear), _kimi_ffns(config)):
        mixer = "kda" if kind == LINEAR else "mla"
        layers.append(NamedLayer(mixer, "mlp" if ffn == _DENSE else "moe"))
    values = _values(config) | {"norm_eps": config.number("rms_norm_eps", default=1e-5)}
    return assembled(layers, mixers, _ffns(config, moe), **values)


def _kimi_kinds(config: HFConfig, linear: HFConfig) -> list[str]:
    """Layers of released files are counted from 1."""
    count = config.size("num_hidden_layers")
    whole = linear.counts("full_attn_layers")
    if whole:
        default = [FULL if i + 1 in whole else LINEAR for i in range(count)]
    else:
        default = [FULL if i and i % 4 == 0 else LINEAR for i in range(count)]
    return kinds_of_layers(config, default, (LINEAR, FULL))


def _kimi_ffns(config: HFConfig) -> list[str]:
    count = config.size("num_hidden_layers")
    dense = config.count("first_k_dense_replace", 1)
    default = [_DENSE if i < dense else _SPARSE for i in range(count)]
    kinds = list(config.texts("mlp_layer_types") or default)
    if len(kinds) != count or not set(kinds) <= {_DENSE, _SPARSE}:
        raise config.refuse("mlp_layer_types", f"{count} of {_DENSE}, {_SPARSE}")
    return kinds


def kimi_to_json(model: ModelConfig) -> dict[str, Any]:
    """The same, back."""
    mixer = the_layer(model, MLAConfig, KIMI)
    kda = the_layer(model, DeltaAttentionConfig, KIMI)
    moe = the_layer(model, SparseMoEConfig, KIMI)
    dense = _dense_layers(model)
    count = range(model.num_layers)
    kinds = [FULL if isinstance(model.layer(i)[0], MLAConfig) else LINEAR for i in count]
    whole = [i + 1 for i in count if kinds[i] == FULL]
    return (
        json_values(model)
        | latent_to_json(mixer)
        | {
            "layer_types": kinds,
            "mlp_layer_types": [_DENSE if i in dense else _SPARSE for i in count],
            "linear_attn_config": {
                "full_attn_layers": whole,
                "kda_layers": [i + 1 for i in count if kinds[i] == LINEAR],
                "head_dim": kda.key_dim,
                "num_heads": kda.num_heads,
                "short_conv_kernel_size": kda.conv_width,
            },
            "intermediate_size": _dense_hidden(model, moe),
            "moe_intermediate_size": moe.hidden,
            "num_experts": moe.num_experts,
            "num_shared_experts": max(1, moe.shared_hidden // moe.hidden),
            "num_expert_group": moe.router.num_groups,
            "topk_group": moe.router.kept_groups,
            "num_experts_per_token": moe.experts_per_token,
            "moe_renormalize": moe.router.renormalize,
            "routed_scaling_factor": moe.router.scale,
        }
    )


def kimi_links(model: ModelConfig) -> Iterator[Link]:
    """All tensors, in the names of the released files."""

    def of_layer(block: BlockConfig, _: int) -> Iterator[Link]:
        yield from parts.norms(model.width)
        if isinstance(block.mixer, MLAConfig):
            yield from parts.latent_attention(block.mixer, model.width)
        else:
            assert isinstance(block.mixer, DeltaAttentionConfig)
            yield from _kda(block.mixer, model.width)
        if isinstance(block.feed_forward, GatedMLPConfig):
            # transformers saves a dense layer, too, under the name of the sparse ones.
            for link in _feed_forward(block, model.width, "mlp.", _KIMI_EXPERTS):
                yield link._replace(also=(f"block_sparse_moe.{link.tensor.removeprefix('mlp.')}",))
        else:
            yield from _feed_forward(block, model.width, "block_sparse_moe.", _KIMI_EXPERTS)

    yield from parts.ends(model)
    yield from in_blocks(model, of_layer)


def _kda(c: DeltaAttentionConfig, width: int) -> Iterator[Link]:
    tensor = "self_attn."
    heads = (c.num_heads, c.key_dim)
    yield from parts.delta_projections(c, width, tensor)
    for name, path in (("f", "decay"), ("g", "output_gate")):
        low = (c.key_dim,)
        down = ("mixer", f"{path}_down", parts.KERNEL)
        yield matrix(f"{tensor}{name}_a_proj.weight", down, (width,), low)
        up = ("mixer", f"{path}_up", parts.KERNEL)
        yield matrix(f"{tensor}{name}_b_proj.weight", up, low, heads)
    of_heads = (c.num_heads,)
    yield vector(f"{tensor}A_log", ("mixer", "a_log"), of_heads, (1, 1, c.num_heads, 1))
    yield vector(f"{tensor}dt_bias", ("mixer", "dt_bias"), heads)
    yield vector(f"{tensor}o_norm.weight", ("mixer", "norm", parts.SCALE), (c.value_dim,))
    yield matrix(f"{tensor}o_proj.weight", ("mixer", "out", parts.KERNEL), heads, (width,))


# --- both

_PLAIN = ("gate_proj", "up_proj", "down_proj")
_KIMI_EXPERTS = ("w1", "w3", "w2")


def latent_of(config: HFConfig, **values: Any) -> MLAConfig:
    """Multi-head latent attention of a config.json.

    Args:
      config: of the checkpoint.
      **values: its rotation.
    """
    return MLAConfig(
        num_heads=config.size("num_attention_heads"),
        kv_rank=config.size("kv_lora_rank", default=512),
        q_rank=config.optional_size("q_lora_rank"),
        nope_dim=config.size("qk_nope_head_dim", default=128),
        rope_dim=config.size("qk_rope_head_dim", default=64),
        value_dim=config.size("v_head_dim", default=128),
        latent_norm_eps=_LATENT_EPS,
        **values,
    )


def latent_to_json(c: MLAConfig) -> dict[str, Any]:
    """The same, back, without its rotation."""
    return {
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_heads,
        "kv_lora_rank": c.kv_rank,
        "q_lora_rank": c.q_rank,
        "qk_nope_head_dim": c.nope_dim,
        "qk_rope_head_dim": c.rope_dim,
        "v_head_dim": c.value_dim,
        "attention_bias": False,
    }


def sigmoid_moe(
    config: HFConfig,
    *,
    chosen: str,
    experts: tuple[str, str],
    groups: str,
    shared: str,
    renormalize: str,
    scale: float,
) -> SparseMoEConfig:
    """Experts chosen by sigmoid and a bias, among groups; shared experts see every token.

    Args:
      config: of the checkpoint.
      chosen: the key of how many experts a token has.
      experts: keys of how many there are, the first that is there.
      groups: key of how many groups they come in.
      shared: key of how many shared experts there are.
      renormalize: key of whether weights sum to 1 before the scale.
      scale: of the family, where the file has none.
    """
    hidden = config.size("moe_intermediate_size")
    num_groups = config.size(groups, default=1)
    router = RouterConfig(
        scoring="sigmoid",
        selection="grouped_topk" if num_groups > 1 else "topk",
        num_groups=num_groups,
        kept_groups=config.size("topk_group", default=1) if num_groups > 1 else 1,
        renormalize=config.flag(renormalize, True),
        scale=config.number("routed_scaling_factor", default=scale),
        bias_rule="sign",
    )
    return SparseMoEConfig(
        num_experts=config.size(*experts, default=256),
        experts_per_token=config.size(chosen, "num_experts_per_tok", default=8),
        hidden=hidden,
        router=router,
        shared_hidden=hidden * config.count(shared, 1),
        shared_gate=False,
        # The bias keeps loads even.
        balance_loss=0.0,
        z_loss=0.0,
    )


def _ffns(config: HFConfig, moe: SparseMoEConfig) -> dict[str, Any]:
    return {"mlp": GatedMLPConfig(hidden=config.size("intermediate_size")), "moe": moe}


def _values(config: HFConfig) -> dict[str, Any]:
    return model_values(config)


def _dense_layers(model: ModelConfig) -> list[int]:
    layers = range(model.num_layers)
    return [i for i in layers if isinstance(model.layer(i)[1], GatedMLPConfig)]


def _dense_hidden(model: ModelConfig, moe: SparseMoEConfig) -> int:
    for i in _dense_layers(model):
        ffn = model.layer(i)[1]
        assert isinstance(ffn, GatedMLPConfig)
        return ffn.hidden
    return moe.hidden


def _feed_forward(
    block: BlockConfig,
    width: int,
    tensor: str,
    names: tuple[str, str, str],
) -> Iterator[Link]:
    """A dense layer, or experts with shared ones.

    Args:
      block: of the layer.
      width: of the model.
      tensor: what stands before the names.
      names: of the matrices of an expert.
    """
    ffn = block.feed_forward
    if isinstance(ffn, GatedMLPConfig):
        yield from parts.gated_mlp(ffn.hidden, width, tensor)
        return
    assert isinstance(ffn, SparseMoEConfig)
    yield from parts.biased_router(ffn, width, f"{tensor}gate.")
    yield from parts.experts(ffn, width, f"{tensor}experts.", names)
    if ffn.shared_hidden:
        shared = ("ffn", "shared")
        yield from parts.gated_mlp(ffn.shared_hidden, width, f"{tensor}shared_experts.", shared)


FAMILIES = (
    Family(
        DEEPSEEK,
        "DeepseekV3ForCausalLM",
        deepseek_to_model,
        deepseek_to_json,
        deepseek_links,
        left_out=("*.rotary_emb.inv_freq", "mtp.*"),
    ),
    Family(
        KIMI,
        "KimiLinearForCausalLM",
        kimi_to_model,
        kimi_to_json,
        kimi_links,
    ),
)
