"""From a configuration to batches: the windows of each source, mixed, cut into this process's rows.

All rows stand in one global order, whatever ran before: the state of the pipeline is one number,
the row that comes next. Row j of a global batch that begins at row n is window n + j of that order,
and a process reads its own rows of it. So the global batches are the same for any number of
processes and threads, and a run that goes on with another batch size neither repeats rows nor skips
any. Where a source is a stream (`streaming`), its place is part of the state too, and every process
makes all of its rows.
"""

import functools
import itertools
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import grain
import jax
import numpy as np
from absl import logging
from jaxtyping import Int, Integer

from gatedjax.config import IMAGE_KINDS, DataConfig, ModelConfig
from gatedjax.data import bucket_cache, chat
from gatedjax.data.batch import Batch, cut_window, num_windows, stack_rows
from gatedjax.data.chat_template import load_chat_template
from gatedjax.data.corpus import Corpus
from gatedjax.data.document_stream import KIND as STREAMING
from gatedjax.data.document_stream import State
from gatedjax.data.encoders import Encoder, TextEncoder
from gatedjax.data.image_rows import augmented, row_of_image
from gatedjax.data.images import ImageCorpus, open_images
from gatedjax.data.masking import MaskTokens
from gatedjax.data.sources import Source, open_source
from gatedjax.data.splits import SPLITS, Split, side_of
from gatedjax.data.streamed_batches import ReadAhead, StreamedBatches, StreamedBlock
from gatedjax.data.streaming import StreamedCorpus, StreamReader, streamed_corpus
from gatedjax.data.token_cache import cache_name, tokenize
from gatedjax.data.token_file import TokenFile
from gatedjax.data.tokenizer import Tokenizer, load_tokenizer
from gatedjax.errors import InputError, printable
from gatedjax.paths import Place, expand, expand_place, is_bucket

# One order for all runs: the first batches are a fair sample, the same in each run.
VALIDATION_SEED = 0


class Windows(grain.MapDataset[Batch]):
    """The windows of one token stream, in order: rows of [T] arrays.

    Indices past the end start over.
    """

    def __init__(
        self,
        tokens: Integer[np.ndarray, "stream"] | TokenFile,
        document_ends: Int[np.ndarray, "documents"],
        seq_len: int,
    ):
        super().__init__()
        self._tokens = tokens
        self._document_ends = document_ends
        self._seq_len = seq_len

    def __len__(self) -> int:
        return num_windows(len(self._tokens), self._seq_len)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        return cut_window(
            self._tokens,
            self._document_ends,
            index % len(self),
            self._seq_len,
        )


