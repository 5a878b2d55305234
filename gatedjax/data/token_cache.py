"""Tokenize a source once, into files that are complete or absent.

A cache is a folder named by a fingerprint of all that its content depends on. It is written beside
its final place and renamed when complete: a reader never meets half a cache, a crashed writer
leaves nothing that is ever read. For each split the folder holds

  SPLIT.tokens     the stream: every document's tokens and an end-of-document token, uint16 or uint32
  SPLIT.ends.npy   int64: the offset behind each document
  SPLIT.txt        the text itself, UTF-8 (validation only: other compressors are measured on the very same bytes)

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
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Bool, Int, Integer

from gatedjax.data.sources import Source
from gatedjax.data.tokenizer import Tokenizer
from gatedjax.errors import InputError, TrainingError

FORMAT = 1
SPLITS = ("train", "validation")
ENCODE_CHARACTERS = 1 << 22  # documents are tokenized together up to this much text
HASH_RANGE = 2.0**64


@dataclass(frozen=True)
class SplitInfo:
    """Counts of one split. `bytes` is UTF-8 text, `tokens` includes one end-of-document token per
    document.
    """

    documents: int
    bytes: int
    tokens: int

    @property
    def targets(self) -> int:
        """Tokens that are predicted in one pass: all but the first of each document."""
        return self.tokens - self.documents

    @property
    def bytes_per_token(self) -> float:
        """Bytes per predicted token: bits per byte = mean loss in nats / ln 2 / this, exact over a
        whole split.
        """
        return self.bytes / self.targets


@dataclass(frozen=True)
class Corpus:
    """A tokenized source. `sha256` is of all its text, in order, a zero byte after each
    document.
    """

    name: str
    kind: str
    documents: int
    bytes: int
    sha256: str
    skipped: int  # files that are not UTF-8
    tokenizer: str
    dtype: str
    splits: dict[str, SplitInfo]
    path: Path

    def describe(self) -> str:
        """One line for the log."""
        shares = ", ".join(
            f"{name} {s.tokens:,} tokens ({s.bytes_per_token:.3f} bytes each)"
            for name, s in self.splits.items()
        )
        skipped = f", {self.skipped} files not UTF-8 left out" if self.skipped else ""
        return (
            f"{self.name}: {self.kind}, {self.documents:,} documents, {self.bytes:,} bytes, sha256 {self.sha256[:12]}"
            f"{skipped}; {self.tokenizer}: {shares}; cache {self.path}"
        )

    def stream(self, split: str) -> tuple["TokenFile", Int[np.ndarray, "documents"]]:
        """The tokens of a split, on disk, and the offset behind each document."""
        ends = np.load(self.path / f"{split}.ends.npy", allow_pickle=False)
        return TokenFile(self.path / f"{split}.tokens", self.dtype, self.splits[split].tokens), ends

    def validation_text(self) -> bytes:
        """The documents of the validation split one after another, UTF-8."""
        return (self.path / "validation.txt").read_bytes()


class TokenFile:
    """The tokens of a split: `len`, and slices of step 1 as arrays, read from the file when they
    are asked for.

    Not a memory map: if the file is cut short or its disk goes away under a running process, a map
    ends the process with SIGBUS, a read with a line. Deleted, it stays readable as long as it is
    open.
    """

    def __init__(self, path: Path, dtype: str, length: int):
        self._path, self._dtype, self._length = path, np.dtype(dtype), length
        self._file = open(path, "rb")  # noqa: SIM115 (open as long as the dataset)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int | slice) -> Integer[np.ndarray, "..."]:
        if not isinstance(index, slice):
            return self[index : index + 1][0]
        start, stop, step = index.indices(self._length)
        assert step == 1, "tokens are read in one piece"
        size = max(stop - start, 0) * self._dtype.itemsize
        problem, data = "", b""
        try:
            # pread: threads share the file, and none moves the position of another.
            data = os.pread(self._file.fileno(), size, start * self._dtype.itemsize)
        except OSError as e:
            problem = f" ({e.strerror})"
        if len(data) != size:
            raise TrainingError(
                f"{self._path}: {len(data)} bytes could be read, expected {size}{problem}; the token cache was changed "
                "while the run was reading it. The last checkpoint is intact"
            )
        return np.frombuffer(data, self._dtype)


def tokenize(
    source: Source, tokenizer: Tokenizer, validation_fraction: float, cache_dir: Path
) -> Corpus:
    """The corpus of `source`, from `cache_dir` if it is there, else written to it.

    A document is in the validation split if the hash of its key (relative path and row) falls below
    `validation_fraction`, so a document's split does not depend on the others; but both splits get
    at least one document, and a source of one document is cut in two at a line end.

    Raises:
      InputError: text that cannot be read, an empty split, a cache folder that cannot be written or
        is damaged.
    """
    folder = (
        cache_dir / f"{source.kind}-{_fingerprint(source, tokenizer, validation_fraction)[:16]}"
    )
    try:
        if not folder.is_dir():
            cache_dir.mkdir(parents=True, exist_ok=True)
            with _lock(cache_dir / f".{folder.name}.lock") as is_alone:
                if is_alone:
                    _remove_leftovers(folder)
                if not folder.is_dir():
                    _build(folder, source, tokenizer, validation_fraction)
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "no space left" if full else f"cannot be written ({e.strerror or e})"
        raise InputError(
            f"cache_dir: {cache_dir}: {reason}; nothing was kept of source {source.name!r}"
        ) from None
    return _open(folder, source.name)


def _fingerprint(source: Source, tokenizer: Tokenizer, validation_fraction: float) -> str:
    where = [source.kind, str(source.root), source.field, source.listing()]
    depends_on = [FORMAT, where, tokenizer.fingerprint, validation_fraction]
    return hashlib.sha256(json.dumps(depends_on).encode(errors="surrogateescape")).hexdigest()


def _build(folder: Path, source: Source, tokenizer: Tokenizer, validation_fraction: float) -> None:
    """Writes the cache beside `folder` and renames it into place; whatever goes wrong, nothing is
    left behind.
    """
    partial = _partial_prefix(folder).with_name(_partial_prefix(folder).name + uuid.uuid4().hex[:8])
    logging.info("tokenizing source %s with %s into %s", source.name, tokenizer.name, folder)
    try:
        partial.mkdir()
        meta = _write(partial, source, tokenizer, validation_fraction)
        (partial / "meta.json").write_text(json.dumps(meta, indent=1))
        _sync(partial)
        os.rename(partial, folder)
    except OSError:
        if not folder.is_dir():  # else another machine was first, with the same content
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(partial: Path, source: Source, tokenizer: Tokenizer, validation_fraction: float) -> dict:
    """Tokenizes everything into the folder `partial`; returns what goes into meta.json."""
    digest, skipped = hashlib.sha256(), 0
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(_SplitWriter(partial, split, tokenizer, dtype)) for split in SPLITS
        ]
        for text, is_validation in _labeled(source, validation_fraction):
            if text is None:
                skipped += 1
            elif text:  # an empty document has nothing to predict
                text, data = _utf8(text)
                digest.update(data + b"\0")
                writers[is_validation].add(text, data)
        splits = {split: writer.finish() for split, writer in zip(SPLITS, writers)}
    for split, info in splits.items():
        if info.targets == 0:
            left_out = f", {skipped} files that are not UTF-8" if skipped else ""
            total = sum(i.documents for i in splits.values())
            came = f"{total} documents{left_out} in {source.root}"
            raise InputError(f"sources.{source.name}: no text for the {split} split: {came}")
    return {
        "kind": source.kind,
        "documents": sum(i.documents for i in splits.values()),
        "bytes": sum(i.bytes for i in splits.values()),
        "sha256": digest.hexdigest(),
        "skipped": skipped,
        "tokenizer": tokenizer.name,
        "dtype": dtype,
        "splits": {split: asdict(info) for split, info in splits.items()},
    }


class _SplitWriter:
    """Appends the documents of one split to its files."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, dtype: str):
        self._folder, self._split, self._tokenizer, self._dtype = folder, split, tokenizer, dtype
        self._pending: list[str] = []
        self._characters = self._bytes = self._tokens = 0
        self._ends: list[int] = []

    def __enter__(self) -> "_SplitWriter":
        self._stream = open(self._folder / f"{self._split}.tokens", "wb")
        self._text = (
            open(self._folder / f"{self._split}.txt", "wb") if self._split == "validation" else None
        )
        return self

    def __exit__(self, *exc) -> None:
        self._stream.close()
        if self._text:
            self._text.close()

    def add(self, text: str, data: bytes) -> None:
        self._bytes += len(data)
        self._pending.append(text)
        self._characters += len(text)
        if self._text:
            self._text.write(data)
        if self._characters > ENCODE_CHARACTERS:
            self._flush()

    def finish(self) -> SplitInfo:
        self._flush()
        np.save(
            self._folder / f"{self._split}.ends.npy",
            np.asarray(self._ends, np.int64),
            allow_pickle=False,
        )
        return SplitInfo(len(self._ends), self._bytes, self._tokens)

    def _flush(self) -> None:
        eos = np.asarray([self._tokenizer.eos_id], self._dtype)
        for ids in self._tokenizer.encode_batch(self._pending):
            self._stream.write(ids.astype(self._dtype).tobytes() + eos.tobytes())
            self._tokens += len(ids) + 1
            self._ends.append(self._tokens)
        self._pending, self._characters = [], 0


