"""From a configuration to batches: the windows of each source, mixed, cut into this process's rows.

All rows stand in one global order, whatever ran before: the state of the pipeline is one number,
the row that comes next. Row j of a global batch that begins at row n is window n + j of that order,
and a process reads its own rows of it. So the global batches are the same for any number of
processes and threads, and a run that goes on with another batch size neither repeats rows nor skips
any. Where a source is a stream (`streaming`), its place is part of the state too, and every process
makes all of its rows.
"""

import functools
import zlib
from collections.abc import Sequence
from typing import Literal, overload

import grain
import numpy as np

from gatedjax.config import DataConfig, ModelConfig
from gatedjax.data.blocks import Block
from gatedjax.data.open_corpora import corpora
from gatedjax.data.source_rows import for_task, rows_of_source
from gatedjax.data.splits import SPLITS, Split
from gatedjax.data.streamed_batches import StreamedBlock
from gatedjax.data.streaming import StreamedCorpus, StreamReader
from gatedjax.data.tokenizer import load_tokenizer
from gatedjax.errors import InputError

# One order for all runs: the first batches are a fair sample, the same in each run.
VALIDATION_SEED = 0


@overload
def make_dataset(
    cfg: DataConfig,
    split: Literal["validation"],
    *,
    batch_size: int,
    rows: Sequence[int],
    seed: int,
    model: ModelConfig | None = None,
) -> Block: ...


@overload
def make_dataset(
    cfg: DataConfig,
    split: Split,
    *,
    batch_size: int,
    rows: Sequence[int],
    seed: int,
    model: ModelConfig | None = None,
) -> Block | StreamedBlock: ...


def make_dataset(
    cfg: DataConfig,
    split: Split,
    *,
    batch_size: int,
    rows: Sequence[int],
    seed: int,
    model: ModelConfig | None = None,
) -> Block | StreamedBlock:
    """The global batches of a split, of which this process holds `rows`.

    train: endless. Each source gives its windows in an order that is new in each epoch, a stream
    its documents in theirs; rows are drawn from the sources by weight, in a fixed interleaving.
    validation: every window of every source once, in an order that does not depend on `seed`; the
    last batch is filled with rows whose loss_mask is 0.

    Args:
      cfg: the sources, their mixture and the tokenizer.
      split: "train" or "validation".
      batch_size: rows of a global batch, over all processes.
      rows: which of these rows this process holds, ascending (`sharding.my_rows`).
      seed: of the order of the windows, and of what is done to them at random.
      model: whose task asks for masked tokens or for images; None for the next token.

    Returns:
      A dataset whose element i is a Batch of [len(rows), T]; with streams one that is read in
      order, by `batches`.

    Raises:
      InputError: see `corpora`.
      ValueError: rows outside the batch, an unknown split.
    """
    is_ascending = list(rows) == sorted(set(rows))
    if not rows or not is_ascending or rows[0] < 0 or rows[-1] >= batch_size:
        raise ValueError(
            f"rows: got {rows}, expected ascending rows within a batch_size of {batch_size}"
        )
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, expected 'train' or 'validation'")
    if split == "train" and cfg.validation_fraction == 1:
        raise InputError("config.data.validation_fraction: got 1.0, expected below 1 to train")
    opened = corpora(cfg)
    if split == "validation":
        windows = [rows_of_source(corpus, split, cfg, model) for corpus in opened.values()]
        order = grain.MapDataset.concatenate(windows).shuffle(seed=VALIDATION_SEED)
        return Block(for_task(order, split, cfg, model, VALIDATION_SEED), batch_size, rows)
    endless = {}
    readers = {}
    for name, corpus in opened.items():
        source_seed = _source_seed(seed, name)
        if isinstance(corpus, StreamedCorpus):
            readers[name] = functools.partial(
                StreamReader,
                corpus,
                load_tokenizer(cfg.tokenizer, cfg.end_of_document),
                cfg.seq_len,
                source_seed,
            )
        else:
            shuffled = rows_of_source(corpus, split, cfg, model).shuffle(seed=source_seed)
            endless[name] = shuffled.repeat()
    weights = {name: cfg.sources[name].weight for name in opened}
    if readers:
        return StreamedBlock(
            endless,
            readers,
            weights,
            batch_size,
            rows,
        )
    order = grain.MapDataset.mix(list(endless.values()), list(weights.values()))
    return Block(for_task(order, split, cfg, model, seed), batch_size, rows)


def _source_seed(seed: int, name: str) -> int:
    """A seed of its own for each source.

    grain's epochs count on from the seed, so sources with neighboring seeds would have orders in
    common.
    """
    entropy = [seed % (1 << 64), zlib.crc32(name.encode())]
    state = np.random.SeedSequence(entropy).generate_state(1)
    return int(state[0])