class Block(grain.MapDataset[Batch]):
    """Global batches of `batch_size` rows of `parent`, of which this process holds `rows`.

    The first batch begins at row `first_row` of the parent, the last one ends before `end_row`.
    Where the rows end inside a batch, rows of padding fill it.
    """

    def __init__(
        self,
        parent: grain.MapDataset[Batch],
        batch_size: int,
        rows: Sequence[int],
        first_row: int = 0,
        end_row: int | None = None,
    ):
        super().__init__(parent)
        self._rows = rows
        # For an endless parent, `len` is sys.maxsize: nothing is past its end.
        self._end_row = len(parent) if end_row is None else min(end_row, len(parent))
        self.batch_size = batch_size
        self.first_row = first_row

    def between(self, first_row: int, end_row: int | None = None) -> "Block":
        """The batches of these rows of the global order."""
        return Block(
            self._parent,
            self.batch_size,
            self._rows,
            first_row,
            self._end_row if end_row is None else end_row,
        )

    def __len__(self) -> int:
        num_rows = max(self._end_row - self.first_row, 0)
        return -(-num_rows // self.batch_size)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            assert step == 1, "global batches are read in order"
            first_row = self.first_row + start * self.batch_size
            return self.between(first_row, self.first_row + stop * self.batch_size)
        block = []
        for row in self._rows:
            parent_index = self.first_row + index * self.batch_size + row
            if parent_index < self._end_row:
                block.append(self._parent[parent_index])
            else:
                # Padding: segment 0, nothing to predict.
                block.append(jax.tree.map(np.zeros_like, self._parent[self._end_row - 1]))
        return stack_rows(block)


AnyCorpus = Corpus | StreamedCorpus | ImageCorpus


def corpora(cfg: DataConfig) -> dict[str, AnyCorpus]:
    """The sources by name: files tokenized, now if they are not in the cache, streams opened,
    images listed.

    Raises:
      InputError: one line naming the source and what is wrong with it.
    """
    # By name: a configuration that went through JSON may list them in another order, and the
    # mixture must not change.
    configs = dict(sorted(cfg.sources.items()))
    for name, source in configs.items():
        if not 0 < source.weight < math.inf:
            raise InputError(f"sources.{name}.weight: got {source.weight!r}, expected above 0")
    if any(source.kind in IMAGE_KINDS for source in configs.values()):
        return dict(image_corpora(cfg))
    tokenizer = load_tokenizer(cfg.tokenizer, cfg.end_of_document)
    encoders = _encoders(cfg, tokenizer)
    cache_dir = _cache_dir(cfg)
    # A bad source is found before the first one is tokenized, which takes time.
    streams = {}
    sources = {}
    for name, source in configs.items():
        if source.kind == STREAMING:
            streams[name] = streamed_corpus(name, source, tokenizer)
        else:
            sources[name] = open_source(name, source)
    tokenized = {}
    for name, source in sources.items():
        tokenized[name] = _tokenized(
            source,
            encoders.get(source.kind, encoders["text"]),
            cfg.validation_fraction,
            cache_dir,
        )
    _require_disjoint(tokenized, cfg.validation_fraction)
    together = tokenized | streams
    return {name: together[name] for name in configs}


def image_corpora(cfg: DataConfig) -> dict[str, ImageCorpus]:
    """The sources of images by name.

    Raises:
      InputError: a source that is none of images, or has other classes than another.
    """
    opened = {}
    for name, source in sorted(cfg.sources.items()):
        if source.kind not in IMAGE_KINDS:
            raise InputError(
                f"sources.{name}.kind: got {source.kind!r}, expected one of "
                f"{', '.join(IMAGE_KINDS)}, as another source has"
            )
        opened[name] = open_images(name, source, cfg.validation_fraction)
    first, *others = opened.values()
    for other in others:
        if other.classes != first.classes:
            raise InputError(
                f"sources.{other.name}: got other classes than sources.{first.name}, expected the "
                "same"
            )
    return opened


def _encoders(cfg: DataConfig, tokenizer: Tokenizer) -> dict[str, Encoder]:
    """What makes tokens of the documents: of texts, and of conversations if there are some."""
    encoders: dict[str, Encoder] = {"text": TextEncoder(tokenizer)}
    if has_chat(cfg):
        template = load_chat_template(cfg.tokenizer, cfg.chat_template)
        encoders[chat.KIND] = chat.ChatEncoder(tokenizer, template, cfg.chat_answers)
    return encoders


def has_chat(cfg: DataConfig) -> bool:
    """Whether there are conversations among the sources."""
    return any(source.kind == chat.KIND for source in cfg.sources.values())


def _tokenized(
    source: Source,
    encoder: Encoder,
    validation_fraction: float,
    cache_dir: Place,
) -> Corpus:
    """`tokenize`, where the cache may be in a bucket: then it is on this machine as well."""
    if not is_bucket(cache_dir):
        return tokenize(
            source,
            encoder,
            validation_fraction,
            Path(cache_dir),
        )
    here = bucket_cache.local_folder(_user_cache(), cache_dir)
    name = cache_name(source, encoder, validation_fraction)
    bucket_cache.fetch(here / name, cache_dir / name, logging.info)
    corpus = tokenize(
        source,
        encoder,
        validation_fraction,
        here,
    )
    bucket_cache.store(here / name, cache_dir / name)
    return corpus


def _require_disjoint(corpora: Mapping[str, Corpus], validation_fraction: float) -> None:
    """InputError if one source trains on a document that another one holds out.

    The hash of its text puts a document on one side in all sources; only the exceptions of small
    sources can contradict that.
    """
    for exceptional, other in itertools.permutations(corpora.values(), 2):
        exception = exceptional.exception
        if exception is None or exception.document not in other.document_hashes():
            continue
        there = side_of(exception.document, validation_fraction, other.exception)
        if there != exception.side:
            raise InputError(
                f"sources.{exceptional.name}: is so small that a document of it had to change "
                f"sides, and sources.{other.name} holds the same document: it would be trained on "
                "and held out; leave it out of one of them, or give a larger source"
            )


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
        windows = [_windows(corpus, split, cfg, model) for corpus in opened.values()]
        order = grain.MapDataset.concatenate(windows).shuffle(seed=VALIDATION_SEED)
        return Block(_for_task(order, split, cfg, model, VALIDATION_SEED), batch_size, rows)
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
            shuffled = _windows(corpus, split, cfg, model).shuffle(seed=source_seed)
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
    return Block(_for_task(order, split, cfg, model, seed), batch_size, rows)


def _for_task(
    order: grain.MapDataset[Any],
    split: Split,
    cfg: DataConfig,
    model: ModelConfig | None,
    seed: int,
) -> grain.MapDataset[Batch]:
    """The rows as the model's task has them: masked, or images as patches.

    Every row of the global order has random numbers of its own: they are new in each epoch, and the
    same for any number of processes.
    """
    if model is None or model.task == "lm":
        return order
    if model.task == "masked_lm":
        tokenizer = load_tokenizer(cfg.tokenizer, cfg.end_of_document)
        return order.random_map(MaskTokens(cfg.masking, tokenizer), seed=seed)
    if split == "train" and (cfg.images.crop_padding or cfg.images.flip):
        change = functools.partial(augmented, config=cfg.images)
        order = order.random_map(change, seed=seed)
    to_row = functools.partial(
        row_of_image,
        patches=model.patches,
        config=cfg.images,
    )
    return order.map(to_row)


def _windows(
    corpus: AnyCorpus,
    split: Split,
    cfg: DataConfig,
    model: ModelConfig | None,
) -> grain.MapDataset[Any]:
    """The rows of a source: windows of its stream, packed conversations, or its images."""
    if isinstance(corpus, ImageCorpus):
        if model is None or model.task != "classify":
            raise ValueError("model: got another task, expected 'classify' for images")
        if len(corpus.classes) > model.vocab_size:
            raise InputError(
                f"config.model.vocab_size: got {model.vocab_size}, expected at least the "
                f"{len(corpus.classes)} classes of sources.{corpus.name}"
            )
        return corpus.examples(split, model.patches, cfg.images)
    seq_len = cfg.seq_len
    tokens, document_ends = corpus.stream(split)
    if corpus.kind != chat.KIND:
        return Windows(tokens, document_ends, seq_len)
    rows = chat.Conversations(tokens, document_ends, seq_len)
    if rows.cut:
        logging.warning(
            "%s",
            printable(
                f"sources.{corpus.name}: {rows.cut:,} of {len(document_ends):,} conversations for "
                f"{split} are longer than data.seq_len = {seq_len}, and are cut"
            ),
        )
    return rows


class BatchIterator(Iterator[Batch]):
    """Global batches in order.

    `next_index`, the row of the global order that comes next, is the whole state, with the places
    of streams where there are some: `batches(dataset, next_index, places)` goes on from here, also
    for a dataset of another batch size.
    """

    def __init__(
        self,
        iterator: Iterator[Batch],
        next_index: int,
        batch_size: int,
        places: Callable[[], Mapping[str, State]] = dict,
    ):
        self._iterator = iterator
        self._batch_size = batch_size
        self._places = places
        self.next_index = next_index

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self.next_index += self._batch_size
        return batch

    def places(self) -> dict[str, State]:
        """Where each stream goes on, by the name of its source; {} without streams."""
        return dict(self._places())


def batches(
    dataset: Block | StreamedBlock,
    start: int = 0,
    places: Mapping[str, State] | None = None,
    *,
    num_threads: int = 1,
    prefetch: int = 4,
) -> BatchIterator:
    """Iterates over global batches; they are the same for any number of threads.

    Args:
      dataset: of `make_dataset` or `recall_dataset`.
      start: the row of the global order that the first batch begins with.
      places: where streams go on (`BatchIterator.places`); they begin anew where none is given.
      num_threads: that read ahead; 0 reads in the caller's thread.
      prefetch: batches that are read ahead.

    Returns:
      The iterator, which also says the row that comes next.

    Raises:
      ValueError: a negative start.
      InputError: a stream cannot be read, or the place in it is none.
    """
    if start < 0:
        raise ValueError(f"start: got {start}, expected at least 0")
    if isinstance(dataset, StreamedBlock):
        read = StreamedBatches(dataset, start, places or {})
        # A stream has one reader: documents come one after another.
        ahead = ReadAhead(read, prefetch) if num_threads and prefetch else read
        return BatchIterator(
            ahead,
            start,
            dataset.batch_size,
            ahead.places,
        )
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0
    )
    blocks = dataset.between(start) if start else dataset
    iterator = iter(blocks.to_iter_dataset(options))
    return BatchIterator(iterator, blocks.first_row, dataset.batch_size)


def validation_text(cfg: DataConfig) -> bytes:
    """The validation documents of all sources one after another, UTF-8.

    This is the text whose bits per byte are reported.
    """
    texts = []
    for corpus in corpora(cfg).values():
        if isinstance(corpus, ImageCorpus):
            raise InputError(f"sources.{corpus.name}: holds images, expected text")
        texts.append(corpus.validation_text())
    return b"".join(texts)


def _cache_dir(cfg: DataConfig) -> Place:
    if not cfg.cache_dir:
        return _user_cache()
    place = expand_place(cfg.cache_dir, "config.data.cache_dir")
    return place if is_bucket(place) else place.absolute()


def _user_cache() -> Path:
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expand(user_cache, "config.data.cache_dir, XDG_CACHE_HOME") / "gatedjax"


def _source_seed(seed: int, name: str) -> int:
    """A seed of its own for each source.

    grain's epochs count on from the seed, so sources with neighboring seeds would have orders in
    common.
    """
    entropy = [seed % (1 << 64), zlib.crc32(name.encode())]
    state = np.random.SeedSequence(entropy).generate_state(1)
    return int(state[0])
