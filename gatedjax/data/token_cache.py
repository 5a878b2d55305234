"""Tokenize a source once, into files that are complete or absent.

A cache is a folder named by a fingerprint of all that its content depends on. It is written beside
its final place and renamed when complete: a reader never sees half a cache, and a crashed writer
leaves nothing that is ever read. For each split the folder holds

  SPLIT.tokens     the stream: every document's tokens and an end-of-document token,
                   uint16 or uint32
  SPLIT.ends.npy   int64: the offset behind each document
  SPLIT.txt        the text itself, UTF-8 (validation only: other compressors are measured on the
                   very same bytes)

and meta.json the counts.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from absl import logging

from gatedjax.data.corpus import Corpus, SplitInfo
from gatedjax.data.sources import Source
from gatedjax.data.splits import SPLITS, Split, labeled_documents
from gatedjax.data.tokenizer import Tokenizer
from gatedjax.errors import InputError

FORMAT = 1  # of the cache: a change of the files' layout counts it up
ENCODE_CHARACTERS = 1 << 22  # documents are tokenized together up to this much text


def tokenize(
    source: Source,
    tokenizer: Tokenizer,
    validation_fraction: float,
    cache_dir: Path,
) -> Corpus:
    """The corpus of `source`, from `cache_dir` if it is there, else written to it.

    A document is in the validation split if the hash of its key (relative path and row) falls below
    `validation_fraction`, so a document's split does not depend on the others; but both splits get
    at least one document, and a source of one document is cut in two at a line end.

    Args:
      source: the text.
      tokenizer: what turns it into ids.
      validation_fraction: about how much of the documents is held out.
      cache_dir: the folder of all caches, made if it does not exist.

    Returns:
      The corpus, complete on disk.

    Raises:
      InputError: text that cannot be read, an empty split, a cache folder that cannot be written or
        is damaged.
    """
    fingerprint = _fingerprint(source, tokenizer, validation_fraction)
    folder = cache_dir / f"{source.kind}-{fingerprint[:16]}"
    try:
        if not folder.is_dir():
            cache_dir.mkdir(parents=True, exist_ok=True)
            with _lock(cache_dir / f".{folder.name}.lock") as is_alone:
                if is_alone:
                    _remove_leftovers(folder)
                # Another process may have built it while this one waited for the lock.
                if not folder.is_dir():
                    _build(folder, source, tokenizer, validation_fraction)
    except OSError as e:
        reason = f"cannot be written ({e.strerror or e})"
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "no space left"
        raise InputError(
            f"cache_dir: {cache_dir}: {reason}; nothing was kept of source {source.name!r}"
        ) from None
    return _open(folder, source.name)


def _fingerprint(source: Source, tokenizer: Tokenizer, validation_fraction: float) -> str:
    """A digest of all that the content of a cache depends on."""
    text = [source.kind, str(source.root), source.field, source.listing()]
    depends_on = [FORMAT, text, tokenizer.fingerprint, validation_fraction]
    # File names may hold bytes that are not UTF-8.
    data = json.dumps(depends_on).encode(errors="surrogateescape")
    return hashlib.sha256(data).hexdigest()


def _build(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    validation_fraction: float,
) -> None:
    """Writes the cache beside `folder` and renames it into place.

    Whatever goes wrong, nothing is left behind.
    """
    prefix = _partial_prefix(folder)
    partial = prefix.with_name(prefix.name + uuid.uuid4().hex[:8])
    logging.info(
        "tokenizing source %s with %s into %s",
        source.name,
        tokenizer.name,
        folder,
    )
    try:
        partial.mkdir()
        meta = _write(partial, source, tokenizer, validation_fraction)
        (partial / "meta.json").write_text(json.dumps(meta, indent=1))
        _sync(partial)
        os.rename(partial, folder)
    except OSError:
        # If the folder is there, another machine was first, with the same content.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(
    partial: Path,
    source: Source,
    tokenizer: Tokenizer,
    validation_fraction: float,
) -> dict:
    """Tokenizes everything into the folder `partial`; returns what goes into meta.json."""
    digest = hashlib.sha256()
    skipped = 0
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    with contextlib.ExitStack() as stack:
        writers = {}
        for split in SPLITS:
            writer = _SplitWriter(partial, split, tokenizer, dtype)
            writers[split] = stack.enter_context(writer)
        for text, is_validation in labeled_documents(source, validation_fraction):
            if text is None:
                skipped += 1
                continue
            if not text:
                continue  # an empty document has nothing to predict
            text, data = _utf8(text)
            digest.update(data + b"\0")
            split = "validation" if is_validation else "train"
            writers[split].add(text, data)
        splits = {split: writer.finish() for split, writer in writers.items()}
    _require_text_in_each(splits, skipped, source)
    return {
        "kind": source.kind,
        "documents": sum(split.documents for split in splits.values()),
        "bytes": sum(split.bytes for split in splits.values()),
        "sha256": digest.hexdigest(),
        "skipped": skipped,
        "tokenizer": tokenizer.name,
        "dtype": dtype,
        "splits": {name: asdict(split) for name, split in splits.items()},
    }


def _require_text_in_each(splits: Mapping[Split, SplitInfo], skipped: int, source: Source) -> None:
    total = sum(split.documents for split in splits.values())
    left_out = f", {skipped} files that are not UTF-8" if skipped else ""
    for name, split in splits.items():
        if split.tokens == 0:
            raise InputError(
                f"sources.{source.name}: no text for the {name} split: "
                f"{total} documents{left_out} in {source.root}"
            )


class _SplitWriter:
    """Appends the documents of one split to its files."""

    def __init__(
        self,
        folder: Path,
        split: str,
        tokenizer: Tokenizer,
        dtype: str,
    ):
        self._folder = folder
        self._split = split
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._pending: list[str] = []  # documents that are not tokenized yet
        self._pending_characters = 0
        self._bytes = 0
        self._tokens = 0
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
        self._bytes += len(data)
        self._pending.append(text)
        self._pending_characters += len(text)
        if self._text_file is not None:
            self._text_file.write(data)
        if self._pending_characters > ENCODE_CHARACTERS:
            self._flush()

    def finish(self) -> SplitInfo:
        """Writes what is pending; returns the counts."""
        self._flush()
        ends = np.asarray(self._ends, np.int64)
        np.save(self._folder / f"{self._split}.ends.npy", ends, allow_pickle=False)
        return SplitInfo(documents=len(ends), bytes=self._bytes, tokens=self._tokens)

    def _flush(self) -> None:
        end_of_document = np.asarray([self._tokenizer.eos_id], self._dtype).tobytes()
        for ids in self._tokenizer.encode_batch(self._pending):
            data = ids.astype(self._dtype).tobytes()
            self._token_file.write(data + end_of_document)
            self._tokens += len(ids) + 1
            self._ends.append(self._tokens)
        self._pending = []
        self._pending_characters = 0


def _utf8(text: str) -> tuple[str, bytes]:
    """The text and its UTF-8 bytes.

    A lone surrogate, which JSON can spell and UTF-8 cannot, becomes "?".
    """
    try:
        return text, text.encode()
    except UnicodeEncodeError:
        data = text.encode(errors="replace")
        return data.decode(), data


def _open(folder: Path, name: str) -> Corpus:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        splits = {}
        for split, counts in meta.pop("splits").items():
            splits[split] = SplitInfo(**counts)
            _require_whole(
                folder,
                split,
                splits[split],
                meta["dtype"],
            )
        return Corpus(name=name, splits=splits, path=folder, **meta)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"cache_dir: {folder} is damaged ({e}); delete it") from None


def _require_whole(
    folder: Path,
    split: str,
    info: SplitInfo,
    dtype: str,
) -> None:
    """Checks the lengths of a split's files.

    Args:
      folder: the cache.
      split: its name.
      info: its counts, from meta.json.
      dtype: of the token file.

    Raises:
      ValueError: a file is not as long as `info` says.
    """
    token_bytes = (folder / f"{split}.tokens").stat().st_size
    if token_bytes != info.tokens * np.dtype(dtype).itemsize:
        raise ValueError(f"{split}.tokens does not hold {info.tokens} tokens")
    ends = np.load(folder / f"{split}.ends.npy", mmap_mode="r", allow_pickle=False)
    if len(ends) != info.documents:
        raise ValueError(f"{split}.ends.npy does not hold {info.documents} documents")
    if split == "validation":
        text_bytes = (folder / "validation.txt").stat().st_size
        if text_bytes != info.bytes:
            raise ValueError(f"validation.txt does not hold {info.bytes} bytes")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """One writer per machine: the processes of a host tokenize once, the others wait for it.

    Yields whether the lock is held: some file systems have none. Then several may write at once,
    which costs time and nothing else: correctness rests on the rename. The lock file stays; the
    lock ends with the process that holds it.
    """
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            is_held = True
        except OSError:
            is_held = False
        yield is_held


def _partial_prefix(folder: Path) -> Path:
    """How the names of all caches begin that this machine is writing for `folder`."""
    return folder.with_name(f".{folder.name}.{socket.gethostname()}.partial-")


def _remove_leftovers(folder: Path) -> None:
    """Removes the partial caches of this machine; the lock says that no writer is at work."""
    prefix = _partial_prefix(folder)
    for path in prefix.parent.iterdir():
        if path.name.startswith(prefix.name):
            shutil.rmtree(path, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Data reaches the disk before the name does."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
