"""safetensors files: headers checked before they are believed, tensors as views of mapped files.

A file is 8 bytes with the length of its header, the header (JSON: for each tensor its dtype, shape
and place), and the numbers. Nothing in it is executed. What a header says is held to the size of
the file before anything of that size is read or allocated. A large model is cut into several files,
which `model.safetensors.index.json` names.
"""

import json
import math
import mmap
import os
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from gatedjax.errors import InputError, shown
from gatedjax.files import open_plain, read_plain

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The library that defines the format reads no larger header.
LARGEST_HEADER = 100_000_000
LARGEST_INDEX = 100_000_000
# Bytes of a file that is written; a larger model is cut. The hub's own limit is ten times that.
SHARD_BYTES = 5 * 10**9

# Of the format; parameters are one of these.
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What a file name of an index may be: no way out of the folder.
_FILE_NAME = re.compile(r"[\w-][\w.-]*\.safetensors", re.ASCII)
_LENGTH_BYTES = 8


class Tensor(NamedTuple):
    """Where a tensor stands.

    begin, end: its bytes, counted from the beginning of the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def __str__(self) -> str:
        """Dtype and shape, for a message."""
        return f"{self.dtype}{list(self.shape)}"


def tensors_of_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint in one file or several, by name. Only headers are read.

    Raises:
      InputError: no such file; a file that is cut off, or has no valid header; an index that does
        not say what the files hold.
    """
    index = folder / INDEX
    if not index.exists():
        if not (folder / FILE).exists():
            raise InputError(f"{folder}: holds neither {FILE} nor {INDEX}")
        return tensors_of_file(folder / FILE)
    file_of = _weight_map(index)
    tensors = {}
    for name in sorted(set(file_of.values())):
        path = folder / name
        if not path.exists():
            raise InputError(f"{index}: names {name}, which is not there")
        here = tensors_of_file(path)
        named = {tensor for tensor, file in file_of.items() if file == name}
        for tensor in sorted(here.keys() ^ named)[:1]:
            where = "holds it" if tensor in here else "lacks it"
            raise InputError(f"{index}: does not fit its files: {shown(tensor)}: {name} {where}")
        tensors |= here
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file, as an index has it."""
    body = read_json(index, LARGEST_INDEX)
    file_of = body.get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise InputError(f"{index}: weight_map: got {shown(file_of)}, expected tensors and files")
    for tensor, file in file_of.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            expected = "the name of a .safetensors file beside it"
            raise InputError(f"{index}: {shown(tensor)}: got {shown(file)}, expected {expected}")
    return file_of


def read_json(path: Path, largest: int) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
      InputError: it is not there, no plain file, too large or something else.
    """
    try:
        body = json.loads(read_plain(path, largest))
    except (OSError, RecursionError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason})") from None
    if not isinstance(body, dict):
        raise InputError(f"{path}: got {shown(body)}, expected a JSON object")
    return body


