"""From a configuration to batches: windows of each source, mixed, cut into the rows of this
process.

Element i of a dataset is the i-th global batch, whatever ran before: the state of the pipeline is
one number, the next index. Row j of global batch i is window i * batch_size + j of one global
order, and a process reads its own rows of it, so the global batches are the same for any number of
processes and threads.
"""

import math
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import grain
import numpy as np
from jaxtyping import Int, Integer

from gatedjax.config import DataConfig
from gatedjax.data.batch import Batch, cut_window, empty_row, num_windows, stack_rows
from gatedjax.data.sources import open_source
from gatedjax.data.token_cache import Corpus, tokenize
from gatedjax.data.tokenizer import load_tokenizer
from gatedjax.errors import InputError

VALIDATION_SEED = 0  # one order for all runs: the first batches are a fair sample, the same in each


class Windows(grain.MapDataset[Batch]):
    """The windows of one token stream, in order: rows of [T] arrays. Indices past the end start
    over.
    """

    def __init__(
        self,
        tokens: Integer[np.ndarray, "N"],
        document_ends: Int[np.ndarray, "documents"],
        seq_len: int,
    ):
        super().__init__()
        self._tokens, self._ends, self._seq_len = tokens, document_ends, seq_len

    def __len__(self) -> int:
        return num_windows(len(self._tokens), self._seq_len)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        return cut_window(self._tokens, self._ends, index % len(self), self._seq_len)


class Block(grain.MapDataset[Batch]):
    """Global batches of `batch_size` rows of `parent`, of which this process holds `rows`.

    Where the parent ends inside a batch, rows of padding fill it.
    """

    def __init__(
        self, parent: grain.MapDataset[Batch], batch_size: int, rows: Sequence[int], seq_len: int
    ):
        super().__init__(parent)
        self._batch_size, self._rows, self._seq_len = batch_size, rows, seq_len

    def __len__(self) -> int:
        return -(-len(self._parent) // self._batch_size)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch_length = len(self._parent)
        windows = [index * self._batch_size + row for row in self._rows]
        return stack_rows(
            [self._parent[w] if w < epoch_length else empty_row(self._seq_len) for w in windows]
        )


def corpora(cfg: DataConfig) -> dict[str, Corpus]:
    """The tokenized sources by name, tokenized now if they are not in the cache. `describe()` each
    at the start.

    Raises:
      InputError: one line naming the source and what is wrong with it.
    """
    # By name: a configuration that went through JSON may list them in another order, the mixture
    # must not change.
    sources = dict(sorted(cfg.sources.items()))
    for name, source in sources.items():
        if not 0 < source.weight < math.inf:
            raise InputError(f"sources.{name}.weight: got {source.weight!r}, expected above 0")
    tokenizer, cache_dir = load_tokenizer(cfg.tokenizer), _cache_dir(cfg)
    opened = {name: open_source(name, source) for name, source in sources.items()}
    return {
        name: tokenize(source, tokenizer, cfg.validation_fraction, cache_dir)
        for name, source in opened.items()
    }


def make_dataset(
    cfg: DataConfig,
    split: Literal["train", "validation"],
    *,
    batch_size: int,
    rows: Sequence[int],
    seed: int,
) -> grain.MapDataset[Batch]:
    """The global batches of a split, of which this process holds `rows`: element i is a Batch of
    [len(rows), T].

    train: endless. Each source gives its windows in an order that is new in each epoch; rows are
    drawn from the sources by weight, in a fixed interleaving. validation: every window of every
    source once, in an order that does not depend on `seed`; the last batch is filled with rows
    whose loss_mask is 0.

    Args:
      batch_size: rows of a global batch, over all processes.
      rows: which of these rows are mine, ascending (`sharding.my_rows`).

    Raises:
      InputError: see `corpora`. ValueError: rows outside the batch, an unknown split.
    """
    if not rows or list(rows) != sorted(set(rows)) or not 0 <= rows[0] <= rows[-1] < batch_size:
        raise ValueError(
            f"rows: got {rows}, expected ascending rows within a batch_size of {batch_size}"
        )
    if split not in ("train", "validation"):
        raise ValueError(f"split: got {split!r}, expected 'train' or 'validation'")
    loaded = corpora(cfg)
    windows = {name: Windows(*corpus.stream(split), cfg.seq_len) for name, corpus in loaded.items()}
    if split == "validation":
        order = grain.MapDataset.concatenate(list(windows.values())).shuffle(seed=VALIDATION_SEED)
    else:
        endless = [w.shuffle(seed=_source_seed(seed, name)).repeat() for name, w in windows.items()]
        order = grain.MapDataset.mix(endless, [cfg.sources[name].weight for name in windows])
    return Block(order, batch_size, rows, cfg.seq_len)


class BatchIterator(Iterator[Batch]):
    """Global batches in order. `next_index` is the whole state: `batches(dataset, next_index)` goes
    on from here.
    """

    def __init__(self, iterator: Iterator[Batch], next_index: int):
        self._iterator, self.next_index = iterator, next_index

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self.next_index += 1
        return batch


def batches(
    dataset: grain.MapDataset[Batch], start: int = 0, *, num_threads: int = 1, prefetch: int = 4
) -> BatchIterator:
    """Iterates from global batch `start`, `prefetch` batches ahead in `num_threads` threads.

    `num_threads=0` reads in the caller's thread. The batches are the same either way.
    """
    if start < 0:
        raise ValueError(f"start: got {start}, expected at least 0")
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0
    )
    return BatchIterator(iter(dataset[start:].to_iter_dataset(options)), start)


def validation_text(cfg: DataConfig) -> bytes:
    """The validation documents of all sources one after another, UTF-8: the text whose bits per
    byte are reported.
    """
    return b"".join(corpus.validation_text() for corpus in corpora(cfg).values())


def _cache_dir(cfg: DataConfig) -> Path:
    if cfg.cache_dir:
        return Path(cfg.cache_dir).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gatedjax"


def _source_seed(seed: int, name: str) -> int:
    """A seed of its own for each source: grain's epochs count on from the seed, so neighbors would
    share orders.
    """
    return int(
        np.random.SeedSequence([seed % (1 << 64), zlib.crc32(name.encode())]).generate_state(1)[0]
    )
