"""SeerAttention's gate over blocks (arXiv 2410.13276): which keys a block of queries needs.

    q_i = W_q avg(queries of block i)                  before the rotation of the tokens
    k_j = W_k [max, min, avg](keys of block j)
    g_ij = softmax_j(rope(q_i) rope(k_j) / sqrt(D))    rotated by the position of the block

The gate learns the largest weight in every pair of blocks of a trained model's attention, each row
divided by its sum (`block_attention_map`), by the divergence of the two (`block_gate_loss`);
nothing else trains. Then blocks are chosen (`blocks_above`, `top_blocks`), and the choice is the
`block_mask` of `attention`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from gatedjax.config import GatedAttentionConfig
from gatedjax.layers.parameters import parameter
from gatedjax.layers.rope import apply_rope, inverse_frequencies
from kernels_pallas.attention.inputs import MASK_BLOCK


def _blocks(x: Float[Array, "B T H D"], fill: float) -> Float[Array, "B N block H D"]:
    """Tokens by block, the last one filled up."""
    B, T, H, D = x.shape
    padding = -T % MASK_BLOCK
    x = jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0)), constant_values=fill)
    return x.reshape(B, -1, MASK_BLOCK, H, D)


def block_mean(x: Float[Array, "B T H D"]) -> Float[Array, "B N H D"]:
    """The mean of every block's tokens, in float32."""
    T = x.shape[1]
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    total = jnp.sum(_blocks(x, 0.0), axis=2)
    # The last block may have fewer.
    starts = jnp.arange(total.shape[1]) * MASK_BLOCK
    count = jnp.minimum(T - starts, MASK_BLOCK).astype(x.dtype)
    return total / count[:, None, None]


