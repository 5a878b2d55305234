"""What travels from `api.py` to a backend: the arrays of a call, and its static arguments."""

from typing import NamedTuple

from jax import Array
from jaxtyping import Bool, Float, Int

from kernels_pallas.attention.normalizers.base import Normalizer


class AttentionInputs(NamedTuple):
    """The arrays of one call of `attention`: T queries against S keys.

    S is T, except where `sharded.py` gives the xla backend a part of the queries.

    Attributes:
      q, k, v: queries, keys and values. Hk divides H: query head h uses the key and value head
        h // (H / Hk).
      gate_logits: logits of the sigmoid gate on the output; the last axis is V, or 1 for a
        head-wise gate.
      sink_logits: one logit a head that takes part in the softmax's denominator and has no value.
      alibi_slopes: one slope a head; logits lose slope * distance.
      segment_ids: the number of every query's document: `documents.py`. Tokens see their own
        document only.
      normalizer_parameters: a number a head for each of `Normalizer.parameters`; None for none.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B S Hk K"]
    v: Float[Array, "B S Hk V"]
    gate_logits: Float[Array, "B T H #V"] | None = None
    sink_logits: Float[Array, "H"] | None = None
    alibi_slopes: Float[Array, "H"] | None = None
    segment_ids: Int[Array, "B T"] | None = None
    normalizer_parameters: Float[Array, "P H"] | None = None


class AttentionOptions(NamedTuple):
    """The static arguments of `attention`, with every default filled in."""

    normalizer: Normalizer
    causal: bool
    window: int | None
    logits_soft_cap: float | None
    scale: float

    def for_length(self, length: int) -> "AttentionOptions":
        """The options for `length` keys: some normalizers divide by their number."""
        # A length that the caller gave the normalizer stays. A window that reaches everywhere is
        # none, however large its number is.
        window = self.window
        if window is not None and window >= length:
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
