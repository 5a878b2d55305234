"""Which documents of a source are for training and which for validation."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool

from gatedjax.data.sources import Source

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = get_args(Split)

HASH_BYTES = 8
HASH_RANGE = 2.0**64


def labeled_documents(
    source: Source, validation_fraction: float
) -> Iterator[tuple[str | None, bool]]:
    """(text, whether it is for validation) of each document, in order.

    A text is None where a file is not UTF-8. A source of one document is cut in two.
    """
    parts = source.parts()
    keys = []
    for name, documents in parts:
        keys.extend(f"{name}:{row}" for row in range(len(documents)))
    texts = (text for name, documents in parts for text in source.read(name, documents))
    if len(keys) != 1:
        yield from zip(texts, is_validation(keys, validation_fraction).tolist())
        return
    whole = next(texts)
    if not whole:
        yield whole, False
        return
    train, validation = cut_in_two(whole, validation_fraction)
    yield train, False
    yield validation, True


def is_validation(keys: Sequence[str], validation_fraction: float) -> Bool[np.ndarray, "documents"]:
    """For the key of each document, whether it is for validation.

    The hash of a key decides, so a document's split does not depend on the others; but of several
    documents at least one is on either side.
    """
    first_bytes = b""
    for key in keys:
        # File names may hold bytes that are not UTF-8.
        digest = hashlib.sha256(key.encode(errors="surrogateescape")).digest()
        first_bytes += digest[:HASH_BYTES]
    # Uniform in [0, 1).
    hashes = np.frombuffer(first_bytes, ">u8") / HASH_RANGE
    chosen = hashes < validation_fraction
    if len(keys) > 1:
        # The document nearest to the other side crosses over, if that side is empty.
        if not chosen.any():
            chosen[hashes.argmin()] = True
        if chosen.all():
            chosen[hashes.argmax()] = False
    return chosen


def cut_in_two(text: str, validation_fraction: float) -> tuple[str, str]:
    """The two parts of a text, for training and for validation, cut at a line end if there is one.

    The line end is looked for in the second half of the training part.
    """
    target = int(len(text) * (1 - validation_fraction))
    line_end = text.rfind("\n", target // 2, target)
    cut = target if line_end < 0 else line_end + 1
    return text[:cut], text[cut:]
