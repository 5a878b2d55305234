"""Synthetic recall tasks: what a model of bounded state must remember, and attention need not.

Element i of a split depends on (seed, split, i) alone. Only `loss_mask` positions are predicted;
accuracy there is the figure of merit.

    mqar            k1 v1 ... kD vD, then the D keys again, scattered: at each the value of its
                    pair (multi-query associative recall, arXiv 2312.04927, generated as by the
                    study's code)
    copy            x1 ... xn, a separator, and x1 ... xn again
    selective_copy  x1 ... xn scattered among blanks, a separator, and x1 ... xn (arXiv 2312.00752,
                    section 4.1.1)
    modular_addition
                    a b = and then (a + b) mod p, with p = vocab_size - 1, the token of "=": all
                    pairs in an order that the seed shuffles, the first `train_examples` to train on
                    and the next `validation_examples` to validate (grokking, arXiv 2201.02177)
    bigram_backcopy tokens by a table of bigrams, but after each of num_pairs triggers the token
                    before it again; all tokens are predicted (`backcopy.py`, arXiv 2410.13835)
    needle          text that says somewhere "The code of KEVA is 41077.", and asks for it at the
                    end

Published, for comparison (arXiv 2312.04927, figure 2: T, D = 64, 4; 128, 8; 256, 16; 512, 64; 8,192
tokens, two layers, 100,000 examples, the best of four learning rates): attention about 1.0 from
width 64 on at every T; gated convolutions and RWKV above 0.9 only where the width reaches T. By
size of state in the study's later mixed setting: GLA 0.53 / 0.77 / 0.95 at 4.8e3 / 1.8e4 / 6.9e4
numbers, Mamba-2 0.52 / 0.69 / 0.83 at 8e3 / 1.6e4 / 6.5e4.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import grain
import numpy as np
from jaxtyping import Int, Num

from gatedjax.data.backcopy import Language, backcopy_row, language
from gatedjax.data.batch import Batch, empty_row
from gatedjax.data.blocks import Block
from gatedjax.data.splits import SPLITS, Split
from gatedjax.data.tokenizer import Tokenizer
from gatedjax.errors import require

Task = Literal["mqar", "copy", "selective_copy", "modular_addition", "bigram_backcopy", "needle"]
RowGenerator = Callable[[np.random.Generator], Batch]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BLANK = 0  # of the copying tasks
SEPARATOR = 1


@dataclasses.dataclass(frozen=True)
class RecallConfig:
    """A synthetic task. The comment at a field says for which tasks it counts.

    Raises:
      ValueError: a value that the task cannot be made with.
    """

    task: Task = "mqar"
    seq_len: int = 64
    vocab_size: int = 8192  # not needle: its tokens are the tokenizer's
    num_pairs: int = 4  # mqar: pairs of key and value; copies: tokens to copy; triggers
    # mqar: a; query slot i = 1, 2, ... has probability a i^(a - 1), so most queries come soon
    power: float = 0.01
    random_filler: bool = True  # mqar: random tokens between the queries, rather than token 0
    train_examples: int = 100_000
    validation_examples: int = 3_000
    seed: int = 0

    def __post_init__(self):
        tasks = get_args(Task)
        require(
            self.task in tasks,
            "task",
            self.task,
            f"one of {', '.join(tasks)}",
        )
        require(
            self.num_pairs >= 1,
            "num_pairs",
            self.num_pairs,
            "at least 1",
        )
        self._check_seq_len()
        self._check_vocab_size()
        if self.task == "modular_addition":
            pairs = (self.vocab_size - 1) ** 2
            require(
                self.train_examples + self.validation_examples <= pairs,
                "train_examples",
                self.train_examples,
                f"at most {pairs} pairs together with validation_examples",
            )
        for name in ("train_examples", "validation_examples"):
            value = getattr(self, name)
            require(value >= 1, name, value, "at least 1")

    def _check_seq_len(self) -> None:
        # mqar: D pairs, and D slots of two positions for the queries. Copies: the content, the
        # separator and all of the content but its last token.
        shortest_of_task = {
            "mqar": 4 * self.num_pairs,
            "copy": 2 * self.num_pairs,
            "selective_copy": 2 * self.num_pairs,
            "modular_addition": 3,
            "bigram_backcopy": 2,
            "needle": 2,
        }
        shortest = shortest_of_task[self.task]
        expected = f"at least {shortest} for num_pairs = {self.num_pairs}"
        fits = self.seq_len >= shortest
        if self.task == "mqar":
            expected += ", even"
            fits = fits and self.seq_len % 2 == 0
        require(fits, "seq_len", self.seq_len, expected)

    def _check_vocab_size(self) -> None:
        if self.task == "mqar":
            require(
                self.vocab_size // 2 > self.num_pairs,
                "vocab_size",
                self.vocab_size,
                f"above {2 * self.num_pairs + 1}: half keys, half values",
            )
        if self.task == "bigram_backcopy":
            require(
                self.vocab_size > self.num_pairs + 2,
                "vocab_size",
                self.vocab_size,
                f"above {self.num_pairs + 2}: the first token, triggers, two others",
            )
        require(
            self.vocab_size >= 4,
            "vocab_size",
            self.vocab_size,
            "at least 4",
        )


def recall_dataset(
    config: RecallConfig,
    split: Split,
    *,
    batch_size: int,
    rows: Sequence[int],
    row: RowGenerator | None = None,
) -> Block:
    """Global batches of a task, of which this process holds `rows`.

    The counterpart of `pipeline.make_dataset` for text. train: endless, `train_examples` rows in an
    order that is new in each epoch. validation: every row once.

    Args:
      config: the task.
      split: "train" or "validation".
      batch_size: rows of a global batch, over all processes.
      rows: which of these rows this process holds, ascending (`sharding.my_rows`).
      row: generates a row of [T] arrays from a generator; None for the config's task. A needle's
        row needs a text: `lambda rng: needle_row(rng, text, tokenizer, T)`.

    Returns:
      A dataset whose element i is a Batch of [len(rows), T].

    Raises:
      ValueError: an unknown split; a needle without `row`.
    """
    require(
        split in SPLITS,
        "split",
        split,
        f"one of {', '.join(SPLITS)}",
    )
    if row is None:
        require(
            config.task != "needle",
            "row",
            None,
            "a function: the task needle needs a text",
        )
        row = task_row(config)
    count = config.train_examples if split == "train" else config.validation_examples
    if config.task == "modular_addition":
        examples = Sums(config, split)
    else:
        examples = Examples(row, count, (config.seed, SPLITS.index(split)))
    if split == "train":
        examples = examples.shuffle(seed=config.seed).repeat()
    return Block(examples, batch_size, rows)


class Examples(grain.MapDataset[Batch]):
    """`count` rows; row i is generated from (*seed, i). Indices past the end start over."""

    def __init__(self, row: RowGenerator, count: int, seed: tuple[int, ...]):
        super().__init__()
        self._row = row
        self._count = count
        self._seed = seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        rng = np.random.default_rng([*self._seed, index % self._count])
        return self._row(rng)


class Sums(grain.MapDataset[Batch]):
    """The rows of modular_addition: of a split, each of its pairs once."""

    def __init__(self, config: RecallConfig, split: Split):
        super().__init__()
        self._modulus = config.vocab_size - 1
        self._seq_len = config.seq_len
        pairs = np.random.default_rng(config.seed).permutation(self._modulus**2)
        train = pairs[: config.train_examples]
        rest = pairs[config.train_examples :][: config.validation_examples]
        self._pairs = train if split == "train" else rest

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        a, b = divmod(int(self._pairs[index % len(self._pairs)]), self._modulus)
        tokens = np.zeros(self._seq_len, np.int64)
        tokens[-3:] = (a, b, self._modulus)
        answer = np.array([(a + b) % self._modulus])
        return _row(tokens, np.array([self._seq_len - 1]), answer)


def task_row(config: RecallConfig) -> RowGenerator:
    """The generator of rows of any task but needle."""

    def mqar(rng: np.random.Generator) -> Batch:
        return mqar_row(
            rng,
            config.seq_len,
            config.vocab_size,
            config.num_pairs,
            config.power,
            config.random_filler,
        )

    def copy(rng: np.random.Generator) -> Batch:
        return copy_row(
            rng,
            config.seq_len,
            config.vocab_size,
            config.num_pairs,
            selective=config.task == "selective_copy",
        )

    def backcopy(rng: np.random.Generator) -> Batch:
        return backcopy_row(rng, config.seq_len, language_of(config))

    generators: dict[str, RowGenerator] = {"mqar": mqar, "bigram_backcopy": backcopy}
    return generators.get(config.task, copy)


def language_of(config: RecallConfig) -> Language:
    """Of bigram_backcopy: the seed's, the same in both splits."""
    return language(config.vocab_size, config.num_pairs, config.seed)


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
    return _row(tokens, queries, values)


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
    return _row(tokens, np.arange(separator_at, seq_len), content)


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
    return _row(full[:-1], asked_at, answer)


def _row(
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
