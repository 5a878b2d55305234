"""Global batches of rows of which some come from streams."""

import queue
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain

from gatedjax.data.batch import Batch, stack_rows
from gatedjax.data.document_stream import State
from gatedjax.data.streaming import StreamReader

# How often a thread that has made enough looks whether it is still needed.
LOOK_SECONDS = 0.5

# A batch and the places of the streams behind it, or why there is none.
Made = tuple[Batch, dict[str, State]] | Exception


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

    def places(self) -> dict[str, State]:
        """The place of each stream."""
        return {name: stream.state() for name, stream in self._streams.items()}


class ReadAhead(Iterator[Batch]):
    """Batches that a thread makes ahead, and the places that belong to the one given last.

    Args:
      batches: what the thread reads, and nobody else.
      count: batches that are held at most, 1 or more.
    """

    def __init__(self, batches: StreamedBatches, count: int):
        self._places = batches.places()
        self._made: queue.Queue[Made] = queue.Queue(maxsize=count)
        # The thread knows nothing of this object, which would never go otherwise.
        stop = threading.Event()
        weakref.finalize(self, stop.set)
        thread = threading.Thread(
            target=_make,
            args=(batches, self._made, stop),
            daemon=True,
        )
        thread.start()

    def __next__(self) -> Batch:
        made = self._made.get()
        if isinstance(made, Exception):
            # Whoever asks once more is told so again.
            self._made.put(made)
            raise made
        batch, self._places = made
        return batch

    def places(self) -> dict[str, State]:
        """The place of each stream behind the batch that was given last."""
        return self._places


def _make(batches: StreamedBatches, made: "queue.Queue[Made]", stop: threading.Event) -> None:
    """What the thread does: batches without end, or up to the one that cannot be made."""
    result: Made | None = None
    while not stop.is_set() and not isinstance(result, Exception):
        try:
            result = (next(batches), batches.places())
        except Exception as error:  # it is raised where the batch is asked for
            result = error
        _put(made, result, stop)


def _put(made: "queue.Queue[Made]", result: Made, stop: threading.Event) -> None:
    """Waits for space in the queue, as long as somebody may take what is in it."""
    while not stop.is_set():
        try:
            made.put(result, timeout=LOOK_SECONDS)
        except queue.Full:
            continue
        return