def _labeled(source: Source, validation_fraction: float) -> Iterator[tuple[str | None, bool]]:
    """(text, is it validation?) of each document, in order."""
    parts = source.parts()
    keys = [f"{name}:{row}" for name, documents in parts for row in range(len(documents))]
    texts = (text for name, documents in parts for text in source.read(name, documents))
    if len(keys) == 1:
        whole = next(texts)
        yield from _cut_in_two(whole, validation_fraction) if whole else [(whole, False)]
    else:
        yield from zip(texts, _is_validation(keys, validation_fraction).tolist())


def _cut_in_two(text: str, validation_fraction: float) -> list[tuple[str, bool]]:
    wanted = int(len(text) * (1 - validation_fraction))
    cut = text.rfind("\n", wanted // 2, wanted) + 1 or wanted
    return [(text[:cut], False), (text[cut:], True)]


def _is_validation(keys: list[str], validation_fraction: float) -> Bool[np.ndarray, "documents"]:
    first_bytes = b"".join(
        hashlib.sha256(key.encode(errors="surrogateescape")).digest()[:8] for key in keys
    )
    hashes = np.frombuffer(first_bytes, ">u8") / HASH_RANGE
    chosen = hashes < validation_fraction
    if len(keys) > 1:  # the document nearest to the other side crosses over, if that side is empty
        if not chosen.any():
            chosen[hashes.argmin()] = True
        if chosen.all():
            chosen[hashes.argmax()] = False
    return chosen


def _utf8(text: str) -> tuple[str, bytes]:
    """The text and its UTF-8 bytes. A lone surrogate, which JSON can spell and UTF-8 cannot,
    becomes "?".
    """
    try:
        return text, text.encode()
    except UnicodeEncodeError:
        data = text.encode(errors="replace")
        return data.decode(), data


def _open(folder: Path, name: str) -> Corpus:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        splits = {split: SplitInfo(**counts) for split, counts in meta.pop("splits").items()}
        for split, info in splits.items():
            _require_whole(folder, split, info, meta["dtype"])
        return Corpus(name=name, splits=splits, path=folder, **meta)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"cache_dir: {folder} is damaged ({e}); delete it") from None


