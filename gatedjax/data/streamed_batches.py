"""Global batches of rows of which some come from streams."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain

from gatedjax.data.batch import Batch, stack_rows
from gatedjax.data.document_stream import State
from gatedjax.data.streaming import StreamReader


class StreamedBlock:
    """As `Block`, where some of the sources are streams: global batches, read in order.

    Args:
      files: the endless windows of the sources that are files.
      readers: open a stream, at a place or at its beginning.
      weights: of all sources.
      batch_size: rows of a global batch.
      rows: which of them this process holds.
    """

    def __init__(
        self,
        files: Mapping[str, Any],
        readers: Mapping[str, Callable[[State | None], StreamReader]],
        weights: Mapping[str, float],
        batch_size: int,
        rows: Sequence[int],
    ):
        self.batch_size = batch_size
        self.rows = frozenset(rows)
        self.files = files
        self._readers = readers
        names = sorted(weights)
        # The same interleaving as that of files alone.
        self._order: Any = grain.MapDataset.mix(
            [_Numbers(name) for name in names],
            [weights[name] for name in names],
        )

    def source_of(self, row: int) -> tuple[str, int]:
        """Which source a row of the global order is of, and which of its rows it is."""
        return self._order[row]

    def opened(self, places: Mapping[str, State]) -> dict[str, StreamReader]:
        """The streams, at these places; at their beginning where none is given."""
        return {name: read(places.get(name)) for name, read in self._readers.items()}


class _Numbers(grain.MapDataset[tuple[str, int]]):
    """The numbers of a source's rows, without end."""

    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: Any) -> Any:
        return self._name, index


class StreamedBatches(Iterator[Batch]):
    """The global batches of a `StreamedBlock` from a row on, and where its streams are then."""

    def __init__(self, block: StreamedBlock, first_row: int, places: Mapping[str, State]):
        self._block = block
        self._next_row = first_row
        self._streams = block.opened(places)

    def __next__(self) -> Batch:
        own = []
        for row in range(self._block.batch_size):
            name, number = self._block.source_of(self._next_row + row)
            is_own = row in self._block.rows
            if name in self._streams:
                # What other processes hold is read too: the next row begins behind it.
                made = self._streams[name].next_row()
                if is_own:
                    own.append(made)
            elif is_own:
                own.append(self._block.files[name][number])
        self._next_row += self._block.batch_size
        return stack_rows(own)

    def get_state(self) -> dict[str, State]:
        """The place of each stream, by the name that grain's prefetching calls."""
        return {name: stream.state() for name, stream in self._streams.items()}
