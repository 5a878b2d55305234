"""Which options of gated softmax attention exclude each other, and which need each other."""

from typing import TYPE_CHECKING

from gatedjax.config.checks import divides
from gatedjax.config.rope import check_rope
from gatedjax.errors import require

if TYPE_CHECKING:
    from gatedjax.config.attention import GatedAttentionConfig

# Normalizers whose columns sum to 1 too, over queries that come later.
DOUBLY_STOCHASTIC = ("sinkhorn", "qr")

# Normalizers whose formula contains the length of a row.
_WITH_LENGTH = ("sigmoid", "relu", "relu_squared", "clipped_softmax")


def check_options(c: "GatedAttentionConfig") -> None:
    """InputError where an option is set beside one that it has no meaning with."""
    divides("num_kv_heads", c.kv_heads, c.num_heads)
    _check_parts(c)
    require(
        c.causal or c.query_scale == "none",
        "query_scale",
        c.query_scale,
        "none with causal = false: it counts the keys that a causal token sees",
    )
    check_rope(c.rotary_dim, c.rope_fraction, c.selective_rope)
    _check_grid(c)
    _check_extension(c)
    _check_gate(c)
    _check_normalizer(c)
    _check_token_sinks(c)
    _check_logits(c)
    _check_shared_weights(c)
    if c.shares_cache:
        _check_shared_cache(c)


def _check_parts(c: "GatedAttentionConfig") -> None:
    """Doubly stochastic weights, the prefix and the block gate."""
    if c.normalizer in DOUBLY_STOCHASTIC:
        _check_doubly_stochastic(c)
    if c.prefix:
        _check_plain(c, "prefix", c.prefix)
        require(c.alibi == "none", "alibi", c.alibi, "none with a prefix: it has no distance")
    if c.block_gate:
        _check_block_gate(c)
    for name in ("block_gate_top", "block_gate_threshold"):
        value = getattr(c, name)
        require(c.block_gate > 0 or not value, name, value, "0 without a block_gate")


def _check_doubly_stochastic(c: "GatedAttentionConfig") -> None:
    expected = f"softmax or the like with causal = {c.causal}: its columns sum over later queries"
    require(not c.causal, "normalizer", c.normalizer, expected)
    excluded = {
        "window": c.window is not None,
        "alibi": c.alibi != "none",
        "logits_soft_cap": c.logits_soft_cap is not None,
    }
    for name, is_set in excluded.items():
        expected = f"none with normalizer {c.normalizer!r}"
        require(not is_set, name, getattr(c, name), expected)


def _check_block_gate(c: "GatedAttentionConfig") -> None:
    _check_plain(c, "block_gate", c.block_gate)
    require(c.block_gate % 2 == 0, "block_gate", c.block_gate, "an even number: pairs rotate")
    require(not c.prefix, "prefix", c.prefix, "0 with a block_gate")
    for name, is_set in {"window": c.window is not None, "alibi": c.alibi != "none"}.items():
        expected = "none with a block_gate: the map that it learns has no distances"
        require(not is_set, name, getattr(c, name), expected)
    is_one = c.block_gate_top == 0 or c.block_gate_threshold == 0
    expected = "0 with block_gate_top"
    require(is_one, "block_gate_threshold", c.block_gate_threshold, expected)


def _check_plain(c: "GatedAttentionConfig", name: str, value: int) -> None:
    """Softmax of products, which two parts of a row can share."""
    is_plain = (
        c.normalizer == "softmax"
        and c.similarity == "product"
        and c.logits_soft_cap is None
        and not c.token_sinks
        and not c.shares_weights
    )
    expected = (
        "0 unless the normalizer is softmax of plain products: no soft cap, no token_sinks, no "
        "weights of another layer"
    )
    require(is_plain, name, value, expected)


def _check_grid(c: "GatedAttentionConfig") -> None:
    is_extended = c.yarn_factor > 1 or c.llama3_factor > 1
    fits = c.rotary_dim > 0 and c.rotary_dim % 4 == 0
    require(
        not c.rope_grid or (fits and not is_extended and c.selective_rope == "none"),
        "rope_grid",
        c.rope_grid,
        "false unless a multiple of 4 channels rotate, as they are and for no longer context",
    )


def _check_extension(c: "GatedAttentionConfig") -> None:
    require(
        c.llama3_low < c.llama3_high,
        "llama3_low",
        c.llama3_low,
        f"less than llama3_high = {c.llama3_high}",
    )
    require(
        c.yarn_factor == 1 or c.llama3_factor == 1,
        "llama3_factor",
        c.llama3_factor,
        f"1 with yarn_factor = {c.yarn_factor}",
    )


def _check_gate(c: "GatedAttentionConfig") -> None:
    if c.gate_position == "output":
        is_whole = c.gate_granularity == "elementwise" and not c.gate_shared
        require(
            is_whole,
            "gate_position",
            "output",
            "an elementwise gate, not shared: the output has no heads",
        )
    if c.fused_gate:
        is_of_tokens = c.gate_position == "sdpa" and c.gate_input == "token"
        require(
            is_of_tokens and not c.gate_shared,
            "fused_gate",
            True,
            "false: only a gate of tokens after sdpa that is not shared comes with the queries",
        )

    _check_gate_of_heads(c)


