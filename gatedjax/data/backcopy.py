"""The Bigram-Backcopy task (arXiv 2410.13835, section 2), on which attention sinks form in models
of one layer.

A row begins with the token 0. After an ordinary token comes what a table of bigrams says; after one
of a few trigger tokens, the token before the trigger once more. A head that copies has something to
do at triggers and nothing anywhere else: there it is dormant, and has to look somewhere.
"""

import bisect
import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from gatedjax.data.batch import Batch

BEGIN = 0
# What an ordinary token gives to all triggers together: about a fourth of a row's tokens are
# triggers.
TRIGGER_PROBABILITY = 0.35
# Of the Dirichlet distribution that rows of the table are drawn from: a few successors are likely.
CONCENTRATION = 0.1


class Language(NamedTuple):
    """The table of bigrams; triggers are the tokens 1 .. n.

    probabilities: of the next token, by the token; rows of triggers are of no use.
    cumulative: their sums over tokens, row by row.
    """

    num_triggers: int
    probabilities: Float[np.ndarray, "V V"]
    cumulative: list[list[float]]

    def is_trigger(self, tokens: Int[np.ndarray, "*rows"]) -> Bool[np.ndarray, "*rows"]:
        """Whether what comes after a token is a copy."""
        return (tokens > BEGIN) & (tokens <= self.num_triggers)


@functools.cache
def language(vocab_size: int, num_triggers: int, seed: int) -> Language:
    """A table that is drawn at random.

    Args:
      vocab_size: V.
      num_triggers: n.
      seed: another one is another language.

    Returns:
      The language. Triggers follow ordinary tokens only, and the first token is ordinary: two of
      them in a row would copy each other for ever.
    """
    rng = np.random.default_rng([seed, vocab_size, num_triggers])
    num_ordinary = vocab_size - 1 - num_triggers
    ordinary = slice(1 + num_triggers, vocab_size)
    probabilities = np.zeros((vocab_size, vocab_size))
    among_triggers = rng.dirichlet(np.ones(num_triggers), size=vocab_size)
    among_ordinary = rng.dirichlet(np.full(num_ordinary, CONCENTRATION), size=vocab_size)
    probabilities[:, 1 : 1 + num_triggers] = TRIGGER_PROBABILITY * among_triggers
    probabilities[:, ordinary] = (1 - TRIGGER_PROBABILITY) * among_ordinary
    probabilities[BEGIN] = 0
    probabilities[BEGIN, ordinary] = 1 / num_ordinary
    cumulative = np.cumsum(probabilities, axis=1)
    # Rounding may leave the last sums a little below 1.
    cumulative /= cumulative[:, -1:]
    return Language(num_triggers, probabilities, cumulative.tolist())


def backcopy_row(rng: np.random.Generator, seq_len: int, of: Language) -> Batch:
    """A row of [T] arrays; every token is predicted.

    Args:
      rng: draws the row.
      seq_len: T.
      of: the language.

    Returns:
      One document: the token 0 and T - 1 tokens; the last target is one more.
    """
    # One uniform number a token, and plain lists: numpy would be slower than the training step.
    drawn = [BEGIN]
    for uniform in rng.random(seq_len).tolist():
        before = drawn[-1]
        if BEGIN < before <= of.num_triggers:
            drawn.append(drawn[-2])
        else:
            drawn.append(bisect.bisect_right(of.cumulative[before], uniform))
    tokens = np.asarray(drawn)
    return Batch(
        tokens=tokens[:-1].astype(np.int32),
        targets=tokens[1:].astype(np.int32),
        segment_ids=np.ones(seq_len, np.int32),
        positions=np.arange(seq_len, dtype=np.int32),
        loss_mask=np.ones(seq_len, np.float32),
    )


def best_loss(
    tokens: Int[np.ndarray, "*B T"], targets: Int[np.ndarray, "*B T"], of: Language
) -> float:
    """Nats per token of a model that knows the language: the least there can be."""
    probabilities = of.probabilities[tokens, targets]
    probabilities = np.where(of.is_trigger(tokens), 1.0, probabilities)
    return float(-np.mean(np.log(probabilities)))
