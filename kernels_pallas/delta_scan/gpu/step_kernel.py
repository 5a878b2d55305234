"""The Triton kernel of one decoding step.

Imports triton, which only a machine that decodes on a GPU has to have.

    S' = D S + k^T (u - e D S);   o = scale q S'        D = diag(exp(g))

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
    beta,
    log_decay,
    erase,
    write,
    o,
    scale: tl.constexpr,
    H: tl.constexpr,
    QUERY_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DECAY: tl.constexpr,
    BETA: tl.constexpr,
    ERASE: tl.constexpr,
    WRITE: tl.constexpr,
    L2_NORM: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """Updates a state and reads it.

    Args:
      state: [B, H, K, V] float32, updated.
      q, k: of H // QUERY_GROUP and H // KEY_GROUP heads.
      beta, log_decay, erase, write: unused where BETA, DECAY, ERASE and WRITE say so.
      o: [B, H, V], written.
    """
    # The row of [B, H]; 64 bits, since state's offsets pass 2**31.
    row = tl.program_id(0).to(tl.int64)
    batch = row // H
    head = row % H
    query = batch * (H // QUERY_GROUP) + head // QUERY_GROUP
    key = batch * (H // KEY_GROUP) + head // KEY_GROUP
    at_k = tl.arange(0, BLOCK_K)
    at_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k = at_k < K
    in_v = at_v < V
    inside = in_k[:, None] & in_v[None, :]
    here = state + row * K * V + at_k[:, None] * V + at_v[None, :]
    old = tl.load(here, mask=inside, other=0.0)
    q_row = tl.load(q + query * K + at_k, mask=in_k, other=0.0).to(tl.float32)
    k_row = tl.load(k + key * K + at_k, mask=in_k, other=0.0).to(tl.float32)
    v_row = tl.load(v + row * V + at_v, mask=in_v, other=0.0).to(tl.float32)
    if L2_NORM:
        q_row = q_row * tl.rsqrt(tl.sum(q_row * q_row, axis=0) + EPSILON)
        k_row = k_row * tl.rsqrt(tl.sum(k_row * k_row, axis=0) + EPSILON)
    erase_row = k_row
    strength = 1.0
    if BETA:
        strength = tl.load(beta + row).to(tl.float32)
        erase_row = k_row * strength
    if ERASE:
        erase_row = tl.load(erase + row * K + at_k, mask=in_k, other=0.0).to(tl.float32)
    if WRITE:
        written = v_row * tl.load(write + row * V + at_v, mask=in_v, other=0.0).to(tl.float32)
    else:
        written = v_row * strength
    # Erase keys find the state after the token's own decay.
    new = old
    if DECAY == "scalar":
        new = old * tl.exp(tl.load(log_decay + row).to(tl.float32))
    if DECAY == "vector":
        logs = tl.load(log_decay + row * K + at_k, mask=in_k, other=0.0).to(tl.float32)
        new = old * tl.exp(logs)[:, None]
    change = written - tl.sum(erase_row[:, None] * new, axis=0)
    new += k_row[:, None] * change[None, :]
    read = tl.sum((q_row * scale)[:, None] * new, axis=0)
    tl.store(here, new, mask=inside)
    tl.store(o + row * V + at_v, read.to(o.dtype.element_ty), mask=in_v)
