"""The log-likelihood of a continuation after a context: what evaluation harnesses ask for.

A document begins with the end-of-document token (docs/tokens.md), which stands before every
context, so an empty context is nothing special. The same targets as in training and validation: the
sum over the texts of a split, their ends included, is its loss times its tokens as long as each
fits in a window.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, PyTree

from gatedjax.compiler_options import careful_jit
from gatedjax.config import ModelConfig
from gatedjax.data.tokenizer import TokenIds, Tokenizer
from gatedjax.evaluation.prompt_text import as_text
from gatedjax.evaluation.sampling import padded_on_the_right
from gatedjax.model import LanguageModel, head_weights
from gatedjax.output import to_logits
from gatedjax.sharding import RULES
from gatedjax.training.losses import predicted


class Score(NamedTuple):
    """Of a continuation, given its context.

    log_likelihood: nats, at most 0: the sum over its tokens.
    tokens: how many they are.
    is_greedy: each of them is the most likely one.
    """

    log_likelihood: float
    tokens: int
    is_greedy: bool


def log_likelihoods(
    model: ModelConfig,
    params: PyTree,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    *,
    with_end: bool = False,
    batch_size: int = 8,
) -> list[Score]:
    """The score of each continuation.

    Context and continuation are tokenized together: the spaces at the seam are those of the text.
    The continuation begins with the first token that the context alone does not have; a space at
    the end of a context may become part of it.

    Args:
      model: the model's configuration.
      params: parameters and router state.
      tokenizer: the one that the model was trained with.
      pairs: context and continuation, each of which may be empty.
      with_end: the document ends after the continuation, and its end counts as one more token.
      batch_size: rows that are computed together.

    Raises:
      InputError: text that is not UTF-8.
    """
    end = [tokenizer.eos_id] if with_end else []
    of_tokens = []
    for context, continuation in pairs:
        context = as_text(context)
        whole = tokenizer.encode(context + as_text(continuation)).tolist()
        seam = 0
        for token, of_context in zip(whole, tokenizer.encode(context).tolist()):
            if token != of_context:
                break
            seam += 1
        of_tokens.append((whole[:seam], [*whole[seam:], *end]))
    return log_likelihoods_of_tokens(
        model,
        params,
        of_tokens,
        eos_id=tokenizer.eos_id,
        batch_size=batch_size,
    )


def log_likelihoods_of_tokens(
    model: ModelConfig,
    params: PyTree,
    pairs: Sequence[tuple[TokenIds, TokenIds]],
    *,
    eos_id: int,
    batch_size: int = 8,
) -> list[Score]:
    """`log_likelihoods` of token ids, for callers with a tokenizer of their own.

    Args:
      model: the model's configuration.
      params: parameters and router state.
      pairs: context and continuation; the document begins with the context's first token.
      eos_id: the end-of-document token, which is put before every context.
      batch_size: rows that are computed together.
    """
    scores: list[Any] = [None] * len(pairs)
    # Rows of like lengths together: less padding.
    by_length = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    for first in range(0, len(pairs), batch_size):
        indices = by_length[first : first + batch_size]
        rows = _rows([pairs[i] for i in indices], eos_id, batch_size)
        found = jax.device_get(predicted_rows(model, params, *rows))
        is_right = found.is_best | (rows.mask == 0)
        for row, i in enumerate(indices):
            scores[i] = Score(
                log_likelihood=-float(np.sum(found.nats[row])),
                tokens=len(pairs[i][1]),
                is_greedy=bool(np.all(is_right[row])),
            )
    return scores


class _Rows(NamedTuple):
    """Rows of one document each: what is read, what is predicted, and where it counts."""

    tokens: Int[np.ndarray, "B T"]
    targets: Int[np.ndarray, "B T"]
    segment_ids: Int[np.ndarray, "B T"]
    mask: Float[np.ndarray, "B T"]


def _rows(
    pairs: Sequence[tuple[TokenIds, TokenIds]],
    eos_id: int,
    num_rows: int,
) -> _Rows:
    """The documents as rows, filled up with rows of padding."""
    longest = max(len(context) + len(continuation) for context, continuation in pairs)
    tokens = np.zeros((num_rows, max(longest, 1)), np.int32)
    segment_ids = np.zeros_like(tokens)
    tokens, segment_ids = padded_on_the_right(tokens, segment_ids)
    targets = np.zeros_like(tokens)
    mask = np.zeros(tokens.shape, np.float32)
    for row, (context, continuation) in enumerate(pairs):
        document = np.asarray([eos_id, *context, *continuation], np.int32)
        length = len(document) - 1
        tokens[row, :length] = document[:-1]
        targets[row, :length] = document[1:]
        segment_ids[row, :length] = 1
        mask[row, len(context) : length] = 1.0
    return _Rows(tokens, targets, segment_ids, mask)


class OfTokens(NamedTuple):
    """How each target is predicted: nats, and whether it is the most likely token.

    Zeros and False where nothing is asked for.
    """

    nats: Float[Array | np.ndarray, "B T"]
    is_best: Bool[Array | np.ndarray, "B T"]


@functools.partial(careful_jit, static_argnums=0)
def predicted_rows(
    model: ModelConfig,
    params: PyTree,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    mask: Float[Array, "B T"],
) -> OfTokens:
    """What the model says of every target whose mask is not 0."""
    with nn.logical_axis_rules(RULES):
        outputs: Any = LanguageModel(model).apply(
            {"params": params},
            tokens,
            segment_ids=segment_ids,
        )
    hidden = outputs[0]
    weights = head_weights(params)
    of_output = to_logits(model, params)

    def of_row(row: tuple[Array, Array, Array]) -> OfTokens:
        hidden, targets, mask = row
        of_tokens = predicted(hidden, weights, targets, mask, of_output)
        return OfTokens(of_tokens.nats, of_tokens.is_best)

    # A row at a time: the logits of all of them would be large.
    return jax.lax.map(of_row, (hidden, targets, mask))
