"""Where text comes from: one small class per file format, all of them sequences of documents.

`open_source` looks at names, sizes and dates only, so it is quick; files are read when a corpus is
tokenized. The order of documents is fixed: files by relative path, rows in the order of the file.
"""

import contextlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from gatedjax.config import SourceConfig
from gatedjax.errors import InputError

TEST_FOLDERS = {"test", "tests", "idle_test"}
NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}
JSONL_SCAN_BYTES = 1 << 26


class Documents(Protocol):
    """The documents of one file. A text is None where the file is not UTF-8: it is counted and left
    out.
    """

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[str | None]: ...


@dataclass(frozen=True)
class Source:
    """The files of one source, `root` the folder that their names are relative to. `open` reads one
    of them.
    """

    name: str
    kind: str
    root: Path
    files: tuple[Path, ...]
    field: str
    open: Callable[[Path], Documents]

    def relative(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()

    def listing(self) -> list[tuple[str, int, int]]:
        """(relative path, bytes, modification time in ns) of each file: what tells that a source
        has changed.
        """
        # A saved Dataset is opened as a folder; the files in it are what changes.
        files = _walk(self.root, lambda f: True) if self.kind == "hf_disk" else self.files
        with _reading(self.root):
            stats = [(self.relative(f), f.stat()) for f in files]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]

    def parts(self) -> list[tuple[str, Documents]]:
        """Opens every file: (relative path, its documents)."""
        parts = []
        for file in self.files:
            with _reading(file):
                parts.append((self.relative(file), self.open(file)))
        return parts

    def read(self, name: str, documents: Documents) -> Iterator[str | None]:
        """The texts of one part; whatever fails below becomes an InputError that names it."""
        count = 0
        with _reading(self.root / name):
            for text in documents:
                count += 1
                yield text
        if count != len(documents):
            raise InputError(
                f"{self.root / name}: {count} documents could be read, expected {len(documents)}"
            )


class TextFile:
    """One document: the whole file, line ends untouched."""

    def __init__(self, path: Path):
        self.path = path

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[str | None]:
        try:
            yield self.path.read_bytes().decode()
        except UnicodeDecodeError:
            yield None


class JsonLines:
    """A JSON object per line, the document under `field`. Random access by an index of line
    offsets; blank lines skip.

    Raises:
      InputError: naming file and line, where a line is not a JSON object with a string under
        `field`.
    """

    def __init__(self, path: Path, field: str):
        self.path, self.field = path, field
        # An empty file cannot be mapped.
        self._bytes = (
            np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
        )
        scan = range(0, len(self._bytes), JSONL_SCAN_BYTES)
        breaks = [
            np.flatnonzero(self._bytes[i : i + JSONL_SCAN_BYTES] == ord("\n")) + i for i in scan
        ]
        ends = np.concatenate([*breaks, [len(self._bytes)]]).astype(
            np.int64
        )  # a last line may lack its line break
        starts = np.concatenate([[0], ends[:-1] + 1])
        is_text = ends > starts
        is_text[is_text] = (ends - starts > 1)[is_text] | (
            self._bytes[starts[is_text]] != ord("\r")
        )
        self._starts, self._ends, self._lines = (
            starts[is_text],
            ends[is_text],
            np.flatnonzero(is_text) + 1,
        )

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> str:
        line = self._bytes[self._starts[i] : self._ends[i]].tobytes()
        return _json_text(line, self.field, f"{self.path}, line {self._lines[i]}")

    def __iter__(self) -> Iterator[str | None]:
        return (self[i] for i in range(len(self)))


class ParquetFile:
    """One document per row, the string column `field`."""

    def __init__(self, path: Path, field: str):
        pq = _optional("pyarrow.parquet", "parquet")
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
        except Exception as e:  # pyarrow raises its own tree of errors
            raise InputError(f"{path}: not a Parquet file ({_one_line(e)})") from None
        self.path, self.field = path, field
        _require_column(field, self._file.schema_arrow.names, path)

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def __iter__(self) -> Iterator[str | None]:
        rows = (
            v
            for b in self._file.iter_batches(1024, columns=[self.field])
            for v in b.column(0).to_pylist()
        )
        return (
            _require_text(value, self.field, f"{self.path}, row {i}")
            for i, value in enumerate(rows)
        )


class ArrayRecordFile:
    """One document per record: a JSON object with `field`, or with `field = ""` the UTF-8 text
    itself.
    """

    def __init__(self, path: Path, field: str):
        module = _optional("array_record.python.array_record_module", "array_record")
        self._reader = module.ArrayRecordReader(str(path))
        if not self._reader.ok():
            raise InputError(f"{path}: not an ArrayRecord file")
        self.path, self.field = path, field

    def __len__(self) -> int:
        return self._reader.num_records()

    def __iter__(self) -> Iterator[str | None]:
        for start in range(0, len(self), 1024):
            records = self._reader.read(start, min(start + 1024, len(self)))
            for i, record in enumerate(records, start):
                yield self._text(record, f"{self.path}, record {i}")

    def _text(self, record: bytes, where: str) -> str:
        if self.field:
            return _json_text(
                record, self.field, where, "; for records of plain text set field to ''"
            )
        try:
            return record.decode()
        except UnicodeDecodeError as e:
            raise InputError(f"{where}: not UTF-8 ({e.reason} at byte {e.start})") from None


