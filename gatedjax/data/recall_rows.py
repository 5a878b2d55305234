"""Rows of the synthetic recall tasks (`recall.py`), one at a time, each from a generator."""

import numpy as np
from jaxtyping import Int, Num

from gatedjax.data.batch import Batch, empty_row
from gatedjax.data.tokenizer import Tokenizer
from gatedjax.errors import require

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BLANK = 0  # of the copying tasks
SEPARATOR = 1


def mqar_row(
    rng: np.random.Generator,
    seq_len: int,
    vocab_size: int,
    num_pairs: int,
    power: float,
    random_filler: bool,
) -> Batch:
    """Multi-query associative recall (arXiv 2312.04927, appendix, and its code `multiquery_ar`).

    Keys are distinct, from [1, V/2); values distinct, from [V/2, V). The D pairs fill the first 2 D
    positions. Of the (T - 2 D) / 2 slots after them, D distinct ones are drawn with probability
    proportional to i^(power - 1); at the first position of a slot is a key, and its target is that
    key's value.

    Args:
      rng: draws the row.
      seq_len: T, even.
      vocab_size: V.
      num_pairs: D.
      power: the smaller, the sooner queries come.
      random_filler: random tokens where there is neither a pair nor a query, rather than token 0.

    Returns:
      A row of [T] arrays.
    """
    first_value = vocab_size // 2
    end_of_pairs = 2 * num_pairs
    # The order of the draws is part of the task: the same seed gives the study's own examples.
    keys = 1 + rng.choice(first_value - 1, num_pairs, replace=False)
    values = first_value + rng.choice(vocab_size - first_value, num_pairs, replace=False)
    num_slots = (seq_len - end_of_pairs) // 2
    weights = np.arange(1, num_slots + 1) ** (power - 1.0)
    probabilities = weights / weights.sum()
    slots = rng.choice(
        num_slots,
        num_pairs,
        replace=False,
        p=probabilities,
    )
    # A slot has two positions; a query is at the first.
    queries = end_of_pairs + 2 * slots

    tokens = np.zeros(seq_len, np.int64)
    tokens[0:end_of_pairs:2] = keys
    tokens[1:end_of_pairs:2] = values
    tokens[queries] = keys
    if random_filler:
        # Keys and values are above 0: what is 0 is filler.
        filler = rng.integers(vocab_size, size=seq_len)
        tokens = np.where(tokens == 0, filler, tokens)
    return answered_row(tokens, queries, values)


def copy_row(
    rng: np.random.Generator,
    seq_len: int,
    vocab_size: int,
    num_tokens: int,
    *,
    selective: bool = False,
) -> Batch:
    """Copying. Token 0 is the blank, token 1 the separator, content comes from [2, V).

    The copy ends the row: the separator is at T - n, and position T - n + i predicts content
    token i. The content is before it, in one piece or (selective) scattered at random among
    blanks.

    Args:
      rng: draws the row.
      seq_len: T.
      vocab_size: V.
      num_tokens: n, the length of the content.
      selective: whether the content is scattered.

    Returns:
      A row of [T] arrays.
    """
    separator_at = seq_len - num_tokens
    content = rng.integers(2, vocab_size, size=num_tokens)
    if selective:
        content_at = np.sort(rng.choice(separator_at, num_tokens, replace=False))
    else:
        content_at = np.arange(separator_at - num_tokens, separator_at)
    tokens = np.full(seq_len, BLANK, np.int64)
    tokens[content_at] = content
    tokens[separator_at] = SEPARATOR
    # The last token of the copy is only a target.
    tokens[separator_at + 1 :] = content[:-1]
    return answered_row(tokens, np.arange(separator_at, seq_len), content)


def needle_row(
    rng: np.random.Generator,
    text: Num[np.ndarray, "stream"],
    tokenizer: Tokenizer,
    seq_len: int,
    depth: float | None = None,
) -> Batch:
    """A needle in real text. The digits of the code are predicted, in the question at the end.

    Args:
      rng: draws name, code and place.
      text: tokens of the haystack; the row shows a random stretch of it.
      tokenizer: of `load_tokenizer`; it writes needle and question.
      seq_len: T.
      depth: where the needle is, 0 for the start of the haystack and 1 for its end; None for
        anywhere.

    Returns:
      A row of [T] arrays.

    Raises:
      ValueError: the text is too short, or needle and question do not fit into the row.
    """
    name = "".join(rng.choice(list(LETTERS), 4))
    code = str(rng.integers(10_000, 100_000))
    needle = tokenizer.encode(f" The code of {name} is {code}. ")
    question = tokenizer.encode(f" What is the code of {name}? ")
    answer = tokenizer.encode(code)

    asked_tokens = len(needle) + len(question) + len(answer)
    # One token more than the row shows: the last one is only a target.
    length = seq_len + 1 - asked_tokens
    require(
        length > 0,
        "seq_len",
        seq_len,
        f"above {asked_tokens - 1} for needle and question",
    )
    require(
        len(text) >= length,
        "text",
        f"{len(text)} tokens",
        f"at least {length} tokens",
    )
    begin = rng.integers(len(text) - length + 1)
    haystack = np.asarray(text[begin : begin + length], np.int64)

    if depth is None:
        depth = rng.random()
    needle_at = round(depth * length)
    pieces = [haystack[:needle_at], needle, haystack[needle_at:], question, answer]
    full = np.concatenate(pieces).astype(np.int64)
    # The token before each digit predicts it.
    asked_at = np.arange(seq_len - len(answer), seq_len)
    return answered_row(full[:-1], asked_at, answer)


def answered_row(
    tokens: Int[np.ndarray, "T"],
    asked_at: Int[np.ndarray, "asked"],
    answers: Int[np.ndarray, "asked"],
) -> Batch:
    """One document of which only the positions `asked_at` are predicted."""
    row = empty_row(len(tokens))
    row.tokens[:] = tokens
    row.segment_ids[:] = 1
    row.positions[:] = np.arange(len(tokens))
    row.targets[asked_at] = answers
    row.loss_mask[asked_at] = 1.0
    return row
