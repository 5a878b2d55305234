"""From text to batches.

The way of the data, by files: sources -> tokenizer -> token_cache -> open_corpora -> source_rows
(windows, cut by batch) -> blocks -> pipeline (`make_dataset`) -> batch_iterator.
"""

from gatedjax.data.batch import Batch
from gatedjax.data.batch_iterator import BatchIterator, batches
from gatedjax.data.chat_template import ChatTemplate, load_chat_template
from gatedjax.data.corpus import Corpus, SplitInfo
from gatedjax.data.images import ImageCorpus
from gatedjax.data.masking import mask_id
from gatedjax.data.open_corpora import corpora, has_chat, image_corpora, validation_text
from gatedjax.data.pipeline import make_dataset
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
