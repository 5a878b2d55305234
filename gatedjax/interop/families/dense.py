"""Llama and its descendants with attention in all layers: Mistral, Qwen2 and 3, Mixtral."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from gatedjax.config import (
    BlockConfig,
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
from gatedjax.interop.links import Link, in_blocks

FULL = "full_attention"
WINDOW = "sliding_attention"
# What rotations and configurations of attention call the same.
_EXTENSIONS = Rope._fields[2:]
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
        **{name: getattr(rope, name) for name in _EXTENSIONS},
        window=window,
    )
    return GatedAttentionConfig(**plain | values)


def attention_to_json(c: GatedAttentionConfig, with_fraction: bool = False) -> dict[str, Any]:
    """The same, back."""
    extension = {name: getattr(c, name) for name in _EXTENSIONS}
    rope = Rope(c.rope_base, c.rope_fraction, **extension)
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


class Traits(NamedTuple):
    """What sets one of these families apart.

    model_type: its name.
    bias: of the projections of attention; asked: as `attention_bias` says, of all of them.
    qk_norm: whether queries and keys are normed, head by head.
    windows: none; all: `sliding_window` holds for every layer; by_layer: for those that
      `layer_types` names, if `use_sliding_window` is true.
    """

    model_type: str
    bias: Literal["none", "qkv", "asked"] = "none"
    qk_norm: bool = False
    windows: Literal["none", "all", "by_layer"] = "none"


def _mixers(config: HFConfig, traits: Traits) -> tuple[list[str], dict[str, Any]]:
    """The names of the mixers of all layers, and the mixers."""
    config.require("hidden_act", ("silu",))
    config.require("mlp_bias", (False,))
    values: dict[str, Any] = {"qk_norm": traits.qk_norm}
    if traits.bias == "qkv":
        values["bias"] = "qkv"
    elif traits.bias == "asked" and config.flag("attention_bias", False):
        values["bias"] = "all"
    rope = rope_of(config, 10_000.0)
    kinds = _kinds(config, traits)
    mixers = {"attention": attention_of(config, rope, **values)}
    if WINDOW in kinds:
        window = config.size("sliding_window")
        mixers["window_attention"] = attention_of(config, rope, window, **values)
    return [_MIXER[kind] for kind in kinds], mixers


def _kinds(config: HFConfig, traits: Traits) -> list[str]:
    """Which layers have windows."""
    count = config.size("num_hidden_layers")
    has_window = "sliding_window" in config
    if traits.windows == "none" or not has_window:
        return [FULL] * count
    if traits.windows == "all":
        return [WINDOW] * count
    if not config.flag("use_sliding_window", False):
        return [FULL] * count
    first = config.count("max_window_layers", 28)
    default = [FULL if i < first else WINDOW for i in range(count)]
    return kinds_of_layers(config, default, (FULL, WINDOW))


def _mixers_json(model: ModelConfig, traits: Traits) -> dict[str, Any]:
    """Heads, rotation, biases and windows of all layers."""
    c = the_layer(model, GatedAttentionConfig, traits.model_type)
    windows = [getattr(model.layer(i)[0], "window", None) for i in range(model.num_layers)]
    values = attention_to_json(c)
    if traits.bias == "asked":
        values["attention_bias"] = c.bias == "all"
    if traits.windows != "none":
        values["sliding_window"] = max(filter(None, windows), default=None)
    if traits.windows == "by_layer":
        values["use_sliding_window"] = any(windows)
        values["layer_types"] = [WINDOW if window else FULL for window in windows]
    return values


def dense_to_model(config: HFConfig, traits: Traits) -> ModelConfig:
    """Attention and a gated MLP in every layer."""
    names, mixers = _mixers(config, traits)
    return assembled(
        [NamedLayer(name, "mlp") for name in names],
        mixers,
        {"mlp": GatedMLPConfig(hidden=config.size("intermediate_size"))},
        **model_values(config),
    )


def dense_to_json(model: ModelConfig, traits: Traits) -> dict[str, Any]:
    """The same, back."""
    mlp = the_layer(model, GatedMLPConfig, traits.model_type)
    values = json_values(model) | _mixers_json(model, traits)
    return values | {"intermediate_size": mlp.hidden}


def qwen3_moe_to_model(config: HFConfig) -> ModelConfig:
    """Experts in all layers, or in those that the file says."""
    names, mixers = _mixers(config, _QWEN3_MOE)
    layers = []
    for i, name in enumerate(names):
        layers.append(NamedLayer(name, "moe" if is_sparse(config, i) else "mlp"))
    renormalize = config.flag("norm_topk_prob", False)
    ffns = {
        "moe": softmax_moe(config, config.size("moe_intermediate_size"), renormalize),
        "mlp": GatedMLPConfig(hidden=config.size("intermediate_size")),
    }
    return assembled(layers, mixers, ffns, **model_values(config))


def qwen3_moe_to_json(model: ModelConfig) -> dict[str, Any]:
    """The same, back."""
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
        | _mixers_json(model, _QWEN3_MOE)
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
    names, mixers = _mixers(config, _MIXTRAL)
    moe = softmax_moe(config, config.size("intermediate_size"), renormalize=True)
    values = model_values(config) | {"norm_eps": config.number("rms_norm_eps", default=1e-5)}
    return assembled([NamedLayer(name, "moe") for name in names], mixers, {"moe": moe}, **values)


def mixtral_to_json(model: ModelConfig) -> dict[str, Any]:
    """The same, back."""
    moe = the_layer(model, SparseMoEConfig, "mixtral")
    values = json_values(model) | _mixers_json(model, _MIXTRAL) | moe_to_json(moe)
    return values | {"intermediate_size": moe.hidden}


def links(model: ModelConfig) -> Iterator[Link]:
    """All of Llama, Mistral, Qwen3 and Qwen3-MoE."""
    width = model.width

    def of_layer(block: BlockConfig, _: int) -> Iterator[Link]:
        ffn = block.feed_forward
        assert isinstance(block.mixer, GatedAttentionConfig)
        yield from parts.norms(width)
        yield from parts.attention(block.mixer, width)
        if isinstance(ffn, GatedMLPConfig):
            yield from parts.gated_mlp(ffn.hidden, width)
        else:
            assert isinstance(ffn, SparseMoEConfig)
            yield from parts.router(ffn, width)
            yield from parts.experts(ffn, width)

    yield from parts.ends(model)
    yield from in_blocks(model, of_layer)


def mixtral_links(model: ModelConfig) -> Iterator[Link]:
    """Mixtral's names: w1 is the gate, w3 up, w2 down."""
    width = model.width

    def of_layer(block: BlockConfig, _: int) -> Iterator[Link]:
        moe = block.feed_forward
        assert isinstance(block.mixer, GatedAttentionConfig)
        assert isinstance(moe, SparseMoEConfig)
        yield from parts.norms(width)
        yield from parts.attention(block.mixer, width)
        tensor = "block_sparse_moe."
        yield from parts.router(moe, width, f"{tensor}gate.weight")
        yield from parts.experts(moe, width, f"{tensor}experts.", ("w1", "w3", "w2"))

    yield from parts.ends(model)
    yield from in_blocks(model, of_layer)


_QWEN3_MOE = Traits("qwen3_moe", "asked", qk_norm=True, windows="by_layer")
_MIXTRAL = Traits("mixtral", windows="all")


def _dense_family(architecture: str, traits: Traits) -> Family:
    def to_model(config: HFConfig) -> ModelConfig:
        return dense_to_model(config, traits)

    def to_json(model: ModelConfig) -> dict[str, Any]:
        return dense_to_json(model, traits)

    return Family(
        traits.model_type,
        architecture,
        to_model,
        to_json,
        links,
        # Older files hold the frequencies of the rotation, which the configuration gives.
        left_out=("*.rotary_emb.inv_freq",),
    )


FAMILIES = (
    _dense_family("LlamaForCausalLM", Traits("llama", "asked")),
    _dense_family("MistralForCausalLM", Traits("mistral", windows="all")),
    _dense_family("Qwen2ForCausalLM", Traits("qwen2", "qkv", windows="by_layer")),
    _dense_family(
        "Qwen3ForCausalLM",
        Traits("qwen3", "asked", qk_norm=True, windows="by_layer"),
    ),
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
