"""Global batches one after another, and where they go on."""

from collections.abc import Callable, Iterator, Mapping

import grain

from gatedjax.data.batch import Batch
from gatedjax.data.blocks import Block
from gatedjax.data.document_stream import State
from gatedjax.data.streamed_batches import ReadAhead, StreamedBatches, StreamedBlock


class BatchIterator(Iterator[Batch]):
    """Global batches in order.

    `next_index`, the row of the global order that comes next, is the whole state, with the places
    of streams where there are some: `batches(dataset, next_index, places)` goes on from here, also
    for a dataset of another batch size.
    """

    def __init__(
        self,
        iterator: Iterator[Batch],
        next_index: int,
        batch_size: int,
        places: Callable[[], Mapping[str, State]] = dict,
    ):
        self._iterator = iterator
        self._batch_size = batch_size
        self._places = places
        self.next_index = next_index

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self.next_index += self._batch_size
        return batch

    def places(self) -> dict[str, State]:
        """Where each stream goes on, by the name of its source; {} without streams."""
        return dict(self._places())


def batches(
    dataset: Block | StreamedBlock,
    start: int = 0,
    places: Mapping[str, State] | None = None,
    *,
    num_threads: int = 1,
    prefetch: int = 4,
) -> BatchIterator:
    """Iterates over global batches; they are the same for any number of threads.

    Args:
      dataset: of `make_dataset` or `recall_dataset`.
      start: the row of the global order that the first batch begins with.
      places: where streams go on (`BatchIterator.places`); they begin anew where none is given.
      num_threads: that read ahead; 0 reads in the caller's thread.
      prefetch: batches that are read ahead.

    Returns:
      The iterator, which also says the row that comes next.

    Raises:
      ValueError: a negative start.
      InputError: a stream cannot be read, or the place in it is none.
    """
    if start < 0:
        raise ValueError(f"start: got {start}, expected at least 0")
    if isinstance(dataset, StreamedBlock):
        read = StreamedBatches(dataset, start, places or {})
        # A stream has one reader: documents come one after another.
        ahead = ReadAhead(read, prefetch) if num_threads and prefetch else read
        return BatchIterator(
            ahead,
            start,
            dataset.batch_size,
            ahead.places,
        )
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0
    )
    blocks = dataset.between(start) if start else dataset
    iterator = iter(blocks.to_iter_dataset(options))
    return BatchIterator(iterator, blocks.first_row, dataset.batch_size)
