"""Text that is read while the model trains: Hugging Face `datasets` in streaming mode (kind hf).

Nothing is downloaded as a whole, tokenized beforehand or cached. Documents come in the order of the
dataset, pass after pass; the tokens of one after another are cut into rows as those of any source
(`batch`). Every process reads the same stream, makes the same rows and keeps its own: so the
batches are the same on any number of processes.

Documents are read in groups. A place in the stream is the library's own state before a group
(`IterableDataset.state_dict`), which document of the group comes next and how much of it has been
given; a checkpoint keeps it, and whoever goes on reads that group again.

What is held out is read once, when a run starts: the first documents of a split. A document of the
same text is left out of training, wherever it stands in the stream.
"""

import hashlib
from collections import deque
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Int, Int32

from gatedjax.config import SourceConfig, StreamConfig
from gatedjax.data.batch import Batch, row_of
from gatedjax.data.corpus import SplitInfo
from gatedjax.data.document_stream import KIND, Document, DocumentStream, State
from gatedjax.data.formats import one_line
from gatedjax.data.splits import Split
from gatedjax.data.tokenized_splits import ENCODE_CHARACTERS
from gatedjax.data.tokenizer import Tokenizer
from gatedjax.errors import InputError, require

# Documents that are read together where they are not shuffled.
GROUP = 256
# Training documents whose text tells one stream from another.
TELLING_DOCUMENTS = 16

# What this process has read of streams, by all that it depends on.
_held_out: dict[tuple[str, SourceConfig, str], "StreamedCorpus"] = {}


@dataclass(frozen=True)
class StreamedCorpus:
    """What is known of a stream before it is read: the documents that it holds out.

    hashes: of these documents.
    telling: sha256 of the first documents that are trained on.
    """

    name: str
    source: SourceConfig
    tokenizer: str
    splits: dict[Split, SplitInfo]
    hashes: frozenset[int]
    telling: str
    text: bytes
    tokens: Int32[np.ndarray, "stream"]
    ends: Int[np.ndarray, "documents"]

    @property
    def kind(self) -> str:
        return KIND

    @property
    def sha256(self) -> str:
        """Of all that has been read."""
        both = self.splits["validation"].sha256 + self.telling
        return hashlib.sha256(both.encode()).hexdigest()

    def describe(self) -> str:
        """One line for the log."""
        stream = self.source.stream
        info = self.splits["validation"]
        subset = f", {stream.subset}" if stream.subset else ""
        order = "in its order"
        if stream.shuffle_documents:
            order = f"shuffled by {stream.shuffle_documents:,} documents"
        held_out = (
            f"{info.documents:,} documents of {stream.validation_split or stream.split} held out, "
            f"{info.tokens:,} tokens ({info.bytes_per_token:.3f} bytes each)"
        )
        return (
            f"{self.name}: {KIND}, streaming {self.source.path}{subset}, split {stream.split} "
            f"{order}, without a token cache; {self.tokenizer}: {held_out}"
        )

    def text_hashes(self) -> dict[str, str]:
        """What tells the text from another, by split."""
        return {"train": self.telling, "validation": self.splits["validation"].sha256}

    def stream(
        self, split: Split
    ) -> tuple[Int32[np.ndarray, "stream"], Int[np.ndarray, "documents"]]:
        """The tokens of what is held out, and the offset behind each document."""
        assert split == "validation", "training text is read by StreamReader"
        return self.tokens, self.ends

    def validation_text(self) -> bytes:
        """The documents that are held out one after another, UTF-8."""
        return self.text


def streamed_corpus(name: str, cfg: SourceConfig, tokenizer: Tokenizer) -> StreamedCorpus:
    """Reads what a stream holds out, once in the life of a process.

    Raises:
      InputError: it cannot be read, or has no text to hold out.
    """
    key = (name, cfg, tokenizer.fingerprint)
    if key not in _held_out:
        _held_out[key] = _read_corpus(name, cfg, tokenizer)
    return _held_out[key]


def _read_corpus(name: str, cfg: SourceConfig, tokenizer: Tokenizer) -> StreamedCorpus:
    stream = cfg.stream
    split = stream.validation_split or stream.split
    documents = DocumentStream(name, cfg, split)
    _, held_out = documents.read(stream.validation_documents)
    if not held_out:
        raise InputError(f"sources.{name}: split {split!r} has no text to hold out")
    hashes = frozenset(document.hash for document in held_out)
    training = DocumentStream(name, cfg, stream.split)
    _skip_held_out(training, stream)
    _, first = training.read(TELLING_DOCUMENTS)
    encoded = _encoded(tokenizer, [document.text for document in held_out])
    ends = np.cumsum([len(tokens) for tokens in encoded]).astype(np.int64)
    info = SplitInfo(
        documents=len(held_out),
        bytes=sum(document.size for document in held_out),
        tokens=int(ends[-1]),
        sha256=_sha256(held_out),
    )
    return StreamedCorpus(
        name=name,
        source=cfg,
        tokenizer=tokenizer.name,
        splits={"validation": info},
        hashes=hashes,
        telling=_sha256(first),
        text=b"".join(document.text.encode() for document in held_out),
        tokens=np.concatenate(encoded),
        ends=ends,
    )


def _skip_held_out(documents: DocumentStream, stream: StreamConfig) -> None:
    """At the beginning of a pass: what is held out stands before what is trained on."""
    if not stream.validation_split:
        documents.read(stream.validation_documents)


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> list[Int32[np.ndarray, "_"]]:
    """The tokens of each text and the end of a document."""
    end = np.asarray([tokenizer.eos_id], np.int32)
    return [np.concatenate([tokens, end]) for tokens in tokenizer.encode_batch(texts)]


