"""File formats of text: one small class each, all of them sequences of documents."""

import gzip
import importlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, UInt8

from gatedjax.errors import InputError
from gatedjax.files import open_plain, require_no_holes

JSONL_SCAN_BYTES = 1 << 26
# A document is held whole, and tokenized in one piece.
LARGEST_DOCUMENT = 1 << 31
# Of a saved Dataset's state.json, which lists its files.
LARGEST_LISTING = 1 << 28
READ_ROWS = 1024  # rows or records that are held in memory at a time

# Of a line, a field and a name for the line.
ParseLine = Callable[[bytes, str, str], str]


@runtime_checkable
class Documents(Protocol):
    """The documents of one file.

    A text is None where the file is not UTF-8: it is counted and left out.
    """

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[str | None]: ...


class TextFile:
    """One document: the whole file, line ends untouched."""

    def __init__(self, path: Path):
        self.path = path

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[str | None]:
        with open_plain(self.path, LARGEST_DOCUMENT) as file:
            require_no_holes(file)
            data = file.read()
        try:
            yield data.decode()
        except UnicodeDecodeError:
            yield None


class JsonLines:
    """A JSON object per line, the document under `field`. Blank lines are skipped.

    Random access works by an index of line offsets. `parse` makes the document of a line, given
    the field and a name for the line.

    Raises:
      InputError: naming file and line, where a line is not a JSON object with a string under
        `field`.
    """

    def __init__(self, path: Path, field: str, parse: ParseLine | None = None):
        self.path = path
        self.field = field
        self._parse = parse or _json_text
        self._bytes = _map_bytes(path)
        # Every line ends before its line break; a last line may lack one.
        breaks = _line_breaks(self._bytes)
        ends = np.concatenate([breaks, [len(self._bytes)]]).astype(np.int64)
        starts = np.concatenate([[0], ends[:-1] + 1])
        is_text = _holds_text(self._bytes, starts, ends)
        self._starts = starts[is_text]
        self._ends = ends[is_text]
        self._line_numbers = np.flatnonzero(is_text) + 1

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> str:
        where = f"{self.path}, line {self._line_numbers[i]}"
        size = self._ends[i] - self._starts[i]
        if size > LARGEST_DOCUMENT:
            raise InputError(f"{where}: {size:,} bytes, expected at most {LARGEST_DOCUMENT:,}")
        line = self._bytes[self._starts[i] : self._ends[i]].tobytes()
        return self._parse(line, self.field, where)

    def __iter__(self) -> Iterator[str | None]:
        return (self[i] for i in range(len(self)))


class CompressedJsonLines:
    """As `JsonLines`, of a file that is compressed by gzip or Zstandard (.gz, .zst).

    It is read from its beginning, twice: once to count its documents.
    """

    def __init__(self, path: Path, field: str, parse: ParseLine | None = None):
        self.path = path
        self.field = field
        self._parse = parse or _json_text
        self._module: ModuleType = gzip
        # EOFError where the file was cut short; the others where it is damaged or something else.
        self._damage = (EOFError, gzip.BadGzipFile, zlib.error)
        if path.suffix == ".zst":
            self._module = _zstandard()
            self._damage = (EOFError, self._module.ZstdError)
        self._documents = sum(1 for _ in self._lines())

    def __len__(self) -> int:
        return self._documents

    def __iter__(self) -> Iterator[str | None]:
        for number, line in self._lines():
            yield self._parse(line, self.field, f"{self.path}, line {number}")

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Line number and text of the lines that are not blank."""
        try:
            yield from self._decompressed_lines()
        except self._damage as e:
            reason = one_line(e)
            raise InputError(f"{self.path}: not a whole compressed file ({reason})") from None

    def _decompressed_lines(self) -> Iterator[tuple[int, bytes]]:
        with open_plain(self.path) as compressed, self._module.open(compressed, "rb") as file:
            # A little file may hold a line of a terabyte.
            lines = iter(lambda: file.readline(LARGEST_DOCUMENT + 1), b"")
            for number, line in enumerate(lines, start=1):
                if len(line) > LARGEST_DOCUMENT:
                    limit = f"expected at most {LARGEST_DOCUMENT:,} bytes"
                    raise InputError(f"{self.path}, line {number}: is longer, {limit}")
                if line.strip(b"\r\n"):
                    yield number, line


def _zstandard() -> ModuleType:
    """Of Python since 3.14."""
    try:
        return importlib.import_module("compression.zstd")
    except ImportError:
        return optional_module("backports.zstd", "jsonl in .zst files")


def _map_bytes(path: Path) -> UInt8[np.ndarray, "bytes"]:
    with open_plain(path) as file:
        require_no_holes(file)
        # An empty file cannot be mapped.
        if path.stat().st_size == 0:
            return np.zeros(0, np.uint8)
        return np.memmap(file, np.uint8, mode="r")


def _line_breaks(data: UInt8[np.ndarray, "bytes"]) -> Int[np.ndarray, "breaks"]:
    """Offsets of all line breaks. In pieces: the comparison makes an array of the piece's size."""
    breaks = [np.zeros(0, np.int64)]
    for start in range(0, len(data), JSONL_SCAN_BYTES):
        piece = data[start : start + JSONL_SCAN_BYTES]
        breaks.append(np.flatnonzero(piece == ord("\n")) + start)
    return np.concatenate(breaks)


