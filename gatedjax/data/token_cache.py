"""Tokenize a source once, into files that are complete or absent.

A cache is a folder named by a fingerprint of all that its content depends on. It is written beside
its final place and renamed when complete: a reader never sees half a cache, and a crashed writer
leaves nothing that is ever read. For each split the folder holds

  SPLIT.tokens     the stream: every document's tokens and an end-of-document token,
                   uint16 or uint32
  SPLIT.ends.npy   int64: the offset behind each document
  SPLIT.txt        the text itself, UTF-8 (validation only: other compressors are measured on the
                   very same bytes)

documents.npy, the hashes of all documents' texts, and meta.json: the counts, and a checksum of each
file. They are compared when a cache is opened, once per process; one that does not match (a flipped
bit, blocks of zeros after a crash) is built again. The checksum is CRC-32, which reads 7 GB/s from
memory: opening costs what the disk takes to read the cache once.
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
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from gatedjax.data.corpus import Corpus, SplitInfo
from gatedjax.data.encoders import Encoder
from gatedjax.data.sources import Source
from gatedjax.data.splits import (
    SPLITS,
    Exceptional,
    Split,
    Splitter,
    content_hash,
)
from gatedjax.errors import InputError, printable
from gatedjax.files import open_plain, read_plain

FORMAT = 2  # of the cache: a change of the files' layout counts it up
ENCODE_CHARACTERS = 1 << 22  # documents are tokenized together up to this much text
CHECKSUM_BYTES = 1 << 22  # read at a time
LARGEST_META = 1 << 20

# Caches that this process found whole: for each file its path, inode, size and time.
_verified: set[tuple[tuple[str, int, int, int], ...]] = set()


def tokenize(
    source: Source,
    encoder: Encoder,
    validation_fraction: float,
    cache_dir: Path,
) -> Corpus:
    """The corpus of `source`, from `cache_dir` if it is there, else written to it.

    A document is in the validation split if the hash of its text falls below `validation_fraction`
    (`splits`); but both splits get at least one document, and a source of one text is cut in two at
    a line end.

    Args:
      source: the text.
      encoder: what turns a document of it into ids.
      validation_fraction: about how much of the documents is held out.
      cache_dir: the folder of all caches, made if it does not exist.

    Returns:
      The corpus, complete on disk.

    Raises:
      InputError: text that cannot be read, an empty split, a cache folder that cannot be written.
    """
    folder = cache_dir / cache_name(source, encoder, validation_fraction)
    try:
        if folder.is_dir():
            try:
                return _open(folder, source.name)
            except _DamagedCacheError as e:
                logging.warning("%s", printable(f"token cache {folder}: {e}; it is built again"))
        return _built(folder, source, encoder, validation_fraction)
    except _DamagedCacheError as e:
        raise InputError(f"cache_dir: {folder} is damaged ({e}); delete it") from None
    except OSError as e:
        reason = f"cannot be written ({e.strerror or e})"
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "no space left"
        raise InputError(
            f"cache_dir: {cache_dir}: {reason}; nothing was kept of source {source.name!r}"
        ) from None


def cache_name(source: Source, encoder: Encoder, validation_fraction: float) -> str:
    """The name of a cache's folder: of all that its content depends on."""
    fingerprint = _fingerprint(source, encoder, validation_fraction)
    return f"{source.kind}-{fingerprint[:16]}"


def _built(
    folder: Path,
    source: Source,
    encoder: Encoder,
    validation_fraction: float,
) -> Corpus:
    """The cache at `folder`, written now unless it is there and whole."""
    cache_dir = folder.parent
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _lock(cache_dir / f".{folder.name}.lock") as is_alone:
        if is_alone:
            _remove_leftovers(folder)
        # Another process may have built it while this one waited for the lock.
        if folder.is_dir():
            try:
                return _open(folder, source.name)
            except _DamagedCacheError:
                _remove(folder)
        _build(folder, source, encoder, validation_fraction)
        return _open(folder, source.name)


def _remove(folder: Path) -> None:
    """Removes a damaged cache; a process that has it open keeps its files until it ends."""
    prefix = _partial_prefix(folder)
    away = prefix.with_name(prefix.name + uuid.uuid4().hex[:8])
    os.rename(folder, away)
    shutil.rmtree(away, ignore_errors=True)


def _fingerprint(source: Source, encoder: Encoder, validation_fraction: float) -> str:
    """A digest of all that the content of a cache depends on."""
    text = [source.kind, str(source.root), source.field, source.listing()]
    depends_on = [FORMAT, text, encoder.fingerprint, validation_fraction]
    # File names may hold bytes that are not UTF-8.
    data = json.dumps(depends_on).encode(errors="surrogateescape")
    return hashlib.sha256(data).hexdigest()


