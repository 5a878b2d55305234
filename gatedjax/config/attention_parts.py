"""What options of attention exclude each other: doubly stochastic weights, prefix, block gate, keys
of another layer.
"""

from typing import TYPE_CHECKING

from gatedjax.errors import require

if TYPE_CHECKING:
    from gatedjax.config.attention import GatedAttentionConfig

# Normalizers whose columns sum to 1 too, over queries that come later.
DOUBLY_STOCHASTIC = ("sinkhorn", "qr")


def check_parts(c: "GatedAttentionConfig") -> None:
    """InputError where an option is set beside one that it has no meaning with."""
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


def check_shared_cache(c: "GatedAttentionConfig") -> None:
    """InputError where a layer without keys and values has an option that is of them."""
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
