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

from gatedjax.data.backcopy import Language, backcopy_row, language
from gatedjax.data.batch import Batch
from gatedjax.data.blocks import Block
from gatedjax.data.recall_rows import answered_row, copy_row, mqar_row
from gatedjax.data.splits import SPLITS, Split
from gatedjax.errors import require

Task = Literal["mqar", "copy", "selective_copy", "modular_addition", "bigram_backcopy", "needle"]
RowGenerator = Callable[[np.random.Generator], Batch]


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
        row needs a text: `lambda rng: recall_rows.needle_row(rng, text, tokenizer, T)`.

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
        return answered_row(tokens, np.array([self._seq_len - 1]), answer)


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