def _check_gate_of_heads(c: "GatedAttentionConfig") -> None:
    """Gates of arXiv 2306.12929."""
    is_plain = (
        c.gate_position == "sdpa"
        and c.gate_granularity == "headwise"
        and c.gate_input != "constant"
        and c.gate_activation == "sigmoid"
        and c.gate_mode == "multiplicative"
        and not c.gate_shared
        and not c.fused_gate
    )
    has_option = {
        "gate_input": c.gate_input == "head",
        "gate_start": c.gate_start is not None,
    }
    for name, is_set in has_option.items():
        require(
            is_plain or not is_set,
            name,
            getattr(c, name),
            "a head-wise sigmoid after sdpa that multiplies, of a token, not shared, not fused",
        )
    require(
        c.gate_hidden is None or c.gate_input == "head",
        "gate_hidden",
        c.gate_hidden,
        f"none with gate_input {c.gate_input!r}",
    )
    require(
        c.gate_start is not None or not c.gate_fine_tuning,
        "gate_start",
        c.gate_start,
        "a number with gate_fine_tuning",
    )


def _check_normalizer(c: "GatedAttentionConfig") -> None:
    needs_length = {
        f"normalizer {c.normalizer!r}": c.normalizer in _WITH_LENGTH,
        "query_scale 'scalable_softmax'": c.query_scale == "scalable_softmax",
        "logit_scale 'learned'": c.logit_scale == "learned",
    }
    for option, is_needed in needs_length.items():
        require(
            c.normalizer_length is not None or not is_needed,
            "normalizer_length",
            c.normalizer_length,
            f"a length for {option}",
        )
    _check_reluformer(c)
    for name in ("sinks", "token_sinks"):
        value = getattr(c, name)
        require(
            c.normalizer == "softmax" or not value,
            name,
            value,
            f"false with normalizer {c.normalizer!r}",
        )


def _check_reluformer(c: "GatedAttentionConfig") -> None:
    is_reluformer = c.normalizer == "reluformer"
    require(
        is_reluformer or c.reluformer_loss == 0,
        "reluformer_loss",
        c.reluformer_loss,
        f"0 with normalizer {c.normalizer!r}",
    )
    require(
        c.causal or c.reluformer_loss == 0,
        "reluformer_loss",
        c.reluformer_loss,
        "0 with causal = false: it counts the keys that causal tokens see",
    )
    # Gamma is put on the queries: what is added to logits afterwards would not be divided.
    excluded = {
        "logits_soft_cap": c.logits_soft_cap is not None,
        "alibi": c.alibi != "none",
        "similarity": c.similarity != "product",
    }
    for name, is_set in excluded.items():
        require(
            not (is_reluformer and is_set),
            name,
            getattr(c, name),
            "none of its kind with normalizer 'reluformer'",
        )


def _check_token_sinks(c: "GatedAttentionConfig") -> None:
    excluded = {
        "sinks": c.sinks,
        "logits_soft_cap": c.logits_soft_cap is not None,
        "logit_scale 'log_dim' of one channel": c.logit_scale == "log_dim" and c.head_dim == 1,
    }
    for option, is_set in excluded.items():
        require(
            not (c.token_sinks and is_set),
            "token_sinks",
            c.token_sinks,
            f"false with {option}",
        )


def _check_logits(c: "GatedAttentionConfig") -> None:
    # Logits of unit vectors are cosines: without a scale of their own they are too small.
    is_unit = c.qk_norm and c.qk_norm_kind == "l2"
    has_own_scale = c.logit_scale != "inverse_sqrt"
    require(
        is_unit == has_own_scale,
        "logit_scale",
        c.logit_scale,
        "inverse_sqrt unless qk_norm is true of kind 'l2'; learned or log_dim if so",
    )
    require(
        c.attention_scale is None or not has_own_scale,
        "attention_scale",
        c.attention_scale,
        f"none with logit_scale {c.logit_scale!r}",
    )
    require(
        c.alibi != "balanced" or c.num_heads % 2 == 0,
        "alibi",
        c.alibi,
        f"an even number of heads, not {c.num_heads}",
    )


def _check_shared_weights(c: "GatedAttentionConfig") -> None:
    """What belongs to the weights is the other layer's."""
    has_own = {
        "gate_position": c.gate_position in ("query", "key"),
        "fused_gate": c.fused_gate,
        "sinks": c.sinks,
        "token_sinks": c.token_sinks,
        "query_scale": c.query_scale == "selective",
        "alibi": c.alibi == "learned",
        "normalizer": c.normalizer == "learned_entmax",
    }
    for name, is_own in has_own.items():
        require(
            not (c.shares_weights and is_own),
            name,
            getattr(c, name),
            "another value with shares_weights: these weights have parameters of their own",
        )


def _check_shared_cache(c: "GatedAttentionConfig") -> None:
    """A layer without keys and values has no option that is of them."""
    of_keys = {
        "gate_position": c.gate_position in ("key", "value"),
        "query_scale": c.query_scale == "selective",
        "causal": not c.causal,
        "selective_rope": c.selective_rope != "none",
        "similarity": c.similarity != "product",
        "value_skip": c.value_skip,
        "token_sinks": c.token_sinks,
        "value_bank": c.value_bank > 0,
        "shares_weights": c.shares_weights,
        "prefix": c.prefix > 0,
        "block_gate": c.block_gate > 0,
    }
    for name, is_set in of_keys.items():
        expected = "another value with shares_cache: the keys and values are another layer's"
        require(not is_set, name, getattr(c, name), expected)
