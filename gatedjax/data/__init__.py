"""From text to batches: sources -> tokenizer -> token_cache -> batch (windows) -> pipeline."""

from gatedjax.data.batch import Batch
from gatedjax.data.chat_template import ChatTemplate, load_chat_template
from gatedjax.data.corpus import Corpus, SplitInfo
from gatedjax.data.images import ImageCorpus
from gatedjax.data.masking import mask_id
from gatedjax.data.pipeline import (
    BatchIterator,
    batches,
    corpora,
    has_chat,
    image_corpora,
    make_dataset,
    validation_text,
)
from gatedjax.data.tokenizer import ByteTokenizer, JsonTokenizer, load_tokenizer

__all__ = [
    "Batch",
    "BatchIterator",
    "ByteTokenizer",
    "ChatTemplate",
    "Corpus",
    "ImageCorpus",
    "JsonTokenizer",
    "SplitInfo",
    "batches",
    "corpora",
    "has_chat",
    "image_corpora",
    "load_chat_template",
    "load_tokenizer",
    "make_dataset",
    "mask_id",
    "validation_text",
]
