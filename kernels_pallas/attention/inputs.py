"""What travels from `api.py` to a backend: the arrays of a call, and its static arguments."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kernels_pallas.attention.normalizers.base import Normalizer

# Queries, and keys, of a block of `block_mask`.
MASK_BLOCK = 64


class AttentionInputs(NamedTuple):
    """The arrays of one call of `attention`: T queries against S keys.

    S may differ from T where attention is not causal, and where `sharded.py` gives the xla backend
    a part of the queries.

    Attributes:
      q, k, v: queries, keys and values. Hk divides H: query head h uses the key and value head
        h // (H / Hk).
      gate_logits: logits of the sigmoid gate on the output; the last axis is V, or 1 for a
        head-wise gate.
      sink_logits: one logit a head that takes part in the softmax's denominator and has no value.
      alibi_slopes: one slope a head; logits lose slope * distance.
      segment_ids: the number of every query's document: `documents.py`. Tokens see their own
        document only.
      key_segment_ids: those of the keys, where they are not the queries'.
      block_mask: which blocks of MASK_BLOCK keys a block of as many queries may see.
      normalizer_parameters: a number a head for each of `Normalizer.parameters`; None for none.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B S Hk K"]
    v: Float[Array, "B S Hk V"]
    gate_logits: Float[Array, "B T H #V"] | None = None
    sink_logits: Float[Array, "H"] | None = None
    alibi_slopes: Float[Array, "H"] | None = None
    segment_ids: Int[Array, "B T"] | None = None
    key_segment_ids: Int[Array, "B S"] | None = None
    block_mask: Bool[Array, "B H _ _"] | None = None
    normalizer_parameters: Float[Array, "P H"] | None = None

    @property
    def segments_of_keys(self) -> Int[Array, "B S"] | None:
        """The documents of the keys; None without documents."""
        return self.segment_ids if self.key_segment_ids is None else self.key_segment_ids

    @property
    def sees_itself(self) -> bool:
        """Whether it is certain that every query sees a key: that of its own token."""
        same_tokens = self.q.shape[1] == self.k.shape[1]
        return same_tokens and self.key_segment_ids is None and self.block_mask is None


# y; with `return_lse` also the log-sum-exp of every row.
Outputs = Float[Array, "B T H V"] | tuple[Float[Array, "B T H V"], Float[Array, "B H T"]]


class AttentionOptions(NamedTuple):
    """The static arguments of `attention`, with every default filled in."""

    normalizer: Normalizer
    causal: bool
    window: int | None
    logits_soft_cap: float | None
    scale: float
    # Whether the log-sum-exp of every row is a result too.
    return_lse: bool = False

    def for_length(self, length: int, num_queries: int = 0) -> "AttentionOptions":
        """The options for `length` keys: some normalizers divide by their number."""
        # A length that the caller gave the normalizer stays. A window that reaches everywhere is
        # none, however large its number is.
        window = self.window
        if window is not None and window >= max(length, num_queries):
            window = None
        return self._replace(normalizer=self.normalizer.for_length(length), window=window)


class StepInputs(NamedTuple):
    """The arrays of one call of `attention_step`: one query a row, against a cache of S slots.

    Attributes:
      q, k_cache, v_cache, gate_logits, sink_logits, alibi_slopes: as in `AttentionInputs`.
      valid: whether a slot holds a key that the query may see.
      distances: how many tokens back each slot's key is; needed by ALiBi only.
      normalizer_parameters: as in `AttentionInputs`.
    """

    q: Float[Array, "B H K"]
    k_cache: Float[Array, "B S Hk K"]
    v_cache: Float[Array, "B S Hk V"]
    gate_logits: Float[Array, "B H #V"] | None
    sink_logits: Float[Array, "H"] | None
    alibi_slopes: Float[Array, "H"] | None
    valid: Bool[Array, "B S"]
    distances: Int[Array, "B S"] | None
    normalizer_parameters: Float[Array, "P H"] | None = None


class StepOptions(NamedTuple):
    """The static arguments of `attention_step`, with every default filled in."""

    normalizer: Normalizer
    logits_soft_cap: float | None
    scale: float


def statistics_dtype(*inputs: Array) -> jnp.dtype:
    """Float32, or float64 if an input is float64."""
    # Not `promote_types`, which refuses mixed inputs under strict promotion.
    any_float64 = any(x.dtype == jnp.float64 for x in inputs)
    return jnp.dtype(jnp.float64 if any_float64 else jnp.float32)
