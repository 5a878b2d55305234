"""The documents of a data set, one after another, from any place in it: Hugging Face `datasets` in
streaming mode.
"""

import contextlib
import copy
import glob
import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatedjax.config import SourceConfig
from gatedjax.data.formats import one_line, optional_module, require_string
from gatedjax.data.splits import content_hash
from gatedjax.data.tokenized_splits import utf8
from gatedjax.data.tokenizer import HUB_NAME
from gatedjax.errors import InputError, StorageError, require
from gatedjax.paths import expand

KIND = "hf"
HUB_SECONDS = 10.0

# The library's readers of single files.
_READERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".arrow": "arrow",
}
# Packages whose errors mean that the hub does not answer; they are no OSErrors.
_CLIENTS = {"aiohttp", "fsspec", "httpcore", "httpx", "httpx2", "huggingface_hub", "requests"}

# As JSON has it.
State = dict[str, Any]


@dataclass(frozen=True)
class Document:
    """A text, and its `splits.content_hash`."""

    text: str
    hash: int
    size: int


class DocumentStream:
    """The documents of one split of a dataset, in its order, from its beginning or from a state.

    Raises:
      InputError: no such dataset, subset, split or column; the library is missing.
    """

    def __init__(self, name: str, cfg: SourceConfig, split: str):
        self._name = name
        self._field = cfg.field
        self._where = f"sources.{name}: {cfg.path}, split {split}"
        self._dataset, self._is_remote = _opened(name, cfg, split)
        columns = self._dataset.column_names
        if columns is not None and cfg.field not in columns:
            raise InputError(
                f"sources.{name}.field: got {cfg.field!r}, expected one of {', '.join(columns)}"
            )
        self._beginning = self._dataset.state_dict()
        self._rows: Iterator[Mapping[str, Any]] = iter(())
        self.go_to(self._beginning)

    def rewind(self) -> None:
        """The first document comes next."""
        self.go_to(self._beginning)

    def go_to(self, state: State) -> None:
        """The document comes next that came next when `state` was taken."""
        self._state = state
        # A copy: the library goes on counting in what it is given.
        self._dataset.load_state_dict(copy.deepcopy(state))
        self._rows = iter(self._dataset)

    def state(self) -> State:
        """The library's state before the document that comes next."""
        return self._state

    def read(self, count: int) -> tuple[int, list[Document]]:
        """Up to `count` documents: how many there were, and those that have text.

        There are fewer only at the end of the dataset. After an error the same documents come next.
        """
        documents = []
        rows = 0
        with self._plain_errors():
            for row in itertools.islice(self._rows, count):
                rows += 1
                document = self._document(row)
                if document.text:
                    documents.append(document)
            if rows:
                # Before the first row the library has no state of this pass.
                self._state = self._dataset.state_dict()
        return rows, documents

    def _document(self, row: Mapping[str, Any]) -> Document:
        if self._field not in row:
            raise InputError(
                f"sources.{self._name}.field: got {self._field!r}, expected one of {', '.join(row)}"
            )
        text = require_string(row[self._field], self._field, self._where)
        text, data = utf8(text)
        return Document(text, content_hash(data), len(data))

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """Whatever the library and what is below it raise, as one line."""
        try:
            yield
        except InputError:
            self.go_to(self._state)
            raise
        except Exception as error:
            self.go_to(self._state)
            package = type(error).__module__.partition(".")[0]
            may_work_again = self._is_remote and (isinstance(error, OSError) or package in _CLIENTS)
            kind = StorageError if may_work_again else InputError
            raise kind(f"{self._where}: cannot be read ({one_line(error)})") from None


def _opened(name: str, cfg: SourceConfig, split: str) -> tuple[Any, bool]:
    """A split as an `IterableDataset`, and whether it comes from the hub."""
    if not cfg.path:
        raise InputError(
            f"sources.{name}.path: empty, expected a name on the hub, a folder or files"
        )
    datasets = optional_module("datasets", KIND)
    datasets.disable_progress_bars()
    # It logs what it raises; that a hub does not answer and is asked again is still said.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    key = f"sources.{name}.path"
    path = expand(cfg.path, key)
    arguments: dict[str, Any] = {}
    is_remote = False
    if path.is_dir():
        arguments["path"] = str(path.absolute())
        arguments["name"] = cfg.stream.subset or None
    elif path.exists() or glob.has_magic(cfg.path):
        files = _files(key, path)
        arguments["path"] = _reader_of(key, files[0])
        arguments["data_files"] = {"train": files}
        subset = cfg.stream.subset
        require(not subset, f"sources.{name}.stream.subset", subset, "'' for files")
    else:
        _require_on_hub(key, cfg.path)
        is_remote = True
        arguments["path"] = cfg.path
        arguments["name"] = cfg.stream.subset or None
    try:
        dataset = datasets.load_dataset(
            split=split,
            streaming=True,
            **arguments,
        )
    except Exception as error:  # the library raises many kinds
        raise InputError(
            f"sources.{name}: {cfg.path!r}, split {split!r}: cannot be opened ({one_line(error)})"
        ) from None
    return dataset, is_remote


def _files(key: str, path: Path) -> list[str]:
    """The file, or those that a pattern matches, in order."""
    if path.exists():
        return [str(path.absolute())]
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    files = [str(match.absolute()) for match in matches if match.is_file()]
    if not files:
        raise InputError(f"{key}: {str(path)!r} matches no file")
    return files


def _reader_of(key: str, file: str) -> str:
    name = file.removesuffix(".gz").removesuffix(".zst")
    ending = Path(name).suffix
    require(ending in _READERS, key, file, f"a file that ends in {', '.join(_READERS)}")
    return _READERS[ending]


def _require_on_hub(key: str, name: str) -> None:
    """InputError unless the hub says that it has this dataset: asked once, without retries."""
    if not HUB_NAME.fullmatch(name):
        raise InputError(f"{key}: {name!r} does not exist")
    hub = optional_module("huggingface_hub", KIND)
    try:
        hub.HfApi().dataset_info(name, timeout=HUB_SECONDS)
    except Exception as error:  # the library's own errors, and those of its connections
        raise InputError(
            f"{key}: no file or folder {name!r} here, and not to be had from the hub "
            f"({one_line(error)})"
        ) from None
