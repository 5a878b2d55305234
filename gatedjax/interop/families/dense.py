"""Llama and its descendants with one sort of layer: Mistral, Qwen3, Qwen3-MoE, Mixtral."""

from collections.abc import Iterator
from typing import Any

from gatedjax.config import (
    GatedAttentionConfig,
    GatedMLPConfig,
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
from gatedjax.interop.hf_config import HFConfig, Rope, rope_of, rope_to_json
from gatedjax.interop.links import Link, in_layer

FULL = "full_attention"
WINDOW = "sliding_attention"
_MIXER = {FULL: "attention", WINDOW: "window_attention"}


def attention_of(
    config: HFConfig,
    rope: Rope,
    window: int | None = None,
    **values: Any,
) -> GatedAttentionConfig:
    """Plain attention of a config.json: no gate, no norm of queries and keys but where asked.

    Args:
      config: of the checkpoint.
      rope: its rotation.
      window: of the layer.
      **values: what differs.
    """
    heads = config.size("num_attention_heads")
    head_dim = config.optional_size("head_dim") or config.size("hidden_size") // heads
    plain: dict[str, Any] = dict(
        num_heads=heads,
        num_kv_heads=config.size("num_key_value_heads", default=heads),
        head_dim=head_dim,
        gate_position="none",
        qk_norm=False,
        rope_base=rope.base,
        rope_fraction=rope.fraction,
        yarn_factor=rope.yarn_factor,
        yarn_original_length=rope.yarn_original_length,
        window=window,
    )
    return GatedAttentionConfig(**plain | values)


def attention_to_json(c: GatedAttentionConfig, with_fraction: bool = False) -> dict[str, Any]:
    """The same, back."""
    rope = Rope(c.rope_base, c.rope_fraction, c.yarn_factor, c.yarn_original_length)
    return {
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "rope_parameters": rope_to_json(rope, with_fraction),
    }


def softmax_moe(config: HFConfig, hidden: int, renormalize: bool) -> SparseMoEConfig:
    """Experts chosen by their softmax.

    Args:
      config: of the checkpoint.
      hidden: of one expert.
      renormalize: whether the weights of the chosen sum to 1.
    """
    chosen = config.size("num_experts_per_tok")
    return SparseMoEConfig(
        num_experts=config.size("num_local_experts", "num_experts"),
        experts_per_token=chosen,
        hidden=hidden,
        router=RouterConfig(renormalize=renormalize),
        # Theirs is k at perfect balance, ours 1.
        balance_loss=chosen * config.number("router_aux_loss_coef", default=0.001),
        z_loss=0.0,
    )


def moe_to_json(c: SparseMoEConfig) -> dict[str, Any]:
    """The numbers of experts, in the words that transformers reads for every family."""
    return {
        "num_experts": c.num_experts,
        "num_local_experts": c.num_experts,
        "num_experts_per_tok": c.experts_per_token,
        "router_aux_loss_coef": c.balance_loss / c.experts_per_token,
    }


def is_sparse(config: HFConfig, i: int) -> bool:
    """Whether layer i of a Qwen model with experts has them."""
    step = config.size("decoder_sparse_step", default=1)
    return i not in config.counts("mlp_only_layers") and (i + 1) % step == 0


def _model(config: HFConfig, default_base: float, qk_norm: bool) -> dict[str, Any]:
    """Mixers and values of the model, and the names of the mixers of all layers."""
    config.require("hidden_act", ("silu",))
    config.require("attention_bias", (False,))
    config.require("mlp_bias", (False,))
    rope = rope_of(config, default_base)
    window = config.optional_size("sliding_window")
    if config.values.get("use_sliding_window") is False:
        window = None
    is_whole = window is None or "layer_types" in config
    default = [FULL if is_whole else WINDOW] * config.size("num_hidden_layers")
    kinds = kinds_of_layers(config, default, (FULL, WINDOW))
    if WINDOW in kinds and window is None:
        raise config.refuse("sliding_window", "a number of tokens")
    return dict(
        names=[_MIXER[kind] for kind in kinds],
        mixers={
            "attention": attention_of(config, rope, qk_norm=qk_norm),
            "window_attention": attention_of(config, rope, window, qk_norm=qk_norm),
        },
    )


def _dense(config: HFConfig, default_base: float, qk_norm: bool) -> ModelConfig:
    found = _model(config, default_base, qk_norm)
    return assembled(
        [NamedLayer(name, "mlp") for name in found["names"]],
        found["mixers"],
        {"mlp": GatedMLPConfig(hidden=config.size("intermediate_size"))},
        **model_values(config),
    )


def _attention_json(model: ModelConfig, family: str) -> dict[str, Any]:
    """Heads, rotation and windows of all layers."""
    c = the_layer(model, GatedAttentionConfig, family)
    windows = [getattr(model.layer(i)[0], "window", None) for i in range(model.num_layers)]
    values = attention_to_json(c) | {"sliding_window": max(filter(None, windows), default=None)}
    if family in ("qwen3", "qwen3_moe"):
        values["use_sliding_window"] = any(windows)
    if len(set(windows)) > 1 or family == "qwen3":
        values["layer_types"] = [WINDOW if window else FULL for window in windows]
    return values


def _dense_json(model: ModelConfig, family: str) -> dict[str, Any]:
    mlp = the_layer(model, GatedMLPConfig, family)
    values = json_values(model) | _attention_json(model, family)
    return values | {"intermediate_size": mlp.hidden}


def llama_to_model(config: HFConfig) -> ModelConfig:
    """Llama, Mistral and what is called so."""
    return _dense(config, 10_000.0, qk_norm=False)


def qwen3_to_model(config: HFConfig) -> ModelConfig:
    """Queries and keys are normed, head by head."""
    return _dense(config, 10_000.0, qk_norm=True)


def qwen3_moe_to_model(config: HFConfig) -> ModelConfig:
    """Experts in all layers, or in those that the file says."""
    found = _model(config, 10_000.0, qk_norm=True)
    layers = []
    for i, name in enumerate(found["names"]):
        layers.append(NamedLayer(name, "moe" if is_sparse(config, i) else "mlp"))
    renormalize = config.flag("norm_topk_prob", False)
    ffns = {
        "moe": softmax_moe(config, config.size("moe_intermediate_size"), renormalize),
        "mlp": GatedMLPConfig(hidden=config.size("intermediate_size")),
    }
    return assembled(layers, found["mixers"], ffns, **model_values(config))


def qwen3_moe_to_json(model: ModelConfig) -> dict[str, Any]:
    moe = the_layer(model, SparseMoEConfig, "qwen3_moe")
    dense = []
    hidden = moe.hidden
    for i in range(model.num_layers):
        ffn = model.layer(i)[1]
        if isinstance(ffn, GatedMLPConfig):
            dense.append(i)
            hidden = ffn.hidden
    return (
        json_values(model)
        | _attention_json(model, "qwen3_moe")
        | moe_to_json(moe)
        | {
            "intermediate_size": hidden,
            "moe_intermediate_size": moe.hidden,
            "norm_topk_prob": moe.router.renormalize,
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense,
        }
    )


def mixtral_to_model(config: HFConfig) -> ModelConfig:
    """Experts in all layers; softmax over the chosen is the renormalized one over all."""
    found = _model(config, 1e6, qk_norm=False)
    layers = [NamedLayer(name, "moe") for name in found["names"]]
    moe = softmax_moe(config, config.size("intermediate_size"), renormalize=True)
    values = model_values(config) | {"norm_eps": config.number("rms_norm_eps", default=1e-5)}
    return assembled(layers, found["mixers"], {"moe": moe}, **values)


def mixtral_to_json(model: ModelConfig) -> dict[str, Any]:
    moe = the_layer(model, SparseMoEConfig, "mixtral")
    values = json_values(model) | _attention_json(model, "mixtral") | moe_to_json(moe)
    return values | {"intermediate_size": moe.hidden}


def links(model: ModelConfig) -> Iterator[Link]:
    """All of Llama, Mistral, Qwen3 and Qwen3-MoE."""
    yield from parts.ends(model)
    for i in range(model.num_layers):
        yield from in_layer(_block(model, i), model, i, f"model.layers.{i}.")


def _block(model: ModelConfig, i: int) -> Iterator[Link]:
    mixer, ffn = model.layer(i)
    assert isinstance(mixer, GatedAttentionConfig)
    yield from parts.norms(model.width)
    yield from parts.attention(mixer, model.width)
    if isinstance(ffn, GatedMLPConfig):
        yield from parts.gated_mlp(ffn.hidden, model.width)
    else:
        assert isinstance(ffn, SparseMoEConfig)
        yield from parts.router(ffn, model.width)
        yield from parts.experts(ffn, model.width)


def mixtral_links(model: ModelConfig) -> Iterator[Link]:
    """Mixtral's names: w1 is the gate, w3 up, w2 down."""
    yield from parts.ends(model)
    for i in range(model.num_layers):
        yield from in_layer(_mixtral_block(model, i), model, i, f"model.layers.{i}.")


def _mixtral_block(model: ModelConfig, i: int) -> Iterator[Link]:
    mixer, moe = model.layer(i)
    assert isinstance(mixer, GatedAttentionConfig) and isinstance(moe, SparseMoEConfig)
    yield from parts.norms(model.width)
    yield from parts.attention(mixer, model.width)
    place = "block_sparse_moe."
    yield from parts.router(moe, model.width, f"{place}gate.weight")
    yield from parts.experts(moe, model.width, f"{place}experts.", ("w1", "w3", "w2"))


def _dense_family(model_type: str, architecture: str, to_model) -> Family:
    def to_json(model: ModelConfig) -> dict[str, Any]:
        return _dense_json(model, model_type)

    return Family(
        model_type,
        architecture,
        to_model,
        to_json,
        links,
        # Older files hold the frequencies of the rotation, which the configuration gives.
        left_out=("*.rotary_emb.inv_freq",),
    )


FAMILIES = (
    _dense_family("llama", "LlamaForCausalLM", llama_to_model),
    _dense_family("mistral", "MistralForCausalLM", llama_to_model),
    _dense_family("qwen3", "Qwen3ForCausalLM", qwen3_to_model),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        qwen3_moe_to_model,
        qwen3_moe_to_json,
        links,
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        mixtral_to_model,
        mixtral_to_json,
        mixtral_links,
    ),
)
