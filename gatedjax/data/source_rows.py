"""The rows of a source, in order, and what a model's task makes of a row."""

import functools
from typing import Any

import grain
import numpy as np
from absl import logging
from jaxtyping import Int, Integer

from gatedjax.config import DataConfig, ModelConfig
from gatedjax.data import chat
from gatedjax.data.batch import Batch, cut_window, num_windows
from gatedjax.data.image_rows import augmented, row_of_image
from gatedjax.data.images import ImageCorpus
from gatedjax.data.masking import MaskTokens
from gatedjax.data.open_corpora import AnyCorpus
from gatedjax.data.splits import Split
from gatedjax.data.token_file import TokenFile
from gatedjax.data.tokenizer import load_tokenizer
from gatedjax.errors import InputError, printable


def rows_of_source(
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


def for_task(
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
