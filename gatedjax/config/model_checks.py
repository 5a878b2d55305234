"""What the parts of a model ask of each other: names, numbers, directions, what layers share."""

from typing import TYPE_CHECKING

from gatedjax.config.layers import (
    FeedForwardConfig,
    GatedAttentionConfig,
    MixerConfig,
    NoFeedForwardConfig,
    NoMixerConfig,
)
from gatedjax.config.mixing import AssociativeMemoryConfig
from gatedjax.config.moe import LoRAMixtureConfig, SparseMoEConfig
from gatedjax.config.on_demand import VersatileMLPConfig
from gatedjax.config.recurrent import RWKV7Config
from gatedjax.config.rwkv6 import RWKV6Config
from gatedjax.config.sources import check_sources
from gatedjax.errors import require

if TYPE_CHECKING:
    from gatedjax.config.model import BlockConfig, ModelConfig


def check_model(c: "ModelConfig") -> None:
    """InputError where the parts of a model do not fit each other."""
    c.output.check_model(c.vocab_size, c.tie_embeddings, c.z_loss)
    require(len(c.pattern) > 0, "pattern", c.pattern, "at least one layer")
    require(len(c.ffn_pattern) > 0, "ffn_pattern", c.ffn_pattern, "at least one layer")
    _check_names(c)
    _check_direction(c)
    _check_number(c)
    require(
        c.norm_kind == "rms" or not c.zero_centered_norm,
        "zero_centered_norm",
        c.zero_centered_norm,
        f"false with norm_kind {c.norm_kind!r}",
    )
    _check_blocks(c)
    _check_sparse(c)
    _check_attention(c)


def _check_names(c: "ModelConfig") -> None:
    """Everything that is named is there."""
    known = ", ".join(c.mixers)
    for key in ("pattern", "prefix", "suffix", "norm_placement"):
        for name in getattr(c, key):
            require(name in c.mixers, key, name, f"one of mixers: {known}")
    known = ", ".join(c.ffns)
    for key in ("ffn_pattern", "ffn_prefix", "ffn_suffix"):
        for name in getattr(c, key):
            require(name in c.ffns, key, name, f"one of ffns: {known}")


def _check_direction(c: "ModelConfig") -> None:
    """The layers see as far as the task allows, and have what it gives them."""
    mixers = {*c.prefix, *c.pattern, *c.suffix}
    ffns = {*c.ffn_prefix, *c.ffn_pattern, *c.ffn_suffix}
    layers: dict[str, MixerConfig | FeedForwardConfig] = {}
    layers |= {f"mixers.{name}": c.mixers[name] for name in sorted(mixers)}
    layers |= {f"ffns.{name}": c.ffns[name] for name in sorted(ffns)}
    for key, layer in layers.items():
        what = "mixer" if key.startswith("mixers.") else "feed-forward"
        reason = getattr(layer, "not_causal", None)
        expected = f"a causal {what}: this model predicts the next token"
        if c.task != "lm":
            causal = f"kind {layer.kind!r}: tokens do not see later ones"
            reason = getattr(layer, "only_causal", causal)
            expected = f"a {what} for both directions: model.task is {c.task!r}"
        require(reason is None, key, reason, expected)
        if c.task == "classify":
            _check_layer_of_images(c, key, layer)
        else:
            has_grid = isinstance(layer, GatedAttentionConfig) and layer.rope_grid
            expected = f"false with model.task {c.task!r}: text has no grid"
            require(not has_grid, f"{key}.rope_grid", True, expected)
    if c.task == "classify":
        _check_images(c)


def _check_layer_of_images(
    c: "ModelConfig", key: str, layer: MixerConfig | FeedForwardConfig
) -> None:
    """Patches have no ids."""
    by_id = {}
    if isinstance(layer, GatedAttentionConfig):
        by_id["value_bank"] = layer.value_bank > 0
    if isinstance(layer, SparseMoEConfig):
        by_id["router.selection"] = layer.router.selection == "hash"
        by_id["router.second_kind"] = len(layer.router.second_kind) > 0
    if isinstance(layer, LoRAMixtureConfig):
        by_id["first_pass"] = layer.first_pass
    for name, is_set in by_id.items():
        expected = "another value with model.task 'classify': patches have no token ids"
        require(not is_set, f"{key}.{name}", "one that goes by token ids", expected)


def _check_images(c: "ModelConfig") -> None:
    require(
        not c.lora.num_experts,
        "lora.num_experts",
        c.lora.num_experts,
        "0 with model.task 'classify': patches have no token ids",
    )
    require(
        c.patches.positions != "sincos" or c.width % 4 == 0,
        "width",
        c.width,
        "a multiple of 4 with patches.positions 'sincos'",
    )


def _check_number(c: "ModelConfig") -> None:
    """The layers are a prefix, periods, at least one, and a suffix."""
    for key in ("prefix", "suffix"):
        ffns = getattr(c, f"ffn_{key}")
        expected = len(getattr(c, key))
        require(
            len(ffns) == expected,
            f"ffn_{key}",
            ffns,
            f"as many as in {key}, {expected}",
        )
    others = len(c.prefix) + len(c.suffix)
    repeated = c.num_layers - others
    beside = f"{others} of prefix and suffix and " if others else ""
    require(
        repeated > 0 and repeated % c.period == 0,
        "num_layers",
        c.num_layers,
        f"{beside}a multiple of the period {c.period}",
    )