class SavedDataset:
    """A Dataset of Hugging Face `datasets`, written by `save_to_disk`; the string column
    `field`.
    """

    def __init__(self, path: Path, field: str):
        datasets = _optional("datasets", "hf_disk")
        try:
            self._dataset = datasets.load_from_disk(str(path))
        except Exception as e:  # the library raises many kinds
            raise InputError(
                f"{path}: not a dataset written by save_to_disk ({_one_line(e)})"
            ) from None
        if isinstance(self._dataset, dict):
            raise InputError(
                f"{path}: holds the splits {', '.join(self._dataset)}; give the folder of one of them"
            )
        self.path, self.field = path, field
        _require_column(field, self._dataset.column_names, path)

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[str | None]:
        column = self._dataset.select_columns([self.field])
        rows = (value for chunk in column.iter(1024) for value in chunk[self.field])
        return (
            _require_text(value, self.field, f"{self.path}, row {i}")
            for i, value in enumerate(rows)
        )


def open_source(name: str, cfg: SourceConfig) -> Source:
    """The source that `cfg` describes; `name` is its key in the configuration.

    Raises:
      InputError: unknown kind, a path that is missing or holds no file of this kind.
    """
    if cfg.kind == "python_stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        _require_exists(name, root)
        files = _walk(root, lambda f: f.suffix == ".py", TEST_FOLDERS | NOT_STDLIB)
        return Source(name, cfg.kind, root, files, "", TextFile)
    if cfg.kind not in _FORMATS:
        known = ", ".join(["python_stdlib", *_FORMATS])
        raise InputError(f"sources.{name}.kind: got {cfg.kind!r}, expected one of {known}")
    if not cfg.path:
        raise InputError(
            f"sources.{name}.path: empty, expected a file or folder for kind {cfg.kind}"
        )
    path = Path(cfg.path).expanduser().absolute()
    _require_exists(name, path)
    wanted, open_file = _FORMATS[cfg.kind]
    if cfg.kind == "hf_disk":
        return Source(name, cfg.kind, path, (path,), cfg.field, lambda f: open_file(f, cfg.field))
    files = (path,) if path.is_file() else _walk(path, wanted)
    if not files:
        raise InputError(f"sources.{name}.path: {cfg.path!r} holds no file of kind {cfg.kind}")
    root = path.parent if path.is_file() else path
    return Source(name, cfg.kind, root, files, cfg.field, lambda f: open_file(f, cfg.field))


# Which files of a folder belong to a kind, and what opens one.
_FORMATS: dict[str, tuple[Callable[[Path], bool], Callable[[Path, str], Documents]]] = {
    "text": (lambda f: True, lambda f, _: TextFile(f)),
    "jsonl": (lambda f: f.suffix in (".jsonl", ".ndjson"), JsonLines),
    "parquet": (lambda f: f.suffix == ".parquet", ParquetFile),
    # Shards are named x.array_record-00000-of-00008.
    "array_record": (
        lambda f: ".array_record" in f.name or ".arrayrecord" in f.name,
        ArrayRecordFile,
    ),
    "hf_disk": (lambda f: True, SavedDataset),
}


def _walk(
    root: Path, wanted: Callable[[Path], bool], left_out: set[str] = frozenset()
) -> tuple[Path, ...]:
    """The files under `root`, by relative path; hidden files and folders are left out."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in left_out and not f.startswith(".")]
        found += [Path(folder, n) for n in names if not n.startswith(".")]
    return tuple(
        sorted(
            (f for f in found if f.is_file() and wanted(f)),
            key=lambda f: f.relative_to(root).as_posix(),
        )
    )


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """OSError, and what the libraries of the formats raise, as one line that names the file."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as e:
        raise InputError(f"{path}: cannot be read ({_one_line(e)})") from None


def _require_exists(name: str, path: Path) -> None:
    if not path.exists():
        raise InputError(f"sources.{name}.path: {str(path)!r} does not exist")


def _require_column(field: str, columns: list[str], path: Path) -> None:
    if field not in columns:
        raise InputError(f"{path}: no field {field!r}; it has {', '.join(columns)}")


def _require_text(value, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(
            f"{where}: field {field!r} holds {type(value).__name__}, expected a string"
        )
    return value


def _json_text(line: bytes, field: str, where: str, hint: str = "") -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: not JSON ({_one_line(e)}){hint}") from None
    if not isinstance(record, dict):
        raise InputError(
            f"{where}: got {type(record).__name__}, expected an object with field {field!r}{hint}"
        )
    if field not in record:
        raise InputError(f"{where}: no field {field!r}; it has {', '.join(record)}")
    return _require_text(record[field], field, where)


def _optional(module: str, kind: str):
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        library = module.split(".")[0]
        raise InputError(
            f"kind {kind} needs the {library} library: pip install 'gatedjax[data]'"
        ) from None


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