def _holds_text(
    data: UInt8[np.ndarray, "bytes"],
    starts: Int[np.ndarray, "lines"],
    ends: Int[np.ndarray, "lines"],
) -> Bool[np.ndarray, "lines"]:
    """Which lines are not blank: a line of "\\r" alone is."""
    lengths = ends - starts
    holds_text = lengths > 1
    single = np.flatnonzero(lengths == 1)
    holds_text[single] = data[starts[single]] != ord("\r")
    return holds_text


class ParquetFile:
    """One document per row, the string column `field`."""

    def __init__(self, path: Path, field: str):
        parquet = optional_module("pyarrow.parquet", "parquet")
        try:
            self._file = parquet.ParquetFile(path, memory_map=True)
        except Exception as e:  # pyarrow raises its own tree of errors
            raise InputError(f"{path}: not a Parquet file ({one_line(e)})") from None
        self.path = path
        self.field = field
        _require_column(field, self._file.schema_arrow.names, path)

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def __iter__(self) -> Iterator[str | None]:
        return _texts_of_rows(self._rows(), self.field, self.path)

    def _rows(self) -> Iterator[Any]:
        for (value,) in self.rows(self.field):
            yield value

    def rows(self, *columns: str) -> Iterator[tuple[Any, ...]]:
        """The values of some columns, row by row.

        Raises:
          InputError: there is no such column.
        """
        for column in columns:
            _require_column(column, self._file.schema_arrow.names, self.path)
        for batch in self._file.iter_batches(READ_ROWS, columns=list(columns)):
            yield from zip(*(batch.column(column).to_pylist() for column in columns))


class ArrayRecordFile:
    """One document per record: a JSON object with `field`, or with `field = ""` the text itself."""

    def __init__(self, path: Path, field: str):
        module = optional_module("array_record.python.array_record_module", "array_record")
        self._reader = module.ArrayRecordReader(str(path))
        if not self._reader.ok():
            raise InputError(f"{path}: not an ArrayRecord file")
        self.path = path
        self.field = field

    def __len__(self) -> int:
        return self._reader.num_records()

    def __iter__(self) -> Iterator[str | None]:
        for start in range(0, len(self), READ_ROWS):
            stop = min(start + READ_ROWS, len(self))
            records = self._reader.read(start, stop)
            for i, record in enumerate(records, start):
                yield self._text(record, f"{self.path}, record {i}")

    def _text(self, record: bytes, where: str) -> str:
        if self.field:
            hint = "; for records of plain text set field to ''"
            return _json_text(record, self.field, where, hint)
        try:
            return record.decode()
        except UnicodeDecodeError as e:
            raise InputError(f"{where}: not UTF-8 ({e.reason} at byte {e.start})") from None