def tensors_of_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, by name. Only its header is read.

    Raises:
      InputError: the file is cut off, or has no valid header.
    """
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(path, file.read(_LENGTH_BYTES), size)
            text = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        header = json.loads(text)
    except (RecursionError, ValueError):
        header = None
    if not isinstance(header, dict):
        raise InputError(f"{path}: its header is no JSON object")
    first = _LENGTH_BYTES + length
    tensors = {}
    end = first
    for name, entry in header.items():
        if name != "__metadata__":
            tensors[name] = _tensor(path, name, entry, first)
            end = max(end, tensors[name].end)
    if size != end:
        what = "it is cut off" if size < end else "something stands behind its tensors"
        raise InputError(f"{path}: got {size:,} bytes, expected {end:,}: {what}")
    return tensors


def _header_length(path: Path, first_bytes: bytes, size: int) -> int:
    """The length of the header; InputError where the file could not hold it."""
    if len(first_bytes) < _LENGTH_BYTES:
        raise InputError(f"{path}: got {size} bytes, expected a safetensors file")
    (length,) = struct.unpack("<Q", first_bytes)
    most = min(LARGEST_HEADER, size - _LENGTH_BYTES)
    if length > most:
        raise InputError(
            f"{path}: got a header of {length:,} bytes, expected at most {most:,} in a file of "
            f"{size:,}"
        )
    return length


def _tensor(
    path: Path,
    name: str,
    entry: Any,
    first: int,
) -> Tensor:
    """A tensor as its entry in the header says.

    Args:
      path: of the file.
      name: of the tensor.
      entry: of the header.
      first: byte of the file that the header's offsets count from.
    """
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    # Of a stranger's file: anything, until it was looked at.
    dtype: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    is_whole = isinstance(dtype, str) and _are_counts(shape) and _are_counts(offsets)
    if not is_whole or len(offsets) != 2 or offsets[0] > offsets[1]:
        expected = "dtype, shape and data_offsets"
        raise InputError(f"{path}: {shown(name)}: got {shown(entry)}, expected {expected}")
    begin, end = offsets
    if dtype in DTYPES:
        needed = math.prod(shape) * DTYPES[dtype].itemsize
        if end - begin != needed:
            got = f"{end - begin:,} bytes for {dtype}{shape}"
            raise InputError(f"{path}: {shown(name)}: got {got}, expected {needed:,}")
    return Tensor(path, dtype, tuple(shape), first + begin, first + end)


def _are_counts(values: Any) -> bool:
    is_list = isinstance(values, list)
    return is_list and all(type(value) is int and 0 <= value < 2**63 for value in values)


class MappedFiles:
    """Tensors as read-only views of files that are mapped into memory, and not read until used."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def view(self, tensor: Tensor) -> np.ndarray:
        """The tensor; what of it is looked at is read from disk then."""
        if tensor.begin == tensor.end:
            return np.zeros(tensor.shape, DTYPES[tensor.dtype])
        if tensor.file not in self._maps:
            with open_plain(tensor.file) as file:
                self._maps[tensor.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        flat = np.frombuffer(
            self._maps[tensor.file],
            np.uint8,
            count=tensor.end - tensor.begin,
            offset=tensor.begin,
        )
        return flat.view(DTYPES[tensor.dtype]).reshape(tensor.shape)

    def forget_pages(self) -> None:
        """Gives back the memory of what was looked at: it can be read again."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)


class Planned(NamedTuple):
    """A tensor to write."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def in_shards(plan: Iterable[Planned], shard_bytes: int = SHARD_BYTES) -> list[list[Planned]]:
    """The tensors in order, cut into files of at most so many bytes; one tensor is never cut."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for planned in plan:
        if shards[-1] and size + planned.size > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(planned)
        size += planned.size
    return shards


def file_names(count: int) -> list[str]:
    """The names of a checkpoint's files, as the hub has them."""
    if count == 1:
        return [FILE]
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def header_of(plan: Iterable[Planned]) -> bytes:
    """What stands before the numbers of a file: the header's length and the header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for planned in plan:
        end = begin + planned.size
        header[planned.name] = {
            "dtype": _NAMES[planned.dtype],
            "shape": list(planned.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # Spaces to a multiple of 8: the numbers then lie as processors like them.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class FileWriter:
    """Writes one file, a tensor at a time, in the order of its plan. Use as a context manager."""

    def __init__(self, path: Path, plan: list[Planned]):
        self._left = list(reversed(plan))
        self._file = path.open("wb")
        self._file.write(header_of(plan))

    def write(self, array: np.ndarray) -> None:
        """The numbers of the next tensor."""
        planned = self._left.pop()
        is_planned = array.shape == planned.shape and array.dtype == planned.dtype
        assert is_planned, planned.name
        # As bytes: the file knows nothing of bfloat16.
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def __enter__(self) -> "FileWriter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()


def index_of(shards: Mapping[str, list[Planned]]) -> dict[str, Any]:
    """The index of a checkpoint in several files: file -> its tensors."""
    weight_map = {}
    total = 0
    for file, plan in shards.items():
        for planned in plan:
            weight_map[planned.name] = file
            total += planned.size
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
