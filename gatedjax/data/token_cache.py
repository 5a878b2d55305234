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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from gatedjax.data.corpus import Corpus
from gatedjax.data.encoders import Encoder
from gatedjax.data.sources import Source
from gatedjax.data.splits import (
    SPLITS,
    Split,
    Splitter,
)
from gatedjax.data.tokenized_splits import write_splits
from gatedjax.data.whole_cache import DamagedCacheError, checksum_of, digest_of_meta, open_cache
from gatedjax.errors import InputError, printable

FORMAT = 2  # of the cache: a change of the files' layout counts it up


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
                return open_cache(folder, source.name)
            except DamagedCacheError as e:
                logging.warning("%s", printable(f"token cache {folder}: {e}; it is built again"))
        return _built(folder, source, encoder, validation_fraction)
    except DamagedCacheError as e:
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


def _fingerprint(source: Source, encoder: Encoder, validation_fraction: float) -> str:
    """A digest of all that the content of a cache depends on."""
    text = [source.kind, str(source.root), source.field, source.listing()]
    depends_on = [FORMAT, text, encoder.fingerprint, validation_fraction]
    # File names may hold bytes that are not UTF-8.
    data = json.dumps(depends_on).encode(errors="surrogateescape")
    return hashlib.sha256(data).hexdigest()


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
                return open_cache(folder, source.name)
            except DamagedCacheError:
                _remove(folder)
        _build(folder, source, encoder, validation_fraction)
        return open_cache(folder, source.name)


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


def _remove_leftovers(folder: Path) -> None:
    """Removes the partial caches of this machine; the lock says that no writer is at work."""
    prefix = _partial_prefix(folder)
    for path in prefix.parent.iterdir():
        if path.name.startswith(prefix.name):
            shutil.rmtree(path, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Removes a damaged cache; a process that has it open keeps its files until it ends."""
    prefix = _partial_prefix(folder)
    away = prefix.with_name(prefix.name + uuid.uuid4().hex[:8])
    os.rename(folder, away)
    shutil.rmtree(away, ignore_errors=True)


def _partial_prefix(folder: Path) -> Path:
    """How the names of all caches begin that this machine is writing for `folder`."""
    return folder.with_name(f".{folder.name}.{socket.gethostname()}.partial-")


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
        meta = write_splits(partial, source, encoder, splitter)
        exception = splitter.missing()
        if exception is not None:
            if exception.side == "cut" and not encoder.takes_parts:
                raise InputError(
                    f"sources.{source.name}: one document of kind {source.kind} in {source.root}, "
                    "expected another one to hold out"
                )
            # A small source: one side is empty. Once more, with its exception.
            meta = write_splits(partial, source, encoder, Splitter(validation_fraction, exception))
        needed = SPLITS if validation_fraction < 1 else ("validation",)
        _require_text_in_each(needed, meta, source)
        checksums = {path.name: checksum_of(path) for path in sorted(partial.iterdir())}
        body = {**meta, "checksums": checksums}
        (partial / "meta.json").write_text(
            json.dumps({**body, "sha256_of_this": digest_of_meta(body)})
        )
        _sync(partial)
        os.rename(partial, folder)
        _sync_folder(folder.parent)
    except OSError:
        # If the folder is there, another machine was first, with the same content.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
