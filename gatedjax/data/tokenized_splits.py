"""The documents of a source, tokenized into the files of a cache that is not in its place yet."""

import contextlib
import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gatedjax.data.corpus import SplitInfo
from gatedjax.data.encoders import Encoder
from gatedjax.data.sources import Source
from gatedjax.data.splits import (
    SPLITS,
    Splitter,
    content_hash,
)

ENCODE_CHARACTERS = 1 << 22  # documents are tokenized together up to this much text


def write_splits(
    partial: Path,
    source: Source,
    encoder: Encoder,
    splitter: Splitter,
) -> dict[str, Any]:
    """Tokenizes everything into the folder `partial`; returns what goes into meta.json."""
    digest = hashlib.sha256()
    hashes = []
    skipped = 0
    with contextlib.ExitStack() as stack:
        writers = {}
        for split in SPLITS:
            writer = _SplitWriter(partial, split, encoder)
            writers[split] = stack.enter_context(writer)
        for text in source.texts():
            if text is None:
                skipped += 1
                continue
            if not text:
                continue  # an empty document has nothing to predict
            text, data = utf8(text)
            digest.update(data + b"\0")
            hashes.append(content_hash(data))
            for split, part, part_data in splitter.parts(text, data):
                if part:
                    writers[split].add(part, part_data)
        splits = {split: writer.finish() for split, writer in writers.items()}
    np.save(partial / "documents.npy", np.asarray(hashes, np.uint64), allow_pickle=False)
    exception = splitter.exception
    return {
        "kind": source.kind,
        "documents": sum(split.documents for split in splits.values()),
        "bytes": sum(split.bytes for split in splits.values()),
        "sha256": digest.hexdigest(),
        "skipped": skipped,
        "tokenizer": encoder.name,
        "dtype": encoder.dtype,
        "splits": {name: asdict(split) for name, split in splits.items()},
        "exception": None if exception is None else asdict(exception),
    }


class _SplitWriter:
    """Appends the documents of one split to its files."""

    def __init__(self, folder: Path, split: str, encoder: Encoder):
        self._folder = folder
        self._split = split
        self._encoder = encoder
        self._pending: list[str] = []  # documents that are not tokenized yet
        self._pending_characters = 0
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._tokens = 0
        self._targets = 0
        self._ends: list[int] = []

    def __enter__(self) -> "_SplitWriter":
        self._token_file = open(self._folder / f"{self._split}.tokens", "wb")
        self._text_file = None
        if self._split == "validation":
            self._text_file = open(self._folder / f"{self._split}.txt", "wb")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._token_file.close()
        if self._text_file is not None:
            self._text_file.close()

    def add(self, text: str, data: bytes) -> None:
        """A document, and the same in UTF-8."""
        self._digest.update(data + b"\0")
        self._pending.append(text)
        self._pending_characters += len(text)
        if self._pending_characters > ENCODE_CHARACTERS:
            self._flush()

    def finish(self) -> SplitInfo:
        """Writes what is pending; returns the counts."""
        self._flush()
        ends = np.asarray(self._ends, np.int64)
        np.save(self._folder / f"{self._split}.ends.npy", ends, allow_pickle=False)
        return SplitInfo(
            documents=len(ends),
            bytes=self._bytes,
            tokens=self._tokens,
            targets=self._targets,
            sha256=self._digest.hexdigest(),
        )

    def _flush(self) -> None:
        for encoded in self._encoder.encode(self._pending):
            self._token_file.write(encoded.stream.astype(self._encoder.dtype).tobytes())
            if self._text_file is not None:
                self._text_file.write(encoded.text)
            self._bytes += len(encoded.text)
            self._targets += encoded.targets
            self._tokens += len(encoded.stream)
            self._ends.append(self._tokens)
        self._pending = []
        self._pending_characters = 0


def utf8(text: str) -> tuple[str, bytes]:
    """The text and its UTF-8 bytes.

    A lone surrogate, which JSON can spell and UTF-8 cannot, becomes "?".
    """
    try:
        return text, text.encode()
    except UnicodeEncodeError:
        data = text.encode(errors="replace")
        return data.decode(), data
