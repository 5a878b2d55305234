"""Where text comes from: the files of a source, in a fixed order.

`open_source` looks at names, sizes and dates only, so it is quick; files are read when a corpus is
tokenized. The order of documents is fixed: files by relative path, rows in the order of the file.
"""

import contextlib
import glob
import itertools
import os
import stat
import sysconfig
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from gatedjax.config import SourceConfig
from gatedjax.data import bucket_source
from gatedjax.data.chat import open_conversations
from gatedjax.data.formats import (
    ArrayRecordFile,
    CompressedJsonLines,
    Documents,
    JsonLines,
    ParquetFile,
    SavedDataset,
    TextFile,
    one_line,
)
from gatedjax.errors import InputError
from gatedjax.files import kind_of
from gatedjax.paths import Place, expand_place, is_bucket

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
TEST_FOLDERS = {"test", "tests", "idle_test"}
NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Source:
    """The files of one source.

    root: the folder that the names of the files are relative to.
    open: reads one of the files.
    versions: of files in a bucket, what `listing` gives.
    """

    name: str
    kind: str
    root: PurePath
    files: tuple[PurePath, ...]
    field: str
    open: Callable[[Any], Documents]
    versions: list[tuple[str, int, str]] | None = None

    def relative(self, file: PurePath) -> str:
        """The name of a file below `root`, the same on every operating system."""
        return file.relative_to(self.root).as_posix()

    def listing(self) -> list[tuple[str, int, int | str]]:
        """(relative path, bytes, modification time in ns, or version in a bucket) of each file.

        A source has changed if its listing has.
        """
        if self.versions is not None:
            return list(self.versions)
        files = self.files
        if self.kind == "hf_disk":
            # A saved Dataset is opened as a folder; the files in it are what changes.
            with _naming_errors(self.root):
                files = _files_under(Path(self.root), _any_file)
        entries: list[tuple[str, int, int | str]] = []
        with _naming_errors(self.root):
            for file in files:
                status = Path(file).stat()
                entries.append((self.relative(file), status.st_size, status.st_mtime_ns))
        return entries

    def parts(self) -> list[tuple[str, Documents]]:
        """Opens every file: (relative path, its documents)."""
        parts = []
        for file in self.files:
            with _naming_errors(file):
                parts.append((self.relative(file), self.open(file)))
        return parts

    def texts(self) -> Iterator[str | None]:
        """The texts of all parts in order; None where a file is not UTF-8."""
        for name, documents in self.parts():
            yield from self.read(name, documents)

    def read(self, name: str, documents: Documents) -> Iterator[str | None]:
        """The texts of one part; whatever fails below becomes an InputError that names the file."""
        path = self.root / name
        count = 0
        with _naming_errors(path):
            for text in documents:
                count += 1
                yield text
        if count != len(documents):
            raise InputError(f"{path}: {count} documents could be read, expected {len(documents)}")


@dataclass(frozen=True)
class Format:
    """A kind of source: which files of a folder belong to it, and what opens one.

    open: given a file and the configuration's `field`.
    """

    belongs: Callable[[Path], bool]
    open: Callable[[Path, str], Documents]


def open_source(name: str, cfg: SourceConfig) -> Source:
    """The source that `cfg` describes; `name` is its key in the configuration.

    Raises:
      InputError: unknown kind, a path that is missing or holds no file of this kind.
    """
    if cfg.kind == "python_stdlib":
        return _python_stdlib(name)
    if cfg.kind not in _FORMATS:
        known = ", ".join(["python_stdlib", *_FORMATS])
        raise InputError(f"sources.{name}.kind: got {cfg.kind!r}, expected one of {known}")
    if not cfg.path:
        raise InputError(
            f"sources.{name}.path: empty, expected a file or folder for kind {cfg.kind}"
        )
    key = f"sources.{name}.path"
    path = expand_place(cfg.path, key, whole_bucket=True)
    file_format = _FORMATS[cfg.kind]
    if is_bucket(path):
        return _in_bucket(name, cfg, path, file_format)
    path = Path(path).absolute()

    def open_file(file: Path) -> Documents:
        return file_format.open(file, cfg.field)

    if glob.has_magic(cfg.path) and not path.exists():
        root, files = _matching(key, path)
        return Source(
            name=name,
            kind=cfg.kind,
            root=root,
            files=files,
            field=cfg.field,
            open=open_file,
        )
    mode = _mode_of(key, path)
    if cfg.kind == "hf_disk":
        # A saved Dataset is a folder that is opened as one.
        root = path
        files = (path,)
    elif stat.S_ISREG(mode):
        root = path.parent
        files = (path,)
    elif stat.S_ISDIR(mode):
        root = path
        with _naming_errors(path):
            files = _files_under(path, file_format.belongs)
    else:
        raise InputError(f"{key}: {cfg.path!r} is {kind_of(mode)}, expected a file or folder")
    if not files:
        raise InputError(f"{key}: {cfg.path!r} holds no file of kind {cfg.kind}")
    return Source(
        name=name,
        kind=cfg.kind,
        root=root,
        files=files,
        field=cfg.field,
        open=open_file,
    )


