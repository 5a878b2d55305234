"""What softmax attention does with its tokens: the op on rows of them, or on new ones and a cache.

As `scan_or_step` for mixers on a scan. `attention.py` makes queries, keys, values and gate.
"""

import dataclasses
from typing import Any, NamedTuple, NoReturn

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.config import GatedAttentionConfig
from gatedjax.layers.added_losses import sow_block_gate_loss, sow_reluformer_loss
from gatedjax.layers.base import Mixer
from gatedjax.layers.block_gate import chosen_blocks
from gatedjax.layers.doubly_stochastic import doubly_stochastic
from gatedjax.layers.gate_values import record
from gatedjax.layers.gaussian import distances_as_channels
from gatedjax.layers.kv_cache import (
    KVCache,
    append,
    append_values,
    cached_of,
    capacity,
    distances_of_slots,
    held_of,
    in_time_order,
    joined,
)
from gatedjax.layers.logit_scale import keys_seen, logit_scale
from gatedjax.layers.normalizer import learned_numbers, normalizer_of
from gatedjax.layers.on_mesh import attention_on_mesh
from gatedjax.layers.pieces import Row, require_room, row_of_piece, where_there_is_room
from gatedjax.layers.prefix import GatedPrefix
from gatedjax.layers.shared_weights import SharedWeights, ValueCache
from gatedjax.layers.sinks import token_sinks_as_channels
from gatedjax.layers.token_info import History, TokenInfo, history_of
from kernels_pallas.attention import attention_step


class LogitParts(NamedTuple):
    """What decides over a row's weights beside queries and keys.

    Attributes:
      sink_logits: of every head.
      slopes: ALiBi's, of every head.
      token_sinks: a sink logit of every token and head.
      log_gate: of the gate over blocks.
    """

    sink_logits: Float[Array, " H"] | None
    slopes: Float[Array, " H"] | None
    token_sinks: Float[Array, "B T H"] | None
    log_gate: Float[Array, "B H N N"] | None


class _Call(NamedTuple):
    """What the op is called with beside the arrays of tokens.

    Attributes:
      sink_logits, slopes: of every head.
      options: of the op, and of a step.
      masked: the option that only rows of tokens have.
    """

    sink_logits: Float[Array, " H"] | None
    slopes: Float[Array, " H"] | None
    options: dict[str, Any]
    masked: dict[str, Array]


def attention_or_step(
    module: Mixer,
    c: GatedAttentionConfig,
    row: Row,
    parts: LogitParts,
    info: TokenInfo,
    layer_cache: KVCache | ValueCache | None,
) -> tuple[Float[Array, "B T H D"], KVCache | ValueCache | None, SharedWeights]:
    """The op, on rows of tokens or on new tokens and the cache.

    Args:
      module: the layer, which has the parameters.
      c: its configuration.
      row: queries, keys, values and what the op knows of the gate.
      parts: of the logits.
      info: about the tokens.
      layer_cache: of the tokens before.

    Returns:
      The outputs of the heads; the cache with these tokens, if there was one; and what the
      weights are made from.

    Raises:
      ValueError: a cache of a layer whose tokens see later ones, or one without room.
    """
    if c.shares_cache:
        cache = held_of(info.keys)
    else:
        cache = joined(layer_cache, info.weights)
    if cache is not None and not c.causal:
        refuse_cache()
    weights = SharedWeights(row.q, row.k, v=row.v)
    if c.is_doubly_stochastic:
        return doubly_stochastic(c, row), None, weights
    row, call = _prepared(module, c, row, parts, info, is_cached=cache is not None)
    if cache is None:
        return _on_rows(module, c, row, call, call.options | call.masked), None, weights

    o, new_cache = _with_cache(module, c, row, call, info, cache)
    weights = dataclasses.replace(
        weights,
        held=cache.k,
        cached=new_cache.k,
        held_values=cache.v,
        cached_values=new_cache.v,
    )
    # What is another layer's is in the cache of that one.
    if c.shares_cache:
        return o, layer_cache, weights
    new = ValueCache(new_cache.v) if c.shares_weights else new_cache
    return o, new, weights


def refuse_cache() -> NoReturn:
    """A token that sees later ones cannot be computed before they are there."""
    raise ValueError("GatedAttention: cache: got one with causal=False, expected none")