def _sha256(documents: list[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.text.encode() + b"\0")
    return digest.hexdigest()


@dataclass(frozen=True)
class Place:
    """Where a stream goes on.

    dataset: the library's state before the group of documents.
    passes: over the dataset that are behind.
    group: number of the group in this pass.
    document: of the group, in the order in which its documents are given.
    token: of this document that comes next.
    hash: of this document, as a hexadecimal number.
    """

    dataset: State
    passes: int
    group: int
    document: int
    token: int
    hash: str


class StreamReader:
    """The training documents of a stream as rows [T], pass after pass, from any place in it.

    Raises:
      InputError: the stream cannot be read, or `state` is none of this stream.
    """

    def __init__(
        self,
        corpus: StreamedCorpus,
        tokenizer: Tokenizer,
        seq_len: int,
        seed: int,
        state: State | None = None,
    ):
        """Opens the stream.

        Args:
          corpus: what it holds out.
          tokenizer: for its documents.
          seq_len: T.
          seed: of the order of documents, where they are shuffled.
          state: of another reader, to go on from there, with rows of any length; None for the
            beginning.
        """
        self._corpus = corpus
        self._config = corpus.source.stream
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._seed = seed
        self._name = corpus.name
        self._stream = DocumentStream(corpus.name, corpus.source, self._config.split)
        # Documents of the group in the order in which they are given; the first ones have been
        # tokenized.
        self._group: list[Document] = []
        self._num_encoded = 0
        self._encoded: deque[np.ndarray] = deque()
        # The document that is being given, and how much of it has been.
        self._tokens = np.zeros(0, np.int32)
        self._given = 0
        self._document = -1
        if state is None:
            self._passes = 0
            self._begin_pass()
            self._next_document()
        else:
            self._go_to(state)

    def next_row(self) -> Batch:
        """The row that comes next."""
        # The first input: what ends a document stands before the next one, too.
        before = self._tokens[self._given - 1] if self._given else self._tokenizer.eos_id
        pieces = [np.asarray([before], np.int32)]
        begins = []
        missing = self._seq_len
        while missing:
            if self._given == len(self._tokens):
                self._next_document()
            if self._given == 0 and missing < self._seq_len:
                begins.append(self._seq_len - missing)
            piece = self._tokens[self._given : self._given + missing]
            pieces.append(piece)
            self._given += len(piece)
            missing -= len(piece)
        return row_of(np.concatenate(pieces), np.asarray(begins, np.int64), self._seq_len)

    def state(self) -> State:
        """The place in the stream, for another reader to go on from."""
        place = Place(
            dataset=self._before_group,
            passes=self._passes,
            group=self._group_number,
            document=self._document,
            token=self._given,
            hash=f"{self._group[self._document].hash:016x}",
        )
        return asdict(place)

    def _go_to(self, state: State) -> None:
        problem = f"sources.{self._name}: the checkpoint's place in the stream"
        try:
            place = Place(**state)
            self._passes = int(place.passes)
            self._stream.go_to(place.dataset)
            # One less: reading a group counts it.
            self._group_number = int(place.group) - 1
            is_there = self._read_group()
            self._document = int(place.document)
            self._given = int(place.token)
        except InputError:
            raise
        except Exception as error:  # the library's state has no form that we know
            raise InputError(f"{problem} is none ({one_line(error)})") from None
        is_there = is_there and 0 <= self._document < len(self._group)
        if not is_there or f"{self._group[self._document].hash:016x}" != place.hash:
            raise InputError(
                f"{problem} holds another document now: the dataset has changed; put the old one "
                "back, or begin anew"
            )
        self._num_encoded = self._document
        self._encode_more()
        self._tokens = self._encoded.popleft()
        require(
            0 <= self._given <= len(self._tokens),
            problem,
            self._given,
            f"a token of {len(self._tokens)}",
        )

    def _begin_pass(self) -> None:
        self._stream.rewind()
        _skip_held_out(self._stream, self._config)
        self._group_number = -1

    def _read_group(self) -> bool:
        """The next documents, in the order in which they are given; whether there are any.

        Of a group whose documents are all held out nothing is left; the next one is read.
        """
        count = self._config.shuffle_documents or GROUP
        while True:
            self._before_group = self._stream.state()
            rows, documents = self._stream.read(count)
            if not rows:
                return False
            self._group_number += 1
            self._group = [d for d in documents if d.hash not in self._corpus.hashes]
            if not self._group:
                continue
            if self._config.shuffle_documents:
                entropy = [self._seed, self._passes, self._group_number]
                order = np.random.default_rng(entropy).permutation(len(self._group))
                self._group = [self._group[i] for i in order]
            self._num_encoded = 0
            self._encoded.clear()
            self._document = -1
            return True

    def _next_document(self) -> None:
        self._document += 1
        if self._document >= len(self._group):
            if not self._read_group():
                self._passes += 1
                self._begin_pass()
                if not self._read_group():
                    raise InputError(
                        f"sources.{self._name}: split {self._config.split!r} has no text left to "
                        f"train on: {self._config.validation_documents:,} documents are held out; "
                        "give it fewer as stream.validation_documents, or another split as "
                        "stream.validation_split"
                    )
            self._document = 0
        if not self._encoded:
            self._encode_more()
        self._tokens = self._encoded.popleft()
        self._given = 0

    def _encode_more(self) -> None:
        """Tokenizes the documents of the group that come next, up to some amount of text."""
        texts = []
        characters = 0
        for document in self._group[self._num_encoded :]:
            texts.append(document.text)
            characters += len(document.text)
            if characters > ENCODE_CHARACTERS:
                break
        self._num_encoded += len(texts)
        self._encoded.extend(_encoded(self._tokenizer, texts))
