"""The ops of mixers where the ambient mesh may cut the tokens of a row over devices.

Rows and heads are cut by the ops themselves (`kernels_pallas.common.mesh`). Tokens need the form of
an op that exchanges keys or states between devices.
"""

from collections.abc import Callable, Sequence

from jax import Array
from jaxtyping import Float

from gatedjax.per_shard import per_shard
from gatedjax.sharding import is_cut, mesh_axis
from kernels_pallas.attention import attention, attention_sharded
from kernels_pallas.delta_scan import (
    delta_product_scan,
    delta_scan,
    delta_scan_sharded,
    rwkv7_scan,
)
from kernels_pallas.linear_scan import linear_scan, linear_scan_sharded


def attention_on_mesh(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T Hk V"],
    gate_logits: Float[Array, "B T H _"] | None,
    segment_ids: Array | None,
    sink_logits: Float[Array, " H"] | None,
    alibi_slopes: Float[Array, " H"] | None,
    *,
    normalizer_parameters: Float[Array, "P H"] | None = None,
    **options,
) -> Float[Array, "B T H V"]:
    """`attention`; where the ambient mesh cuts the tokens, every device attends for its part of the
    queries.

    Args:
      q, k, v, gate_logits, segment_ids, sink_logits, alibi_slopes: as `kernels_pallas.attention`.
      normalizer_parameters: the same.
      options: its static arguments.

    Returns:
      The output of the attention, gated if there are gate logits.
    """
    arrays = (q, k, v, gate_logits, segment_ids, sink_logits, alibi_slopes, normalizer_parameters)
    # Rows and heads are cut by the op itself; only tokens need the form that exchanges them.
    cuts_tokens = is_cut("length", q.shape[1])
    if cuts_tokens and options.get("block_mask") is not None:
        got = "got one where a mesh cuts tokens"
        raise NotImplementedError(f"attention: block_mask: {got}, expected None")

    def attend(
        q,
        k,
        v,
        gate_logits,
        segment_ids,
        sink_logits,
        alibi_slopes,
        normalizer_parameters,
    ):
        inputs = {
            "gate_logits": gate_logits,
            "segment_ids": segment_ids,
            "sink_logits": sink_logits,
            "alibi_slopes": alibi_slopes,
            "normalizer_parameters": normalizer_parameters,
        }
        if cuts_tokens:
            return attention_sharded(
                q,
                k,
                v,
                axis_name=mesh_axis("length"),
                **inputs,
                **options,
            )
        return attention(
            q,
            k,
            v,
            **inputs,
            **options,
        )

    if not cuts_tokens:
        return attend(*arrays)
    tokens = ("batch", "length")
    queries = (*tokens, "heads", None)
    keys = (*tokens, "kv_heads", None)
    of_heads = ("heads",)
    in_axes = (queries, keys, keys, queries, tokens, of_heads, of_heads, (None, "heads"))
    return per_shard(attend, in_axes, queries)(*arrays)


