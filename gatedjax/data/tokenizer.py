"""Text to token ids and back: bytes, or any `tokenizer.json`, here or on the Hugging Face hub.

A tokenizer here has `name`, `vocab_size`, `eos_id` (closes every document), `fingerprint` (changes
whenever the ids could), `encode_batch`, `encode` and `decode`. `encode` adds no special token.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from gatedjax import buckets
from gatedjax.errors import InputError
from gatedjax.files import read_plain
from gatedjax.paths import expand_place, is_bucket

# Token ids are int32 in a batch.
LARGEST_VOCABULARY = 2**31 - 1
# The largest published ones have some 40 MB.
LARGEST_TOKENIZER_FILE = 1 << 28

FILE_NAME = "tokenizer.json"
# REPOSITORY or OWNER/REPOSITORY.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

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
      InputError: the file is missing, is not a tokenizer.json, or has no such token.
    """

    def __init__(self, path: str, end_of_document: str = ""):
        """Reads the file.

        Args:
          path: of a tokenizer.json, of a folder with one, or a name on the hub.
          end_of_document: the token; "" for the first of `EOS_NAMES` that the file has.
        """
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
        wanted = [end_of_document] if end_of_document else EOS_NAMES
        eos_names = [name for name in wanted if name in vocabulary]
        if not eos_names and end_of_document:
            raise InputError(f"end_of_document: {path!r} has no token {end_of_document!r}")
        if not eos_names:
            raise InputError(
                f"tokenizer: {path!r} has no end-of-document token; expected one of "
                f"{', '.join(EOS_NAMES)}, or its name as end_of_document"
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
        usual = [name for name in EOS_NAMES if name in vocabulary]
        if eos_names != usual[:1] and end_of_document:
            # Another end is another stream of tokens.
            self.fingerprint += f"-{self.eos_id}"
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


def _bytes_of_file(spec: str) -> bytes:
    place = expand_place(spec, "tokenizer")
    if is_bucket(place):
        with buckets.errors(f"tokenizer: {spec!r} cannot be read", place):
            return buckets.read(place, LARGEST_TOKENIZER_FILE)
    path = Path(place)
    if path.is_dir():
        path = path / FILE_NAME
    elif not path.exists() and _HUB_NAME.fullmatch(spec):
        path = _downloaded(spec)
    try:
        return read_plain(path, LARGEST_TOKENIZER_FILE)
    except OSError as e:
        raise InputError(
            f"tokenizer: {spec!r} cannot be read ({e.strerror or e}); expected 'bytes', a file or "
            "a name on the hub"
        ) from None


def _downloaded(name: str) -> Path:
    """The tokenizer.json of a repository on the hub, from the user's cache or downloaded now.

    Raises:
      InputError: there is none, or nobody answers.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            f"tokenizer: no file {name!r} here, and a name on the hub needs the huggingface_hub "
            "library: pip install 'gatedjax[data]'"
        ) from None
    try:
        return Path(huggingface_hub.hf_hub_download(name, FILE_NAME))
    except Exception as e:  # the library's own errors, and those of its connections
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise InputError(
            f"tokenizer: no file {name!r} here, and not to be had from the hub ({reason})"
        ) from None


def load_tokenizer(spec: str, end_of_document: str = "") -> Tokenizer:
    """The tokenizer that a configuration names.

    Args:
      spec: "bytes", the path of a `tokenizer.json` or of its folder, or a name on the hub.
      end_of_document: its token for that; "" for the first of `EOS_NAMES` that it has.

    Raises:
      InputError: there is none, or it has no such token.
    """
    if spec == "bytes":
        if end_of_document:
            raise InputError(
                f"end_of_document: got {end_of_document!r}, expected '' for tokenizer 'bytes'"
            )
        return ByteTokenizer()
    return JsonTokenizer(spec, end_of_document)
