"""Log-likelihoods of continuations, many short documents in a row: what evaluation harnesses ask.

`scoring.py` has a row for each document, this has as many in a row as fit. Documents of a row do
not see each other, so the numbers are the same.
"""

import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, PyTree

from gatedjax.config import ModelConfig
from gatedjax.evaluation.scoring import OfTokens, Score, predicted_rows

# Rows are not shorter.
LEAST_LENGTH = 16


class Request(NamedTuple):
    """A continuation after a context, as ids: what the model sees, and what it is asked about.

    The context has a token at least: the first token of a document has nothing that predicts it.
    """

    context: Sequence[int]
    continuation: Sequence[int]


class Place(NamedTuple):
    """Where a document lies in a batch: its places from `start` on."""

    request: int
    row: int
    start: int


class Packing(NamedTuple):
    """A batch: the length of its rows, and what lies where."""

    length: int
    places: list[Place]


class Batch(NamedTuple):
    """What the model reads, what it is asked about each token, and where that counts."""

    tokens: Int[np.ndarray, "B T"]
    targets: Int[np.ndarray, "B T"]
    segment_ids: Int[np.ndarray, "B T"]
    mask: Float[np.ndarray, "B T"]


# A batch -> how its targets are predicted.
Forward = Callable[[Batch], OfTokens]


def packings(lengths: Sequence[int], num_rows: int) -> Iterator[Packing]:
    """Which documents are computed together, each of them once.

    The longest one that is left says how long the rows are, a power of two so that few programs are
    compiled; then every row takes the longest that still fits it. Batches come with falling
    lengths: what does not fit a device fails at once.

    Args:
      lengths: of the documents, tokens that are read.
      num_rows: of a batch.
    """
    left = sorted((length, i) for i, length in enumerate(lengths))
    while left:
        length = max(LEAST_LENGTH, 1 << (left[-1][0] - 1).bit_length())
        places = []
        for row in range(num_rows):
            start = 0
            while left:
                # The last one that is not longer than the rest of the row.
                at = bisect.bisect_right(left, (length - start, len(lengths))) - 1
                if at < 0:
                    break
                taken, request = left.pop(at)
                places.append(Place(request, row, start))
                start += taken
        yield Packing(length, places)


def batch_of(packing: Packing, requests: Sequence[Request], num_rows: int) -> Batch:
    """The arrays of a batch."""
    shape = (num_rows, packing.length)
    tokens = np.zeros(shape, np.int32)
    targets = np.zeros(shape, np.int32)
    segment_ids = np.zeros(shape, np.int32)
    mask = np.zeros(shape, np.float32)
    for number, place in enumerate(packing.places, start=1):
        request = requests[place.request]
        document = np.asarray([*request.context, *request.continuation], np.int32)
        end = place.start + len(document) - 1
        read = np.s_[place.row, place.start : end]
        tokens[read] = document[:-1]
        targets[read] = document[1:]
        segment_ids[read] = number
        mask[place.row, end - len(request.continuation) : end] = 1.0
    return Batch(tokens, targets, segment_ids, mask)


def truncated(request: Request, most: int) -> Request:
    """The end of a request of which the model is to read no more than `most` tokens."""
    whole = [*request.context, *request.continuation][-(most + 1) :]
    # The first token that is left has nothing that predicts it.
    context = len(whole) - min(len(request.continuation), len(whole) - 1)
    return Request(whole[:context], whole[context:])


def scores(
    forward: Forward,
    requests: Sequence[Request],
    *,
    most_tokens: int,
    batch_size: int = 8,
) -> list[Score]:
    """The score of each continuation, summed in float64.

    Args:
      forward: the model (`forward_of`).
      requests: what to score; one without a continuation scores 0.
      most_tokens: that the model reads of a document; of longer ones the end.
      batch_size: rows that are computed together.
    """
    found: list[Score] = [Score(0.0, 0, True)] * len(requests)
    asked = [i for i, request in enumerate(requests) if request.continuation]
    cut = [truncated(requests[i], most_tokens) for i in asked]
    lengths = [len(request.context) + len(request.continuation) - 1 for request in cut]
    for packing in packings(lengths, batch_size):
        given = forward(batch_of(packing, cut, batch_size))
        nats = np.asarray(given.nats, np.float64)
        is_best = np.asarray(given.is_best)
        for request, row, start in packing.places:
            count = len(cut[request].continuation)
            end = start + lengths[request]
            counted = np.s_[row, end - count : end]
            found[asked[request]] = Score(
                log_likelihood=-float(nats[counted].sum()),
                tokens=count,
                is_greedy=bool(is_best[counted].all()),
            )
    return found


def windows(tokens: Sequence[int], prefix: int, most: int) -> list[Request]:
    """A text of any length as requests in which every token is asked about once.

    Those after the first one begin with the last token of the one before; the last has all the
    context that it has room for.

    Args:
      tokens: of the text.
      prefix: the token that predicts the first one.
      most: tokens that the model reads.
    """
    given = [prefix, *tokens]
    requests = []
    done = 0
    while done < len(tokens):
        count = min(most, len(tokens) - done)
        end = done + count
        # As inputs: `given` up to `end`, of which at most `most`.
        first = max(end - most, 0) if done else 0
        requests.append(Request(given[first : done + 1], list(tokens[done:end])))
        done = end
    return requests


def forward_of(model: ModelConfig, params: PyTree) -> Forward:
    """The model as `scores` asks it."""

    def forward(batch: Batch) -> OfTokens:
        return jax.device_get(predicted_rows(model, params, *batch))

    return forward