def block_max(x: Float[Array, "B T H D"]) -> Float[Array, "B N H D"]:
    """The maximum of every block's tokens, channel by channel, in float32."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.max(_blocks(x, -jnp.inf), axis=2)


def _causal(num_blocks: int) -> Bool[Array, "N N"]:
    return jnp.tril(jnp.ones((num_blocks, num_blocks), bool))


class BlockGate(nn.Module):
    """The gate's log-probabilities, [B, H, N, N] for N blocks of tokens.

    Attributes:
      dim: channels of a block's query and key.
      rope_base: of the rotation by the positions of blocks (of their first tokens).
      causal: a block of queries chooses among blocks up to its own.
    """

    dim: int = 128
    rope_base: float = 10_000.0
    causal: bool = True

    @nn.compact
    def __call__(
        self,
        q: Float[Array, "B T H K"],
        k: Float[Array, "B T Hk K"],
    ) -> Float[Array, "B H N N"]:
        """Log-probabilities, -inf for blocks that come later.

        Args:
          q, k: queries and keys before they are rotated. No gradient flows into them.
        """
        q, k = jax.lax.stop_gradient((q, k))
        K = q.shape[3]
        init = nn.initializers.xavier_uniform(in_axis=1, out_axis=2, batch_axis=0)
        # A matrix for every head; the key heads of a group share theirs.
        of_queries = parameter(
            self, "query", ["heads", "head_dim", None], [q.shape[2], K, self.dim], init
        )
        of_keys = parameter(
            self, "key", ["kv_heads", "head_dim", None], [k.shape[2], 3 * K, self.dim], init
        )
        pooled = jnp.concatenate([block_max(k), -block_max(-k), block_mean(k)], axis=-1)
        queries = jnp.einsum("bnhk,hkd->bnhd", block_mean(q), of_queries)
        keys = jnp.einsum("bnhk,hkd->bnhd", pooled, of_keys)
        B, N, H, _ = queries.shape
        positions = jnp.broadcast_to(jnp.arange(N) * MASK_BLOCK, (B, N))
        frequencies = inverse_frequencies(self.dim, self.rope_base)
        queries = apply_rope(queries, positions, frequencies)
        keys = jnp.repeat(apply_rope(keys, positions, frequencies), H // k.shape[2], axis=2)
        logits = jnp.einsum("bihd,bjhd->bhij", queries, keys) * self.dim**-0.5
        if self.causal:
            logits = jnp.where(_causal(N), logits, -jnp.inf)
        return jax.nn.log_softmax(logits, axis=-1)


def block_attention_map(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T Hk K"],
    *,
    causal: bool = True,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B H N N"]:
    """The largest attention weight in every pair of blocks, rows divided by their sum.

    Computed a block of queries at a time: memory is linear in T, but for the map itself.

    Args:
      q, k: queries and keys as the attention has them: rotated.
      causal: whether the attention is.
      scale: of its logits; K^-0.5 if None.
      segment_ids: documents, whose tokens see their own only; None for one.

    Returns:
      The target of the gate, float32; 0 for blocks that come later.
    """
    q, k = jax.lax.stop_gradient((q, k))
    B, T, H, K = q.shape
    Hk = k.shape[2]
    scale = K**-0.5 if scale is None else scale
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    # [N, B, block, Hk, G, K]
    blocks = jnp.moveaxis(_blocks(q.astype(dtype), 0.0), 1, 0)
    blocks = blocks.reshape(*blocks.shape[:3], Hk, H // Hk, K)
    N = blocks.shape[0]
    keys = k.astype(dtype)
    positions = jnp.arange(N * MASK_BLOCK)
    documents = jnp.zeros((B, T), jnp.int32) if segment_ids is None else segment_ids
    documents = jnp.pad(documents, ((0, 0), (0, N * MASK_BLOCK - T)))

    def of_block(part: tuple[Array, Array]) -> Float[Array, "B H N"]:
        rows, number = part
        s = scale * jnp.einsum("bthgk,bshk->bhgts", rows, keys)
        s = jnp.pad(s, ((0, 0),) * 4 + ((0, N * MASK_BLOCK - T),))
        queries = number * MASK_BLOCK + jnp.arange(MASK_BLOCK)
        of_queries = jnp.take(documents, queries, axis=1)
        seen = (of_queries[:, :, None] == documents[:, None, :]) & (positions < T)
        if causal:
            seen = seen & (positions <= queries[:, None])
        # Rows of padding see themselves: no row is empty.
        seen = seen | (positions == queries[:, None])
        s = jnp.where(seen[:, None, None], s, -jnp.inf)
        weights = jax.nn.softmax(s, axis=-1)
        # Queries of padding have none.
        weights = jnp.where((queries < T)[:, None], weights, 0)
        by_block = weights.reshape(B, H, MASK_BLOCK, N, MASK_BLOCK)
        return jnp.max(by_block, axis=(2, 4))

    largest = jax.lax.map(of_block, (blocks, jnp.arange(N)))
    largest = jnp.moveaxis(largest, 0, 2)
    return largest / jnp.sum(largest, axis=-1, keepdims=True)


def block_gate_loss(
    log_gate: Float[Array, "B H N N"],
    target: Float[Array, "B H N N"],
    is_row: Bool[Array, "B N"] | None = None,
) -> Float[Array, ""]:
    """KL(target || gate), the mean over rows of blocks. The paper multiplies it by 10.

    Args:
      log_gate: of `BlockGate`.
      target: of `block_attention_map`.
      is_row: which blocks of queries count; None for all.
    """
    # Where the target is 0 its log, and the gate's, may be -inf.
    is_seen = target > 0
    log_ratio = jnp.where(
        is_seen,
        jnp.log(jnp.where(is_seen, target, 1)) - jnp.where(is_seen, log_gate, 0),
        0,
    )
    of_row = jnp.sum(target * log_ratio, axis=-1)
    if is_row is None:
        return jnp.mean(of_row)
    counted = jnp.where(is_row[:, None], of_row, 0)
    return jnp.sum(counted) / jnp.maximum(jnp.sum(is_row) * of_row.shape[1], 1)


def has_tokens(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B N"]:
    """Which blocks hold a token that is not padding."""
    tokens = (segment_ids != 0)[:, :, None, None]
    return jnp.any(_blocks(tokens, False), axis=(2, 3, 4))


def chosen_blocks(
    c: GatedAttentionConfig,
    log_gate: Float[Array, "B H N N"],
) -> Bool[Array, "B H N N"] | None:
    """The `block_mask` that a layer's configuration asks for; None for all blocks."""
    if c.block_gate_top:
        return top_blocks(log_gate, c.block_gate_top)
    if c.block_gate_threshold:
        return blocks_above(log_gate, c.block_gate_threshold)
    return None


def blocks_above(
    log_gate: Float[Array, "B H N N"],
    threshold: float,
) -> Bool[Array, "B H N N"]:
    """The `block_mask` of probabilities from `threshold` on (the paper: 5e-3), and the diagonal."""
    return (log_gate >= jnp.log(threshold)) | jnp.eye(log_gate.shape[-1], dtype=bool)


def top_blocks(log_gate: Float[Array, "B H N N"], number: int) -> Bool[Array, "B H N N"]:
    """The `block_mask` of the `number` most probable blocks of every row, its own among them."""
    N = log_gate.shape[-1]
    own = jnp.eye(N, dtype=bool)
    # The own block comes first.
    ranked = jnp.where(own, jnp.inf, log_gate)
    least = jax.lax.top_k(ranked, min(number, N))[0][..., -1:]
    return (ranked >= least) & (ranked > -jnp.inf)
