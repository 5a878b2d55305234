"""The Triton kernel of one decoding step.

Imports triton, which only a machine that decodes on a GPU has to have.

    S' = diag(exp(g)) S + k^T v;   o = scale q S', or exclusive scale (q S + (q bonus k) v)

The grid is (row of the batch and head, block of V). A program has a block of V of one state, read
once and written once, in place; everything else is small beside it. Masks cut K and V, which need
not be powers of two.
"""

import triton
import triton.language as tl


@triton.jit
def step_kernel(
    state,
    q,
    k,
    v,
    log_decay,
    bonus,
    o,
    scale: tl.constexpr,
    H: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DECAY: tl.constexpr,
    DECAY_ROWS: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    BONUS: tl.constexpr,
):
    """Updates a state and reads it.

    Args:
      state: [B, H, K, V] float32, updated.
      q: [B, H, K]; k and v of H // KEY_GROUP and H // VALUE_GROUP heads.
      log_decay: unused, [DECAY_ROWS, H] or [DECAY_ROWS, H, K] as DECAY says; DECAY_ROWS is 1 or B.
      o: [B, H, V], written.
    """
    # The row of [B, H]; 64 bits, since state's offsets pass 2**31.
    row = tl.program_id(0).to(tl.int64)
    batch = row // H
    head = row % H
    key = batch * (H // KEY_GROUP) + head // KEY_GROUP
    value = batch * (H // VALUE_GROUP) + head // VALUE_GROUP
    decay_row = head if DECAY_ROWS == 1 else row
    at_k = tl.arange(0, BLOCK_K)
    at_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k = at_k < K
    in_v = at_v < V
    inside = in_k[:, None] & in_v[None, :]
    here = state + row * K * V + at_k[:, None] * V + at_v[None, :]
    old = tl.load(here, mask=inside, other=0.0)
    q_row = tl.load(q + row * K + at_k, mask=in_k, other=0.0).to(tl.float32) * scale
    k_row = tl.load(k + key * K + at_k, mask=in_k, other=0.0).to(tl.float32)
    v_row = tl.load(v + value * V + at_v, mask=in_v, other=0.0).to(tl.float32)
    # Decay before the write: the new token is not decayed by its own step.
    new = old
    if DECAY == "scalar":
        new = old * tl.exp(tl.load(log_decay + decay_row).to(tl.float32))
    if DECAY == "vector":
        logs = tl.load(log_decay + decay_row * K + at_k, mask=in_k, other=0.0).to(tl.float32)
        new = old * tl.exp(logs)[:, None]
    new += k_row[:, None] * v_row[None, :]
    read = tl.sum(q_row[:, None] * (new if INCLUSIVE else old), axis=0)
    if BONUS:
        # The token's own write, weighed by the bonus, without a second state.
        weight = tl.load(bonus + head * K + at_k, mask=in_k, other=0.0).to(tl.float32)
        read += tl.sum(q_row * weight * k_row, axis=0) * v_row
    tl.store(here, new, mask=inside)
    tl.store(o + row * V + at_v, read.to(o.dtype.element_ty), mask=in_v)
