"""Opens a token cache, and finds out whether its files are those that were written."""

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gatedjax.data.corpus import Corpus, SplitInfo
from gatedjax.data.splits import Exceptional
from gatedjax.files import open_plain, read_plain

CHECKSUM_BYTES = 1 << 22  # read at a time
LARGEST_META = 1 << 20

# Caches that this process found whole: for each file its path, inode, size and time.
_verified: set[tuple[tuple[str, int, int, int], ...]] = set()


class DamagedCacheError(Exception):
    """A cache whose files are not those that were written."""


def open_cache(folder: Path, name: str) -> Corpus:
    """The corpus of the cache at `folder`. Raises DamagedCacheError if it is not whole."""
    try:
        meta = json.loads(read_plain(folder / "meta.json", LARGEST_META))
        digest = meta.pop("sha256_of_this")
        if digest != digest_of_meta(meta):
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
            require_whole(corpus, checksums)
            _verified.add(identity)
        return corpus
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise DamagedCacheError(str(e)) from None


def require_whole(corpus: Corpus, checksums: Mapping[str, int]) -> None:
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
        if checksum_of(corpus.path / name) != checksum:
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


def checksum_of(path: Path) -> int:
    checksum = 0
    with open_plain(path) as file:
        while piece := file.read(CHECKSUM_BYTES):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def digest_of_meta(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
