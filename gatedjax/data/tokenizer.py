"""Text to token ids and back: bytes, or any `tokenizer.json`, here or on the Hugging Face hub.

A tokenizer here has `name`, `vocab_size`, `eos_id` (closes every document), `fingerprint` (changes
whenever the ids could), `encode_batch`, `encode` and `decode`. `encode` adds no special token.
`encode_marked` is for text that a chat template made: special tokens in it are recognized.
"""

import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32

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
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

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


class Marked(NamedTuple):
    """The ids of a text, and the characters that each stands for.

    begins, ends: of the first of them, and behind the last.
    """

    ids: Int32[np.ndarray, "tokens"]
    begins: Int[np.ndarray, "tokens"]
    ends: Int[np.ndarray, "tokens"]


@runtime_checkable
class Tokenizer(Protocol):
    """What the data pipeline and sampling ask of a tokenizer."""

    name: str
    vocab_size: int
    eos_id: int
    fingerprint: str

    @property
    def special_tokens(self) -> tuple[str, ...]: ...

    def encode(self, text: str) -> Int32[np.ndarray, "tokens"]: ...

    def encode_batch(self, texts: list[str]) -> list[Int32[np.ndarray, "_"]]: ...

    def encode_marked(self, texts: list[str]) -> list[Marked]: ...

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

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """None is spelled out in text."""
        return ()

    def encode_marked(self, texts: list[str]) -> list[Marked]:
        """The bytes of each text, and whose they are."""
        marked = []
        for text in texts:
            sizes = [len(character.encode()) for character in text]
            begins = np.repeat(np.arange(len(text)), sizes)
            marked.append(Marked(self.encode(text), begins, begins + 1))
        return marked

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

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """As they are spelled."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special)

    def encode_marked(self, texts: list[str]) -> list[Marked]:
        """The ids of texts in which special tokens are what they say: of a chat template."""
        marked = []
        for encoding in self._recognizing.encode_batch(texts, add_special_tokens=False):
            offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
            ids = np.asarray(encoding.ids, np.int32)
            marked.append(Marked(ids, offsets[:, 0], offsets[:, 1]))
        return marked

    @functools.cached_property
    def _recognizing(self) -> Any:
        """The tokenizer that reads special tokens as such."""
        # Not a switch of the other one: another thread may be encoding with it.
        recognizing = type(self._tokenizer).from_buffer(self.data)
        recognizing.no_truncation()
        recognizing.no_padding()
        return recognizing

    def decode(self, ids: TokenIds) -> str:
        """The text of `ids`, without special tokens and ids outside the vocabulary."""
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def token_id(self, name: str) -> int | None:
        """The id of a token by its name; None if there is none."""
        return self._tokenizer.token_to_id(name)

    def is_special(self, token: int) -> bool:
        """Whether it is a token without a text of its own."""
        added = self._tokenizer.get_added_tokens_decoder().get(token)
        return added is not None and added.special

    def start_ids(self) -> list[int]:
        """The special tokens that the file puts before every text, such as `<s>`."""
        encoding = self._recognizing.encode("a", add_special_tokens=True)
        start = []
        for token, is_added in zip(encoding.ids, encoding.special_tokens_mask):
            if not is_added:
                break
            start.append(token)
        return start


def _bytes_of_file(spec: str) -> bytes:
    place = expand_place(spec, "tokenizer")
    if is_bucket(place):
        with buckets.errors(f"tokenizer: {spec!r} cannot be read", place):
            return buckets.read(place, LARGEST_TOKENIZER_FILE)
    path = Path(place)
    if path.is_dir():
        path = path / FILE_NAME
    elif not path.exists() and HUB_NAME.fullmatch(spec):
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