def _in_bucket(
    name: str,
    cfg: SourceConfig,
    place: Place,
    file_format: Format,
) -> Source:
    """A source in a bucket, whose files are fetched one by one."""
    found = bucket_source.find(
        f"sources.{name}.path",
        cfg,
        place,
        file_format.belongs,
    )

    def open_file(file: Place) -> Documents:
        return bucket_source.Fetched(file, lambda here: file_format.open(here, cfg.field))

    return Source(
        name=name,
        kind=cfg.kind,
        root=found.root,
        files=found.files,
        field=cfg.field,
        open=open_file,
        versions=found.versions,
    )


def _python_stdlib(name: str) -> Source:
    """The source files of the standard library of this Python, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    with _naming_errors(root):
        files = _files_under(root, _is_python, TEST_FOLDERS | NOT_STDLIB)
    return Source(
        name=name,
        kind="python_stdlib",
        root=root,
        files=files,
        field="",
        open=TextFile,
    )


def _matching(key: str, pattern: Path) -> tuple[Path, tuple[Path, ...]]:
    """The folder before the first wildcard of a pattern, and the files that it matches, in order.

    Raises:
      InputError: it matches none, or something that is no file.
    """
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts)
    root = Path(*fixed)
    matches = glob.glob(str(pattern), recursive=True)
    files = []
    for match in matches:
        path = Path(match)
        mode = _mode_of(key, path)
        # With ** folders match too.
        if not stat.S_ISDIR(mode):
            if not stat.S_ISREG(mode):
                raise InputError(f"{path}: is {kind_of(mode)}, expected files and folders")
            files.append(path)
    if not files:
        raise InputError(f"{key}: {str(pattern)!r} matches no file")
    return root, tuple(sorted(files, key=lambda file: file.relative_to(root).as_posix()))


def _any_file(file: Path) -> bool:
    return True


def _is_python(file: Path) -> bool:
    return file.suffix == ".py"


def _is_json_lines(file: Path) -> bool:
    name = file.name.removesuffix(".gz").removesuffix(".zst")
    return name.endswith((".jsonl", ".ndjson"))


def _open_json_lines(file: Path, field: str) -> Documents:
    if file.suffix in (".gz", ".zst"):
        return CompressedJsonLines(file, field)
    return JsonLines(file, field)


def _is_parquet(file: Path) -> bool:
    return file.suffix == ".parquet"


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


def _is_array_record(file: Path) -> bool:
    # Shards are named x.array_record-00000-of-00008.
    return ".array_record" in file.name or ".arrayrecord" in file.name


def _open_text(file: Path, field: str) -> Documents:
    return TextFile(file)


_FORMATS = {
    "text": Format(_any_file, _open_text),
    "jsonl": Format(_is_json_lines, _open_json_lines),
    "parquet": Format(_is_parquet, ParquetFile),
    "array_record": Format(_is_array_record, ArrayRecordFile),
    "hf_disk": Format(_any_file, SavedDataset),
    "chat": Format(_is_json_lines, open_conversations),
    # Read by `images`.
    "images": Format(_is_image, _open_text),
    "image_parquet": Format(_is_parquet, ParquetFile),
}


def _files_under(
    root: Path, belongs: Callable[[Path], bool], left_out: Collection[str] = ()
) -> tuple[Path, ...]:
    """The files under `root` that `belongs` accepts, by relative path.

    Hidden files and folders are left out, and folders named in `left_out`.

    Raises:
      OSError: a subfolder that cannot be read, or a file whose state cannot be asked.
      InputError: a pipe, a device or a socket among the files.
    """
    found = []
    for folder, subfolders, names in os.walk(root, onerror=_refuse):
        # os.walk descends into what is left in its list.
        subfolders[:] = [f for f in subfolders if f not in left_out and not f.startswith(".")]
        for name in names:
            file = Path(folder, name)
            if name.startswith(".") or not belongs(file):
                continue
            mode = file.stat().st_mode
            if not stat.S_ISREG(mode):
                raise InputError(f"{file}: is {kind_of(mode)}, expected files and folders")
            found.append(file)

    def relative(file: Path) -> str:
        return file.relative_to(root).as_posix()

    return tuple(sorted(found, key=relative))


@contextlib.contextmanager
def _naming_errors(path: PurePath) -> Iterator[None]:
    """OSError, and what the libraries of the formats raise, as one line that names the file."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, MemoryError) as e:
        raise InputError(f"{path}: cannot be read ({one_line(e)})") from None


def _refuse(error: OSError) -> None:
    """What os.walk calls on a folder that it cannot read; left alone, it would go on without."""
    raise error


def _mode_of(key: str, path: Path) -> int:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{key}: {str(path)!r} does not exist") from None
    except OSError as e:
        raise InputError(f"{key}: {str(path)[:200]!r} cannot be used ({e.strerror})") from None