def _check_blocks(c: "ModelConfig") -> None:
    for block in c.blocks:
        has_mixer = not isinstance(block.mixer, NoMixerConfig)
        require(
            has_mixer or not isinstance(block.feed_forward, NoFeedForwardConfig),
            "ffns",
            f"none in layer {block.layers[0]}",
            "a feed-forward in a layer without a mixer",
        )
        if isinstance(block.feed_forward, VersatileMLPConfig):
            is_plain = block.norm == "pre" and c.residual_weight is None
            expected = "norm_placement 'pre' and no residual_weight: it has its norm itself"
            require(is_plain, "ffns", block.feed_forward.kind, expected)
        floors = block.decay_floors
        require(
            floors is None or floors == c.decay_floors,
            f"mixers.{c.mixer_name(block.layers[0])}.decay_floor",
            "by_depth",
            "as many heads and channels in all layers that have it",
        )
        if isinstance(block.mixer, RWKV6Config | RWKV7Config):
            channels = "head_dim" if isinstance(block.mixer, RWKV7Config) else "value_dim"
            require(
                block.mixer.width == c.width,
                f"mixers.{c.mixer_name(block.layers[0])}.num_heads",
                block.mixer.num_heads,
                f"num_heads x {channels} = width = {c.width}",
            )
        if isinstance(block.mixer, AssociativeMemoryConfig):
            require(
                block.mixer.width == c.width,
                f"mixers.{c.mixer_name(block.layers[0])}.width",
                block.mixer.width,
                f"the model's width {c.width}",
            )


def _check_attention(c: "ModelConfig") -> None:
    """What attention layers have in common with each other and with the model."""
    banks = set()
    for name, mixer in c.used_attention().items():
        divided = {
            "num_heads": mixer.num_heads if mixer.gate_input == "head" else 1,
            "num_kv_heads": mixer.kv_heads if mixer.selective_rope != "none" else 1,
        }
        for key, parts in divided.items():
            expected = f"a divisor of the width {c.width}"
            require(c.width % parts == 0, f"mixers.{name}.{key}", parts, expected)
        if mixer.value_bank:
            banks.add((mixer.value_bank, mixer.kv_heads, mixer.head_dim))
    expected = "one bank: the same value_bank, key heads and head_dim in all layers with one"
    require(len(banks) <= 1, "mixers", sorted(banks), expected)
    for blocks in (c.prefix_blocks, c.repeated_blocks, c.suffix_blocks):
        _check_shared_weights(c, blocks)
    check_sources(c.blocks, lambda b: f"mixers.{c.mixer_name(b.layers[0])}")


def _check_shared_weights(c: "ModelConfig", blocks: tuple["BlockConfig", ...]) -> None:
    """A layer that shares weights comes after one, in the same period, that has its own."""
    first = None
    for block in blocks:
        mixer = block.mixer
        # A converted layer has no weights to share.
        if mixer.kind != GatedAttentionConfig.kind:
            continue
        assert isinstance(mixer, GatedAttentionConfig)
        key = f"mixers.{c.mixer_name(block.layers[0])}"
        if not mixer.shares_weights:
            first = mixer
            continue
        require(
            first is not None,
            f"{key}.shares_weights",
            True,
            "a layer before it with weights of its own, in the same prefix, pattern or suffix",
        )
        assert first is not None
        expected = mixer.with_weights_of(first)
        for name, value in vars(expected).items():
            own = getattr(mixer, name)
            require(own == value, f"{key}.{name}", own, f"{value}, as the layer that it shares")


def _check_sparse(c: "ModelConfig") -> None:
    sparse = c.sparse_ffns()
    numbers_of_experts = {ffn.total_experts for ffn in sparse}
    has_residual = any(ffn.router.residual for ffn in sparse)
    require(
        not has_residual or len(numbers_of_experts) == 1,
        "ffns",
        "router.residual",
        "the same number of experts in all sparse feed-forwards",
    )
    require(
        len(c.first_passes()) <= 1,
        "ffns",
        "first_pass",
        "one mixture at most whose weights come from a first pass",
    )
    require(
        not c.first_passes() or not c.lora.num_experts,
        "lora.num_experts",
        c.lora.num_experts,
        "0 with a mixture in ffns whose weights come from a first pass too",
    )
    if c.shared_router.num_layers:
        _check_shared_router(c)


def _check_shared_router(c: "ModelConfig") -> None:
    given = {ffn.total_experts for ffn in c.given_ffns()}
    is_text = c.task == "lm" and c.first_pass is None
    fitting = {
        "sparse feed-forwards with router.selection 'given', of as many experts": len(given) == 1,
        "model.task 'lm' and no experts whose weights come from a first pass": is_text,
    }
    for expected, is_there in fitting.items():
        number = c.shared_router.num_layers
        require(is_there, "shared_router.num_layers", number, f"0, or {expected}")
