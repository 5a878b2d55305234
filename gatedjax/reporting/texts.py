"""The texts of a command that has several: `--texts=a=PATH,b=PATH`."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from flax.core import FrozenDict

from gatedjax.config import DataConfig, SourceConfig
from gatedjax.data import Batch, batches, make_dataset
from gatedjax.errors import InputError, require
from gatedjax.sharding import my_rows
from gatedjax.training.run import Run


def parsed_texts(values: list[str], *taken: str) -> dict[str, str]:
    """NAME=PATH, two or more with names of their own.

    Args:
      values: of the flag --texts.
      taken: names that mean something else.

    Raises:
      InputError: fewer, a value without a name or a path, a name that is there twice.
    """
    require(len(values) > 1, "--texts", ",".join(values), "NAME=PATH,NAME=PATH, two or more")
    texts: dict[str, str] = {}
    for value in values:
        name, _, path = value.partition("=")
        if not (name.isidentifier() and path):
            raise InputError(f"--texts: got {value!r}, expected NAME=PATH")
        require(name not in texts and name not in taken, "--texts", name, "names that differ")
        # Runs are started elsewhere.
        texts[name] = str(Path(path).expanduser().absolute())
    return texts


class Texts:
    """Batches of several texts, in the rows of a run.

    Attributes:
      names: of the texts.
    """

    def __init__(self, run: Run, paths: Mapping[str, str]):
        self.names = tuple(paths)
        self._run = run
        self._data = {}
        for name, path in paths.items():
            source = SourceConfig(kind="text", path=path)
            sources = FrozenDict({name: source})
            self._data[name] = dataclasses.replace(run.config.data, sources=sources)
        self._streams = {name: batches(self._dataset(name, "train")) for name in paths}
        self._turn = itertools.cycle(self.names)

    def next_batch(self) -> Batch:
        """A training batch of one of the texts, by turns."""
        return next(self._streams[next(self._turn)])

    def training(self, name: str, count: int) -> Iterator[Batch]:
        """The first training batches of a text."""
        return itertools.islice(batches(self._dataset(name, "train")), count)

    def validation(self, name: str, count: int) -> Iterator[Batch]:
        """The first validation batches of a text."""
        return itertools.islice(batches(self._dataset(name, "validation")), count)

    def _dataset(self, name: str, split: Literal["train", "validation"]):
        data: DataConfig = self._data[name]
        rows = self._run.config.train.batch_size
        rows_here = my_rows(self._run.mesh, rows)
        return make_dataset(data, split, batch_size=rows, rows=rows_here, seed=data.seed)
