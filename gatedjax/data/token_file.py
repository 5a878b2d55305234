"""The token stream of a split, read from its file piece by piece."""

import operator
import os
from pathlib import Path
from typing import SupportsIndex

import numpy as np
from jaxtyping import Integer

from gatedjax.errors import TrainingError


class TokenFile:
    """The tokens of a split: `len`, one token by its index, and slices of step 1 as arrays.

    A slice is read from the file when it is asked for. This is not a memory map: if the file is
    cut short or its disk goes away under a running process, a map ends the process with SIGBUS, a
    read with an error message. A deleted file stays readable as long as it is open.
    """

    def __init__(self, path: Path, dtype: str, length: int):
        self._path = path
        self._dtype = np.dtype(dtype)
        self._length = length
        self._file = open(path, "rb")  # noqa: SIM115 (open as long as the dataset)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: slice | SupportsIndex) -> Integer[np.ndarray | np.generic, "..."]:
        """The tokens of a slice, or one token.

        Raises:
          TrainingError: the file no longer holds them.
        """
        if not isinstance(index, slice):
            return self._read(operator.index(index), 1)[0]
        start, stop, step = index.indices(self._length)
        assert step == 1, "tokens are read in one piece"
        return self._read(start, max(stop - start, 0))

    def _read(self, start: int, count: int) -> Integer[np.ndarray, "tokens"]:
        size = count * self._dtype.itemsize
        offset = start * self._dtype.itemsize
        data = b""
        problem = ""
        try:
            # pread: threads share the file, and none moves the position of another.
            data = os.pread(self._file.fileno(), size, offset)
        except OSError as e:
            problem = f" ({e.strerror})"
        if len(data) != size:
            raise TrainingError(
                f"{self._path}: {len(data)} bytes could be read, expected {size}{problem}; "
                "the token cache was changed while the run was reading it"
            )
        return np.frombuffer(data, self._dtype)
