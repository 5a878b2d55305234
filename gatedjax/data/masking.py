"""Masked tokens, the targets of an encoder of text (BERT, arXiv 1810.04805)."""

import dataclasses

import numpy as np

from gatedjax.config import MaskingConfig
from gatedjax.data.batch import Batch
from gatedjax.data.tokenizer import Tokenizer


def mask_id(tokenizer: Tokenizer) -> int:
    """The id of the mask: the first one behind the tokenizer's own."""
    return tokenizer.vocab_size


@dataclasses.dataclass(frozen=True)
class MaskTokens:
    """A random map from rows of text to rows of which some tokens are to be predicted.

    The target of a token is the token itself. Ends of documents are never predicted.
    """

    config: MaskingConfig
    tokenizer: Tokenizer

    def __call__(self, row: Batch, rng: np.random.Generator) -> Batch:
        c = self.config
        tokens = np.asarray(row.tokens)
        is_word = (np.asarray(row.segment_ids) != 0) & (tokens != self.tokenizer.eos_id)
        is_chosen = is_word & (rng.random(tokens.shape) < c.fraction)
        # What stands in the place of a token is decided by another number.
        how = rng.random(tokens.shape)
        others = rng.integers(self.tokenizer.vocab_size, size=tokens.shape, dtype=np.int32)
        is_masked = is_chosen & (how < c.masked)
        is_random = is_chosen & (how >= c.masked) & (how < c.masked + c.random)
        seen = np.where(is_masked, np.int32(mask_id(self.tokenizer)), tokens)
        return dataclasses.replace(
            row,
            tokens=np.where(is_random, others, seen),
            targets=tokens,
            loss_mask=is_chosen.astype(np.float32),
        )