def _build(
    folder: Path,
    source: Source,
    encoder: Encoder,
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
        encoder.name,
        folder,
    )
    try:
        partial.mkdir()
        splitter = Splitter(validation_fraction)
        meta = _write(partial, source, encoder, splitter)
        exception = splitter.missing()
        if exception is not None:
            if exception.side == "cut" and not encoder.takes_parts:
                raise InputError(
                    f"sources.{source.name}: one document of kind {source.kind} in {source.root}, "
                    "expected another one to hold out"
                )
            # A small source: one side is empty. Once more, with its exception.
            meta = _write(partial, source, encoder, Splitter(validation_fraction, exception))
        needed = SPLITS if validation_fraction < 1 else ("validation",)
        _require_text_in_each(needed, meta, source)
        checksums = {path.name: _checksum(path) for path in sorted(partial.iterdir())}
        body = {**meta, "checksums": checksums}
        (partial / "meta.json").write_text(json.dumps({**body, "sha256_of_this": _sha256(body)}))
        _sync(partial)
        os.rename(partial, folder)
        _sync_folder(folder.parent)
    except OSError:
        # If the folder is there, another machine was first, with the same content.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(
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


def _require_text_in_each(
    needed: Sequence[Split],
    meta: Mapping[str, Any],
    source: Source,
) -> None:
    splits = meta["splits"]
    total = sum(split["documents"] for split in splits.values())
    skipped = meta["skipped"]
    left_out = f", {skipped} files that are not UTF-8" if skipped else ""
    for name in needed:
        if splits[name]["tokens"] == splits[name]["documents"]:
            raise InputError(
                f"sources.{source.name}: no text for the {name} split: "
                f"{total} documents{left_out} in {source.root}"
            )


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


class _DamagedCacheError(Exception):
    """A cache whose files are not those that were written."""


def _open(folder: Path, name: str) -> Corpus:
    """The corpus of the cache at `folder`. Raises _DamagedCacheError if it is not whole."""
    try:
        meta = json.loads(read_plain(folder / "meta.json", LARGEST_META))
        digest = meta.pop("sha256_of_this")
        if digest != _sha256(meta):
            raise ValueError("meta.json does not match its checksum")
        checksums = meta.pop("checksums")
        exception = meta.pop("exception")
        splits = {split: SplitInfo(**counts) for split, counts in meta.pop("splits").items()}
        corpus = Corpus(
            name=name,
            splits=splits,
            exception=None if exception is None else Exceptional(**exception),
            path=folder,
            **meta,
        )
        identity = tuple(_identity(folder / file) for file in ("meta.json", *sorted(checksums)))
        if identity not in _verified:
            _require_whole(corpus, checksums)
            _verified.add(identity)
        return corpus
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise _DamagedCacheError(str(e)) from None


def _require_whole(corpus: Corpus, checksums: Mapping[str, int]) -> None:
    """Compares the files of a cache with what its meta.json says of them.

    Raises:
      OSError: a file is missing or is no file.
      ValueError: a file is not what was written.
    """
    for name, info in corpus.splits.items():
        # Cheap: a file cut short is found before any is read.
        size = (corpus.path / f"{name}.tokens").stat().st_size
        if size != info.tokens * np.dtype(corpus.dtype).itemsize:
            raise ValueError(f"{name}.tokens does not hold {info.tokens:,} tokens")
    for name, checksum in checksums.items():
        if _checksum(corpus.path / name) != checksum:
            raise ValueError(f"{name} is not what was written")
    for name, info in corpus.splits.items():
        ends = np.load(corpus.path / f"{name}.ends.npy", allow_pickle=False)
        is_ascending = len(ends) == info.documents and bool(np.all(np.diff(ends) > 0))
        last_end = ends[-1] if len(ends) else 0
        if not is_ascending or last_end != info.tokens:
            raise ValueError(f"{name}.ends.npy does not end {info.documents:,} documents in order")


def _identity(path: Path) -> tuple[str, int, int, int]:
    """What changes when a file is written to."""
    status = path.stat()
    return str(path), status.st_ino, status.st_size, status.st_mtime_ns


def _checksum(path: Path) -> int:
    checksum = 0
    with open_plain(path) as file:
        while piece := file.read(CHECKSUM_BYTES):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def _sha256(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


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
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """The names in a folder reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        # Some network file systems have no fsync of folders.
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