def scan_on_mesh(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T Hv V"],
    log_decay: Float[Array, "..."] | None,
    segment_ids: Array | None,
    state: Float[Array, "B H K _"] | None,
    *,
    bonus: Float[Array, "H K"] | None = None,
    **options,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K _"] | None]:
    """`linear_scan`; on a mesh every device scans its own rows, heads and tokens.

    Args:
      q, k, v, log_decay, segment_ids, bonus: as `kernels_pallas.linear_scan`.
      state: before the first token; None for zeros.
      options: static arguments of the scan.

    Returns:
      The output, and the state after the last token if one was given.
    """
    # Along a mesh axis of tokens the states are sent on, not the tokens.
    cuts_tokens = is_cut("length", q.shape[1])

    def scan(
        q,
        k,
        v,
        log_decay,
        segment_ids,
        bonus,
        state=None,
    ):
        inputs = {
            "bonus": bonus,
            "initial_state": state,
            "return_final_state": state is not None,
            "segment_ids": segment_ids,
        }
        if cuts_tokens:
            # The states go on from device to device.
            axis = mesh_axis("length")
            return linear_scan_sharded(
                q,
                k,
                v,
                log_decay,
                axis_name=axis,
                **inputs,
                **options,
            )
        return linear_scan(
            q,
            k,
            v,
            log_decay,
            **inputs,
            **options,
        )

    tokens = ("batch", "length")
    heads = (*tokens, "heads", None)
    kv_heads = (*tokens, "kv_heads", None)
    # Keys may be of fewer heads than values (Mamba-2): those of all heads are cut as queries are.
    key_axes = heads if k.shape[2] == q.shape[2] else kv_heads
    value_axes = heads if v.shape[2] == q.shape[2] else kv_heads
    # By rank: none, [H], [B, T, H], [B, T, H, K].
    decay_axes = {
        0: (),
        1: ("heads",),
        3: (*tokens, "heads"),
        4: heads,
    }
    rank = 0 if log_decay is None else log_decay.ndim
    in_axes = (heads, key_axes, value_axes, decay_axes[rank], tokens, ("heads", None))
    arrays = (q, k, v, log_decay, segment_ids, bonus)
    return _with_state(scan, arrays, in_axes, state)


def delta_scan_on_mesh(
    q: Float[Array, "B T Hk K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"] | None,
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None,
    erase: Float[Array, "B T H K"] | None,
    write: Float[Array, "B T H V"] | None,
    segment_ids: Array | None,
    state: Float[Array, "B H K V"] | None,
    **options,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"] | None]:
    """`delta_scan`; on a mesh every device scans its own rows, heads and tokens.

    Args:
      q, k, v, beta, log_decay, erase, write, segment_ids: as `kernels_pallas.delta_scan`.
      state: before the first token; None for zeros.
      options: static arguments of the scan.

    Returns:
      The output, and the state after the last token if one was given.
    """
    # Along a mesh axis of tokens maps of states are sent on, not the tokens.
    cuts_tokens = is_cut("length", q.shape[1])

    def scan(
        q,
        k,
        v,
        beta,
        log_decay,
        erase,
        write,
        segment_ids,
        state=None,
    ):
        inputs = {
            "erase": erase,
            "write": write,
            "initial_state": state,
            "return_final_state": state is not None,
            "segment_ids": segment_ids,
        }
        arrays = (q, k, v, beta, log_decay)
        if cuts_tokens:
            axis = mesh_axis("length")
            return delta_scan_sharded(*arrays, axis_name=axis, **inputs, **options)
        return delta_scan(*arrays, **inputs, **options)

    tokens = ("batch", "length")
    of_heads = (*tokens, "heads")
    heads = (*of_heads, None)
    key_heads = (*tokens, "kv_heads", None)
    has_vector_decay = log_decay is not None and log_decay.ndim == 4
    in_axes = (
        key_heads,  # q
        key_heads,  # k
        heads,  # v
        of_heads,  # beta
        heads if has_vector_decay else of_heads,  # log_decay
        heads,  # erase
        heads,  # write
        tokens,  # segment_ids
    )
    arrays = (q, k, v, beta, log_decay, erase, write, segment_ids)
    return _with_state(scan, arrays, in_axes, state)


def delta_product_scan_on_mesh(
    q: Float[Array, "B T Hk K"],
    k: Float[Array, "B T n Hk K"],
    v: Float[Array, "B T n H V"],
    beta: Float[Array, "B T n H"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None,
    segment_ids: Array | None,
    state: Float[Array, "B H K V"] | None,
    **options,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"] | None]:
    """`delta_product_scan`; on a mesh every device scans its own rows, heads and tokens.

    Args:
      q, k, v, beta, log_decay, segment_ids: as `kernels_pallas.delta_scan.delta_product_scan`.
      state: before the first token; None for zeros.
      options: static arguments of the scan.

    Returns:
      The output, and the state after the last token if one was given.
    """
    axis_name = mesh_axis("length") if is_cut("length", q.shape[1]) else None

    def scan(
        q,
        k,
        v,
        beta,
        log_decay,
        segment_ids,
        state=None,
    ):
        return delta_product_scan(
            q,
            k,
            v,
            beta,
            log_decay,
            segment_ids=segment_ids,
            axis_name=axis_name,
            initial_state=state,
            return_final_state=state is not None,
            **options,
        )

    tokens = ("batch", "length")
    has_vector_decay = log_decay is not None and log_decay.ndim == 4
    in_axes = (
        (*tokens, "kv_heads", None),  # q
        (*tokens, None, "kv_heads", None),  # k
        (*tokens, None, "heads", None),  # v
        (*tokens, None, "heads"),  # beta
        (*tokens, "heads", None) if has_vector_decay else (*tokens, "heads"),  # log_decay
        tokens,  # segment_ids
    )
    arrays = (q, k, v, beta, log_decay, segment_ids)
    return _with_state(scan, arrays, in_axes, state)


def rwkv7_scan_on_mesh(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H K"],
    removal_key: Float[Array, "B T H K"],
    rate: Float[Array, "B T H K"],
    segment_ids: Array | None,
    state: Float[Array, "B H K V"] | None,
    **options,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"] | None]:
    """`rwkv7_scan`; on a mesh every device scans its own rows, heads and tokens.

    Args:
      q, k, v, log_decay, removal_key, rate, segment_ids: as `kernels_pallas.delta_scan.rwkv7_scan`.
      state: before the first token; None for zeros.
      options: static arguments of the scan.

    Returns:
      The output, and the state after the last token if one was given.
    """
    axis_name = mesh_axis("length") if is_cut("length", q.shape[1]) else None

    def scan(
        q,
        k,
        v,
        log_decay,
        removal_key,
        rate,
        segment_ids,
        state=None,
    ):
        return rwkv7_scan(
            q,
            k,
            v,
            log_decay,
            removal_key,
            rate,
            segment_ids=segment_ids,
            axis_name=axis_name,
            initial_state=state,
            return_final_state=state is not None,
            **options,
        )

    tokens = ("batch", "length")
    heads = (*tokens, "heads", None)
    in_axes = (heads, heads, heads, heads, heads, heads, tokens)
    arrays = (q, k, v, log_decay, removal_key, rate, segment_ids)
    return _with_state(scan, arrays, in_axes, state)


def _with_state(
    scan: Callable,
    arrays: Sequence[Array | None],
    in_axes: Sequence[tuple],
    state: Float[Array, "B H K _"] | None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K _"] | None]:
    """`scan` on every device's part; with a state before the first token also the one after."""
    heads = ("batch", "length", "heads", None)
    state_axes = ("batch", "heads", None, None)
    if state is None:
        return per_shard(scan, tuple(in_axes), heads)(*arrays), None
    return per_shard(scan, (*in_axes, state_axes), [heads, state_axes])(*arrays, state)