def _prepared(
    module: Mixer,
    c: GatedAttentionConfig,
    row: Row,
    parts: LogitParts,
    info: TokenInfo,
    *,
    is_cached: bool,
) -> tuple[Row, _Call]:
    """Queries and keys with the channels that the op does not know of, and what else it takes.

    Without a cache also what is said of the weights beside the output: losses, and for probes.
    """
    options = {
        "normalizer": normalizer_of(c),
        "logits_soft_cap": c.logits_soft_cap,
        "scale": logit_scale(c),
        "normalizer_parameters": learned_numbers(module, c),
    }
    if not c.causal:
        options["causal"] = False
    if not is_cached:
        # What the probes measure the attention rows from, without the kernel ever storing them.
        record(module, "q", row.q)
        record(module, "k", row.k)
        record(module, "v", row.v)
    if c.similarity == "gaussian":
        q, k = distances_as_channels(row.q, row.k, logit_scale(c))
        row = row._replace(q=q, k=k)
    sink_logits = parts.sink_logits
    if parts.token_sinks is not None:
        q, k = token_sinks_as_channels(row.q, row.k, parts.token_sinks, logit_scale(c))
        row = row._replace(q=q, k=k)
        # All tokens' own sinks have become 0.
        sink_logits = jnp.zeros(c.num_heads, jnp.float32)
    if c.reluformer_loss and not is_cached:
        seen = keys_seen(info.positions, c.window)
        sow_reluformer_loss(module, c, row.q, row.k, row.segment_ids, seen, logit_scale(c))
    masked = {}
    log_gate = parts.log_gate
    if log_gate is not None:
        if not is_cached and c.block_gate_loss:
            sow_block_gate_loss(module, c, row.q, row.k, log_gate, row.segment_ids, logit_scale(c))
        block_mask = chosen_blocks(c, log_gate)
        if block_mask is not None:
            masked = {"block_mask": block_mask}
    return row, _Call(sink_logits, parts.slopes, options, masked)


def _on_rows(
    module: Mixer,
    c: GatedAttentionConfig,
    row: Row,
    call: _Call,
    options: dict[str, Any],
) -> Float[Array, "B T H D"]:
    """The op on rows of tokens, with the prefix where there is one."""
    if not c.prefix:
        return attention_on_mesh(*row, call.sink_logits, call.slopes, window=c.window, **options)
    return _prefix(module, c)(
        row.q,
        row.k,
        row.v,
        segment_ids=row.segment_ids,
        sink_logits=call.sink_logits,
        window=c.window,
        causal=c.causal,
        scale=options["scale"],
    )


def _with_cache(
    module: Mixer,
    c: GatedAttentionConfig,
    row: Row,
    call: _Call,
    info: TokenInfo,
    cache: KVCache,
) -> tuple[Float[Array, "B T H D"], KVCache]:
    """The outputs of new tokens, and the cache with them."""
    before = history_of(info)
    length = row.q.shape[1]
    most = capacity(c, cache)
    require_room(most, length, info.segment_ids)
    if c.shares_cache:
        new_cache = cached_of(info.keys)
    elif c.shares_weights:
        new_cache = append_values(cache, row.v, before, info.segment_ids, info.weights)
    else:
        new_cache = append(cache, row.k, row.v, before, info.segment_ids)
    if length == 1:
        o = _step(module, c, row, call, info, before, new_cache)
    elif before.is_empty:
        o = _on_rows(module, c, row, call, call.options | call.masked)
    else:
        # A further piece of a prompt, as the end of a row whose beginning the cache holds.
        whole = row_of_piece(row, *in_time_order(cache, before))
        o = _on_rows(module, c, whole, call, call.options)[:, -length:]
    return where_there_is_room(o, most, before, info.segment_ids), new_cache


def _step(
    module: Mixer,
    c: GatedAttentionConfig,
    row: Row,
    call: _Call,
    info: TokenInfo,
    before: History,
    cache: KVCache,
) -> Float[Array, "B 1 H D"]:
    """The output of one token, which is in the cache already.

    The cache may be a ring, whose slots are in any order: what is visible is said slot by slot.
    """
    distances, valid = distances_of_slots(cache.k.shape[1], before, info.segment_ids)
    if c.prefix:
        # A step returns no log-sum-exp; the slots of the cache are keys like others.
        return _prefix(module, c)(
            row.q,
            cache.k,
            cache.v,
            causal=False,
            segment_ids=(jnp.ones_like(valid[:, :1], jnp.int32), valid.astype(jnp.int32)),
            sink_logits=call.sink_logits,
            scale=call.options["scale"],
        )
    gate_logits = row.gate_logits
    o = attention_step(
        row.q[:, 0],
        cache.k,
        cache.v,
        valid=valid,
        gate_logits=None if gate_logits is None else gate_logits[:, 0],
        sink_logits=call.sink_logits,
        alibi_slopes=call.slopes,
        distances=None if call.slopes is None else distances,
        **call.options,
    )
    return o[:, None]


def _prefix(module: Mixer, c: GatedAttentionConfig) -> GatedPrefix:
    """Learned keys and values, with their parameters: a module of the layer's."""
    return GatedPrefix(c.prefix, module.init_std, name="prefix")
