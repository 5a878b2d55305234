"""Text to token ids and back: bytes, or any `tokenizer.json`.

A tokenizer here has `name`, `vocab_size`, `eos_id` (closes every document), `fingerprint` (changes
whenever the ids could), `encode_batch`, `encode` and `decode`. `encode` adds no special token.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from gatedjax.errors import InputError
from gatedjax.files import read_plain
from gatedjax.paths import expand

# Token ids are int32 in a batch.
LARGEST_VOCABULARY = 2**31 - 1
# The largest published ones have some 40 MB.
LARGEST_TOKENIZER_FILE = 1 << 28

# The usual names of the token that ends a document; the first one that a file has is taken.
EOS_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
)

TokenIds = Sequence[int | np.integer] | np.ndarray


@runtime_checkable
class Tokenizer(Protocol):
    """What the data pipeline and sampling ask of a tokenizer."""

    name: str
    vocab_size: int
    eos_id: int
    fingerprint: str

    def encode(self, text: str) -> Int32[np.ndarray, "tokens"]: ...

    def encode_batch(self, texts: list[str]) -> list[Int32[np.ndarray, "_"]]: ...

    def decode(self, ids: TokenIds) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes, ids 0..255, and 256 for the end of a document. Lossless."""

    name = "bytes"
    vocab_size = 257
    eos_id = 256
    fingerprint = "bytes-1"

    def encode(self, text: str) -> Int32[np.ndarray, "tokens"]:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_batch(self, texts: list[str]) -> list[Int32[np.ndarray, "_"]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: TokenIds) -> str:
        """The text of `ids`.

        Half a character becomes U+FFFD. Ids that are no byte (the end of a document, the padding
        of a vocabulary) are dropped.
        """
        ids = np.asarray(ids, np.int64)
        is_byte = (ids >= 0) & (ids < 256)
        data = ids[is_byte].astype(np.uint8).tobytes()
        return data.decode(errors="replace")


class JsonTokenizer:
    """A `tokenizer.json` of the tokenizers library.

    Special tokens spelled out in a document are read as plain text: a document cannot forge its own
    end. `decode` leaves special tokens out. Whether decode(encode(text)) is text is up to the file
    (normalizers lose information).

    Raises:
      InputError: the file is missing, is not a tokenizer.json, or has no token among `EOS_NAMES`.
    """

    def __init__(self, path: str):
        try:
            import tokenizers
        except ImportError:
            raise InputError(
                "tokenizer: a file needs the tokenizers library: pip install 'gatedjax[data]'"
            ) from None
        data = _bytes_of_file(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # bare Exception, and BaseException where its Rust panics
            raise InputError(f"tokenizer: {path!r} is not a tokenizer.json ({e})") from None

        # The file may ask for either; a document is encoded whole and alone.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True

        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        eos_names = [name for name in EOS_NAMES if name in vocabulary]
        if not eos_names:
            raise InputError(
                f"tokenizer: {path!r} has no end-of-document token; "
                f"expected one of {', '.join(EOS_NAMES)}"
            )
        self.name = Path(path).name
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have holes
        if self.vocab_size > LARGEST_VOCABULARY:
            expected = f"at most {LARGEST_VOCABULARY:,}"
            raise InputError(
                f"tokenizer: {path!r} has ids to {self.vocab_size - 1:,}, expected {expected}"
            )
        self.eos_id = vocabulary[eos_names[0]]
        self.fingerprint = "json-1-" + hashlib.sha256(data).hexdigest()
        # The file itself: a run keeps a copy (`training.identity`).
        self.data = data

    def encode(self, text: str) -> Int32[np.ndarray, "tokens"]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[Int32[np.ndarray, "_"]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: TokenIds) -> str:
        """The text of `ids`, without special tokens and ids outside the vocabulary."""
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=True)


def _bytes_of_file(path: str) -> bytes:
    try:
        return read_plain(expand(path, "tokenizer"), LARGEST_TOKENIZER_FILE)
    except OSError as e:
        raise InputError(
            f"tokenizer: {path!r} cannot be read ({e.strerror or e}); expected 'bytes' or a file"
        ) from None


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that a configuration names: "bytes", or the path of a `tokenizer.json`."""
    if spec == "bytes":
        return ByteTokenizer()
    return JsonTokenizer(spec)
