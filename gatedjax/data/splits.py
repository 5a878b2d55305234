"""Which documents of a source are for training and which for validation.

The hash of a document's text decides, and nothing else: the same text is on the same side in every
source, under any name, and a document's side does not depend on the others. Two exceptions, for
sources so small that one side would stay empty: the document nearest to that side crosses over, and
a source of one text (however often it stands there) is cut in two. `open_corpora.corpora` refuses
sources that contradict each other through an exception.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = get_args(Split)

HASH_BYTES = 8
HASH_RANGE = 2**64

# Where an exception puts a document.
Side = Literal["train", "validation", "cut"]


def content_hash(data: bytes) -> int:
    """A document's hash, uniform below 2^64; `data` is its text in UTF-8."""
    digest = hashlib.sha256(data).digest()
    return int.from_bytes(digest[:HASH_BYTES], "big")


def by_hash(document: int, validation_fraction: float) -> Split:
    """The side of the document with this hash."""
    is_validation = document / HASH_RANGE < validation_fraction
    return "validation" if is_validation else "train"


@dataclass(frozen=True)
class Exceptional:
    """A document that the rule does not decide: its hash, and where it goes."""

    document: int
    side: Side


class Splitter:
    """Sends documents to their side, and remembers what an exception is decided by."""

    def __init__(self, validation_fraction: float, exception: Exceptional | None = None):
        self.exception = exception
        self._fraction = validation_fraction
        self._found: set[Split] = set()
        self._lowest = HASH_RANGE
        self._highest = -1

    def parts(self, text: str, data: bytes) -> Iterator[tuple[Split, str, bytes]]:
        """(side, text, the same in UTF-8) of a document, or of the two parts of a cut one."""
        document = content_hash(data)
        self._lowest = min(self._lowest, document)
        self._highest = max(self._highest, document)
        side = side_of(document, self._fraction, self.exception)
        if side == "cut":
            pieces = cut_in_two(text, self._fraction)
            for split, piece in zip(SPLITS, pieces):
                self._found.add(split)
                yield split, piece, piece.encode()
        else:
            self._found.add(side)
            yield side, text, data

    def missing(self) -> Exceptional | None:
        """After all documents: the exception without which one side would have none.

        None if no exception is needed, or there are no documents.
        """
        if self._lowest > self._highest or len(self._found) == len(SPLITS):
            return None
        if self._fraction == 1:
            # Everything is held out, and that is meant.
            return None
        if self._lowest == self._highest:
            return Exceptional(self._lowest, "cut")
        if "validation" in self._found:
            return Exceptional(self._highest, "train")
        return Exceptional(self._lowest, "validation")


def side_of(
    document: int,
    validation_fraction: float,
    exception: Exceptional | None,
) -> Side:
    """Where a source with this exception puts the document with this hash."""
    if exception is not None and document == exception.document:
        return exception.side
    return by_hash(document, validation_fraction)


def cut_in_two(text: str, validation_fraction: float) -> tuple[str, str]:
    """The two parts of a text, for training and for validation, cut at a line end if there is one.

    The line end is looked for in the second half of the training part.
    """
    target = int(len(text) * (1 - validation_fraction))
    line_end = text.rfind("\n", target // 2, target)
    cut = target if line_end < 0 else line_end + 1
    return text[:cut], text[cut:]
