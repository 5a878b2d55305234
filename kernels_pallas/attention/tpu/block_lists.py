"""Which blocks of keys every block of queries goes through, under a block mask on TPU."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int

from kernels_pallas.attention.inputs import MASK_BLOCK
from kernels_pallas.attention.tpu.plan import Plan
from kernels_pallas.common.padding import padded, round_up

# Blocks of keys that are one matrix. More hide the latency of a product, fewer waste less where a
# list ends.
CHUNK = 8
# Blocks of queries that are computed side by side: while the weights of one are computed, the
# matrix unit has the logits of the others.
GROUP = 4
# Queries of a program at most.
MAX_ROWS = 512
# Words of SMEM that a list is rounded up to.
LIST_WORDS = 1024


def num_programs(plan: Plan) -> int:
    """Programs of queries."""
    return -(-plan.T // plan.forward.block)


def list_stride(plan: Plan) -> int:
    """Words of a block of queries: one for every block of keys, in whole chunks."""
    return round_up(-(-plan.S // MASK_BLOCK), CHUNK)


def list_words(plan: Plan) -> int:
    """Words of a program."""
    blocks = plan.forward.block // MASK_BLOCK
    return round_up(blocks * list_stride(plan), LIST_WORDS)


class Lists(NamedTuple):
    """For every block of queries: how many blocks of keys are on, and which these are.

    Of all programs, one after another: of row b, head h, then of the queries.
    """

    counts: Int[Array, "N"]
    blocks: Int[Array, "M"]


def lists_of(plan: Plan, mask: Bool[Array, "B H Tb Sb"]) -> Lists:
    """The lists of a mask, less what causality or a window hides as a whole."""
    B, H, Tb, Sb = mask.shape
    first_query = np.arange(Tb)[:, None] * MASK_BLOCK
    first_key = np.arange(Sb)[None, :] * MASK_BLOCK
    # The least and the largest distance query - key in a pair of blocks.
    nearest = first_query - (first_key + MASK_BLOCK - 1)
    farthest = first_query + MASK_BLOCK - 1 - first_key
    visible = np.full((Tb, Sb), True)
    if plan.causal:
        visible &= farthest >= 0
    if plan.window is not None:
        visible &= (nearest < plan.window) & (farthest > -plan.window)
    on = mask & visible
    # Blocks of queries that are padding have nothing on.
    num_blocks = num_programs(plan) * plan.forward.block // MASK_BLOCK
    counts = padded(jnp.sum(on, axis=-1, dtype=jnp.int32), 2, num_blocks)
    # What is on comes first, in order. What follows is not used.
    order = jnp.argsort(jnp.logical_not(on), axis=-1, stable=True).astype(jnp.int32)
    order = padded(padded(order, 3, list_stride(plan)), 2, num_blocks)
    of_programs = order.reshape(B * H * num_programs(plan), -1)
    blocks = padded(of_programs, 1, list_words(plan))
    return Lists(counts.reshape(-1), blocks.reshape(-1))
