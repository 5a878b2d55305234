"""Text in a bucket: a file, a folder or a pattern, of the kinds that are files.

What is there is listed with every start, and nothing is read: an object's version is what changes
with it. A file is fetched when its turn to be tokenized comes, read from this machine's disk, and
deleted again: one at a time is here.
"""

import glob
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from gatedjax import buckets
from gatedjax.config import SourceConfig
from gatedjax.data.formats import Documents, one_line
from gatedjax.errors import InputError
from gatedjax.paths import Place

# Kinds that are folders with a format of their own.
_NOT_FILES = ("hf_disk", "hf")
# What stores call the version of an object: Cloud Storage, S3.
_VERSIONS = ("generation", "ETag")


@dataclass(frozen=True)
class BucketFiles:
    """The files of a source.

    root: the folder that their names are relative to.
    versions: (relative name, bytes, version) of each, in order.
    """

    root: Place
    files: tuple[Place, ...]
    versions: list[tuple[str, int, str]]


def find(
    key: str,
    cfg: SourceConfig,
    place: Place,
    belongs: Callable[[Path], bool],
) -> BucketFiles:
    """What a source's path names in a bucket.

    Args:
      key: of the configuration, for messages.
      cfg: the source.
      place: its path.
      belongs: which files of a folder are of the source's kind.

    Raises:
      InputError: a kind that is no file, nothing there, or the bucket cannot be used.
      StorageError: nobody answers.
    """
    if cfg.kind in _NOT_FILES:
        raise InputError(f"{key}: got {place}, expected a folder on this machine for {cfg.kind}")
    files = buckets.file_system(place)
    with buckets.errors(f"{key}: cannot use {place}", place):
        if glob.has_magic(cfg.path):
            fixed = itertools.takewhile(lambda part: not glob.has_magic(part), place.parts)
            root = epath.Path(*fixed)
            # A listing first: of a bucket that is not there, a pattern matches nothing.
            files.find(os.fspath(root), maxdepth=1)
            found = files.glob(os.fspath(place), detail=True)
            nothing = f"{key}: {cfg.path!r} matches no file"
        else:
            found = files.find(os.fspath(place), detail=True)
            root = place
            nothing = f"{key}: {cfg.path!r} holds no file of kind {cfg.kind}"
        if not found:
            raise InputError(nothing)
        own_name = files._strip_protocol(os.fspath(place))
        if list(found) == [own_name]:
            root = place.parent
    start = files._strip_protocol(os.fspath(root)).rstrip("/")
    versions = []
    for name, info in sorted(found.items()):
        relative = name.removeprefix(f"{start}/")
        is_file = info.get("type") == "file" and not name.endswith("/")
        is_hidden = any(part.startswith(".") for part in relative.split("/"))
        if not is_file or (is_hidden and name != own_name):
            continue
        if root != place.parent and not glob.has_magic(cfg.path) and not belongs(Path(relative)):
            continue
        versions.append((relative, int(info["size"] or 0), _version(info)))
    if not versions:
        raise InputError(nothing)
    paths = tuple(root / relative for relative, _, _ in versions)
    return BucketFiles(root, paths, versions)


def _version(info: dict[str, Any]) -> str:
    for name in _VERSIONS:
        if info.get(name):
            return str(info[name])
    return str(info.get("LastModified") or info.get("updated") or "")


class Fetched:
    """The documents of a file in a bucket, which is here only while they are read."""

    def __init__(self, place: Place, open_file: Callable[[Path], Documents]):
        """Reads nothing.

        Args:
          place: of the file.
          open_file: opens it, once it is on this machine.
        """
        self._place = place
        self._open = open_file
        self._length: int | None = None

    def __len__(self) -> int:
        if self._length is None:
            self._length = sum(1 for _ in self)
        return self._length

    def __iter__(self) -> Iterator[str | None]:
        with tempfile.TemporaryDirectory(prefix="gatedjax-") as folder:
            # Of the same name: its ending says whether it is compressed.
            file = Path(folder, self._place.name)
            with buckets.errors(f"could not read {self._place}", self._place):
                buckets.download(self._place, file)
            try:
                documents = self._open(file)
                yield from documents
                self._length = len(documents)
            except (InputError, OSError, ValueError, RuntimeError) as error:
                said = one_line(error).replace(str(file), str(self._place))
                raise InputError(said) from None