def _require_whole(folder: Path, split: str, info: SplitInfo, dtype: str) -> None:
    """ValueError where a file of the split is not as long as meta.json says."""
    if (folder / f"{split}.tokens").stat().st_size != info.tokens * np.dtype(dtype).itemsize:
        raise ValueError(f"{split}.tokens does not hold {info.tokens} tokens")
    if (
        len(np.load(folder / f"{split}.ends.npy", mmap_mode="r", allow_pickle=False))
        != info.documents
    ):
        raise ValueError(f"{split}.ends.npy does not hold {info.documents} documents")
    if split == "validation" and (folder / "validation.txt").stat().st_size != info.bytes:
        raise ValueError(f"validation.txt does not hold {info.bytes} bytes")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """One writer per machine: the processes of a host tokenize once, the others wait for the
    result.

    Yields whether the lock is held: some file systems have none. Then several may write at once,
    which costs time and nothing else: correctness rests on the rename. The lock file stays; the
    lock ends with the process that holds it.
    """
    with open(path, "a") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX)
            is_held = True
        except OSError:
            is_held = False
        yield is_held


def _partial_prefix(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{socket.gethostname()}.partial-")


def _remove_leftovers(folder: Path) -> None:
    """Removes what crashed writers of this machine left; the lock says that none is at work."""
    prefix = _partial_prefix(folder)
    for path in prefix.parent.iterdir():
        if path.name.startswith(prefix.name):
            shutil.rmtree(path, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Data reaches the disk before the name does."""
    for path in folder.iterdir():
        with open(path, "rb") as f:
            os.fsync(f.fileno())
