"""Synthetic recall tasks: what a model of bounded state must remember, and attention need not.

Element i of a split depends on (seed, split, i) alone. Only `loss_mask` positions are predicted;
accuracy there is the figure of merit.

    mqar            k1 v1 ... kD vD, then the D keys again, scattered: at each the value that came with it (multi-query
                    associative recall, arXiv 2312.04927, generated as by the study's code)
    copy            x1 ... xn, a separator, and x1 ... xn again
    selective_copy  x1 ... xn scattered among blanks, a separator, and x1 ... xn (arXiv 2312.00752, section 4.1.1)
    needle          text that says somewhere "The code of KEVA is 41077.", and asks for it at the end

Published, for comparison (arXiv 2312.04927, figure 2: T, D = 64, 4; 128, 8; 256, 16; 512, 64; 8,192
tokens, two layers, 100,000 examples, the best of four learning rates): attention about 1.0 from
width 64 on at every T; gated convolutions and RWKV above 0.9 only where the width reaches T. By
size of state in the study's later mixed setting: GLA 0.53 / 0.77 / 0.95 at 4.8e3 / 1.8e4 / 6.9e4
numbers, Mamba-2 0.52 / 0.69 / 0.83 at 8e3 / 1.6e4 / 6.5e4.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import grain
import numpy as np
from jaxtyping import Int, Integer

from gatedjax.data.batch import Batch, empty_row
from gatedjax.data.pipeline import Block

Task = Literal["mqar", "copy", "selective_copy", "needle"]
Row = Callable[[np.random.Generator], Batch]
SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class RecallConfig:
    """A synthetic task. Which fields count is said at each.

    Raises:
      ValueError: a value that the task cannot be made with.
    """

    task: Task = "mqar"
    seq_len: int = 64
    vocab_size: int = 8192  # not needle: that one speaks the tokenizer's
    num_pairs: int = 4  # mqar: pairs of key and value; copies: tokens to copy
    # mqar: a; query slot i = 1, 2, ... has probability a i^(a - 1), so most queries come soon
    power: float = 0.01
    random_filler: bool = True  # mqar: between the queries stand random tokens rather than token 0
    train_examples: int = 100_000
    validation_examples: int = 3_000
    seed: int = 0

    def __post_init__(self):
        D, T, V = self.num_pairs, self.seq_len, self.vocab_size
        needed = {"mqar": 4 * D, "copy": 2 * D, "selective_copy": 2 * D, "needle": 2}
        _require(
            self.task in get_args(Task), "task", self.task, f"one of {', '.join(get_args(Task))}"
        )
        _require(D >= 1, "num_pairs", D, "at least 1")
        wanted = f"at least {needed[self.task]} for num_pairs = {D}" + (
            ", even" if self.task == "mqar" else ""
        )
        _require(
            needed[self.task] <= T and (T % 2 == 0 or self.task != "mqar"), "seq_len", T, wanted
        )
        _require(
            V // 2 > D or self.task != "mqar",
            "vocab_size",
            V,
            f"above {2 * D + 1}: half keys, half values",
        )
        _require(V >= 4, "vocab_size", V, "at least 4")
        for name in ("train_examples", "validation_examples"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


def recall_dataset(
    config: RecallConfig,
    split: Literal["train", "validation"],
    *,
    batch_size: int,
    rows: range,
    row: Row | None = None,
) -> grain.MapDataset[Batch]:
    """Global batches of a task, of which this process holds `rows`, as `pipeline.make_dataset`
    gives those of text.

    train: endless, `train_examples` rows in an order that is new in each epoch. validation: every
    row once.

    Args:
      row: generates a row of [T] arrays from a generator; None for the config's task. A needle's
        row needs a text: `lambda rng: needle_row(rng, text, tokenizer, T)`.

    Raises:
      ValueError: an unknown split; a needle without `row`.
    """
    _require(split in SPLITS, "split", split, f"one of {', '.join(SPLITS)}")
    _require(
        row is not None or config.task != "needle",
        "row",
        None,
        "a function: the task needle needs a text",
    )
    count = config.train_examples if split == "train" else config.validation_examples
    examples = Examples(row or task_row(config), count, (config.seed, SPLITS.index(split)))
    if split == "train":
        examples = examples.shuffle(seed=config.seed).repeat()
    return Block(examples, batch_size, rows, config.seq_len)


class Examples(grain.MapDataset[Batch]):
    """`count` rows; row i is generated from (*seed, i). Indices past the end start over."""

    def __init__(self, row: Row, count: int, seed: tuple[int, ...]):
        super().__init__()
        self._row, self._count, self._seed = row, count, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        return self._row(np.random.default_rng([*self._seed, index % self._count]))


def task_row(config: RecallConfig) -> Row:
    """The generator of rows of mqar, copy or selective_copy."""
    T, V, D = config.seq_len, config.vocab_size, config.num_pairs
    if config.task == "mqar":
        return lambda rng: mqar_row(rng, T, V, D, config.power, config.random_filler)
    return lambda rng: copy_row(rng, T, V, D, selective=config.task == "selective_copy")


def mqar_row(
    rng: np.random.Generator,
    seq_len: int,
    vocab_size: int,
    num_pairs: int,
    power: float,
    random_filler: bool,
) -> Batch:
    """Multi-query associative recall (arXiv 2312.04927, appendix, and the study's `multiquery_ar`):
    arrays [T].

    Keys are distinct, from [1, V/2); values distinct, from [V/2, V). The D pairs fill the first 2 D
    positions. Of the (T - 2 D) / 2 slots after them, D distinct ones are drawn with probability
    proportional to i^(power - 1); at the first position of a slot stands a key, and its target is
    that key's value.
    """
    keys = 1 + rng.choice(vocab_size // 2 - 1, num_pairs, replace=False)
    values = vocab_size // 2 + rng.choice(vocab_size - vocab_size // 2, num_pairs, replace=False)
    slots = (seq_len - 2 * num_pairs) // 2
    weights = np.arange(1, slots + 1) ** (power - 1.0)
    queries = 2 * num_pairs + 2 * rng.choice(
        slots, num_pairs, replace=False, p=weights / weights.sum()
    )
    tokens = np.zeros(seq_len, np.int64)
    tokens[: 2 * num_pairs] = np.stack([keys, values], 1).ravel()
    tokens[queries] = keys
    if random_filler:
        tokens = np.where(tokens == 0, rng.integers(vocab_size, size=seq_len), tokens)
    return _row(tokens, queries, values)


def copy_row(
    rng: np.random.Generator,
    seq_len: int,
    vocab_size: int,
    num_tokens: int,
    *,
    selective: bool = False,
) -> Batch:
    """Copying: arrays [T]. Token 0 is the blank, token 1 the separator, content comes from [2, V).

    The copy ends the row: the separator stands at T - n, and position T - n + i predicts content
    token i. The content stands before it, in one piece or (selective) scattered at random among
    blanks.
    """
    start = seq_len - num_tokens  # of the separator
    content = rng.integers(2, vocab_size, size=num_tokens)
    where = (
        np.sort(rng.choice(start, num_tokens, replace=False))
        if selective
        else np.arange(-num_tokens, 0) + start
    )
    tokens = np.zeros(seq_len, np.int64)
    tokens[where], tokens[start], tokens[start + 1 :] = content, 1, content[:-1]
    return _row(tokens, np.arange(start, seq_len), content)


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def needle_row(
    rng: np.random.Generator,
    text: Integer[np.ndarray, "N"],
    tokenizer,
    seq_len: int,
    depth: float | None = None,
) -> Batch:
    """A needle in real text: arrays [T]. The digits of the code are predicted, in the question at
    the end.

    Args:
      text: tokens of the haystack; the row shows a random stretch of it.
      tokenizer: of `load_tokenizer`; it writes needle and question.
      depth: where the needle stands, 0 for the start of the haystack and 1 for its end; None for
        anywhere.

    Raises:
      ValueError: the text is too short, or needle and question do not fit into the row.
    """
    name = "".join(rng.choice(list(LETTERS), 4))
    code = str(rng.integers(10_000, 100_000))
    encode = lambda s: np.asarray(tokenizer.encode(s), np.int64)
    needle, question = (
        encode(f" The code of {name} is {code}. "),
        encode(f" What is the code of {name}? "),
    )
    answer = encode(code)
    # One token more than the row shows: the last one is only a target.
    length = seq_len + 1 - len(needle) - len(question) - len(answer)
    _require(length > 0, "seq_len", seq_len, f"above {seq_len - length} for needle and question")
    _require(len(text) >= length, "text", f"{len(text)} tokens", f"at least {length} tokens")
    begin = rng.integers(len(text) - length + 1)
    hay = np.asarray(text[begin : begin + length], np.int64)
    at = round((rng.random() if depth is None else depth) * length)
    full = np.concatenate([hay[:at], needle, hay[at:], question, answer])
    asked = np.arange(seq_len - len(answer), seq_len)
    return _row(full[:-1], asked, answer)


def _row(
    tokens: Int[np.ndarray, "T"], where: Int[np.ndarray, "D"], answers: Int[np.ndarray, "D"]
) -> Batch:
    """One document of which only the positions `where` are predicted."""
    row = empty_row(len(tokens))
    row.tokens[:], row.segment_ids[:], row.positions[:] = tokens, 1, np.arange(len(tokens))
    row.targets[where], row.loss_mask[where] = answers, 1.0
    return row


def _require(ok: bool, name: str, value, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