class SavedDataset:
    """A Dataset of Hugging Face `datasets`, of `save_to_disk`: the string column `field`."""

    def __init__(self, path: Path, field: str):
        datasets = optional_module("datasets", "hf_disk")
        _require_own_files(path)
        try:
            self._dataset = datasets.load_from_disk(str(path))
        except Exception as e:  # the library raises many kinds
            raise InputError(
                f"{path}: not a dataset written by save_to_disk ({one_line(e)})"
            ) from None
        if isinstance(self._dataset, dict):
            splits = ", ".join(self._dataset)
            raise InputError(f"{path}: holds the splits {splits}; give the folder of one of them")
        self.path = path
        self.field = field
        _require_column(field, self._dataset.column_names, path)

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[str | None]:
        return _texts_of_rows(self._rows(), self.field, self.path)

    def _rows(self) -> Iterator[Any]:
        column = self._dataset.select_columns([self.field])
        for chunk in column.iter(READ_ROWS):
            yield from chunk[self.field]


def _require_own_files(path: Path) -> None:
    """InputError if a saved Dataset names a file that is not one of its own folder.

    The library opens whatever its state.json names. It refuses a folder without one by itself.
    """
    listing = path / "state.json"
    if not listing.exists():
        return
    try:
        with open_plain(listing, LARGEST_LISTING) as file:
            state = json.load(file)
        names = [entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise InputError(f"{listing}: cannot be read ({one_line(e)})") from None
    for name in names:
        is_plain = isinstance(name, str) and name == Path(name).name
        if not is_plain or name == "..":
            raise InputError(f"{listing}: names the file {name!r}, expected one of this folder")
        if (path / name).is_symlink():
            raise InputError(f"{path / name}: is a link, expected a file of this folder")


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    message = str(error).strip()
    if not message:
        return type(error).__name__
    return message.splitlines()[0]


def _texts_of_rows(rows: Iterable[Any], field: str, path: Path) -> Iterator[str]:
    for i, value in enumerate(rows):
        yield require_string(value, field, f"{path}, row {i}")


def _json_text(
    line: bytes,
    field: str,
    where: str,
    hint: str = "",
) -> str:
    """The string under `field` of a JSON object.

    Args:
      line: the object's UTF-8 text.
      field: the key.
      where: file and line, for the message.
      hint: what else the user may have meant, appended to the message.

    Returns:
      The document.

    Raises:
      InputError: not JSON, not an object, no such field, or not a string.
    """
    record = json_object(line, where, f" with field {field!r}{hint}", hint)
    if field not in record:
        raise InputError(f"{where}: no field {field!r}; it has {', '.join(record)}")
    return require_string(record[field], field, where)


def json_object(
    line: bytes,
    where: str,
    expected: str = "",
    hint: str = "",
) -> dict[str, Any]:
    """The JSON object of a line.

    Args:
      line: its UTF-8 text.
      where: file and line, for the message.
      expected: of the object, appended to the message where the line is another value.
      hint: what else the user may have meant, appended where it is none.

    Returns:
      The object.

    Raises:
      InputError: not JSON, or not an object.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: not JSON ({one_line(e)}){hint}") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: got {type(record).__name__}, expected an object{expected}")
    return record


def require_string(value: Any, field: str, where: str) -> str:
    """A document; InputError if the field of a record or a row holds something else."""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise InputError(f"{where}: field {field!r} holds {kind}, expected a string")
    return value


def _require_column(field: str, columns: list[str], path: Path) -> None:
    if field not in columns:
        raise InputError(f"{path}: no field {field!r}; it has {', '.join(columns)}")


def optional_module(module: str, kind: str, extra: str = "data") -> ModuleType:
    """A module of an optional library, imported when the first file of its kind is opened.

    `extra` is the package's own that brings it.
    """
    try:
        # A non-empty fromlist makes __import__ return the submodule, not its package.
        return __import__(module, fromlist=["_"])
    except ImportError:
        library = module.split(".")[0]
        raise InputError(
            f"kind {kind} needs the {library} library: pip install 'gatedjax[{extra}]'"
        ) from None
