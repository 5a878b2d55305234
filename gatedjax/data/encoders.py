"""From documents to what a token cache holds of them.

A text becomes its tokens and the one that ends a document. What a conversation becomes is in
`chat`.
"""

from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Integer

from gatedjax.data.tokenizer import Tokenizer
from gatedjax.errors import InputError


class Encoded(NamedTuple):
    """A document as it is kept.

    stream: an integer for each of its tokens.
    targets: how many of them are predicted.
    text: what those stand for, in UTF-8: bits per byte are bits of this.
    """

    stream: Integer[np.ndarray, "tokens"]
    targets: int
    text: bytes


class Encoder(Protocol):
    """What the token cache asks of an encoder.

    name: for the log.
    fingerprint: changes whenever what it makes could.
    dtype: of what is kept.
    takes_parts: whether a document may be cut in two.
    """

    name: str
    fingerprint: str
    dtype: str
    takes_parts: bool

    def encode(self, documents: list[str]) -> list[Encoded]: ...


class TextEncoder:
    """Every token of a text is predicted, and its end."""

    takes_parts = True

    def __init__(self, tokenizer: Tokenizer):
        self.name = tokenizer.name
        self.fingerprint = tokenizer.fingerprint
        self.dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        self._tokenizer = tokenizer

    def encode(self, documents: list[str]) -> list[Encoded]:
        """The streams of texts.

        Raises:
          InputError: the tokenizer makes an id that it does not have.
        """
        end_of_document = np.asarray([self._tokenizer.eos_id], np.int32)
        encoded = []
        for text, ids in zip(documents, self._tokenizer.encode_batch(documents)):
            require_known(self._tokenizer, ids)
            stream = np.concatenate([ids, end_of_document])
            encoded.append(Encoded(stream, len(stream), text.encode()))
        return encoded


def require_known(tokenizer: Tokenizer, ids: Integer[np.ndarray, "tokens"]) -> None:
    """InputError if an id is outside of the vocabulary."""
    size = tokenizer.vocab_size
    if len(ids) and not 0 <= ids.min() <= ids.max() < size:
        raise InputError(f"tokenizer {tokenizer.name}: made an id outside its {size:,} entries")
