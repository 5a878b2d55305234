"""A tokenized source: what is known of it, its token streams and its validation text."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt64

from gatedjax.data.splits import Exceptional, Split
from gatedjax.data.token_file import TokenFile


@dataclass(frozen=True)
class SplitInfo:
    """Counts of one split.

    bytes: of UTF-8 text that is predicted.
    tokens: with one end-of-document token per document. Each is predicted once in a pass.
    targets: of conversations, which of the tokens are predicted; None for all.
    sha256: of its text, in order, a zero byte after each document.
    """

    documents: int
    bytes: int
    tokens: int
    sha256: str
    targets: int | None = None

    @property
    def predicted(self) -> int:
        """How many tokens have a loss."""
        return self.tokens if self.targets is None else self.targets

    @property
    def bytes_per_token(self) -> float:
        """Bits per byte are the mean loss in nats / ln 2 / this, exact over a whole split."""
        return self.bytes / self.predicted


@dataclass(frozen=True)
class Corpus:
    """A tokenized source.

    sha256: of all its text, in order, a zero byte after each document.
    skipped: files that are not UTF-8.
    dtype: of the token files.
    exception: the document that is not where the hash of its text would have it, if there is one.
    path: the folder of the token cache.
    """

    name: str
    kind: str
    documents: int
    bytes: int
    sha256: str
    skipped: int
    tokenizer: str
    dtype: str
    splits: dict[str, SplitInfo]
    exception: Exceptional | None
    path: Path

    def describe(self) -> str:
        """One line for the log."""
        splits = []
        for name, split in self.splits.items():
            if split.tokens == 0:
                continue
            of_all = "" if split.predicted == split.tokens else f"{split.predicted:,} of "
            size = f"{of_all}{split.tokens:,} tokens ({split.bytes_per_token:.3f} bytes each)"
            splits.append(f"{name} {size}")
        skipped = ""
        if self.skipped:
            skipped = f", {self.skipped} files not UTF-8 left out"
        return (
            f"{self.name}: {self.kind}, {self.documents:,} documents, {self.bytes:,} bytes, "
            f"sha256 {self.sha256[:12]}{skipped}; "
            f"{self.tokenizer}: {', '.join(splits)}; cache {self.path}"
        )

    def stream(self, split: Split) -> tuple[TokenFile, Int[np.ndarray, "documents"]]:
        """The tokens of a split, on disk, and the offset behind each document."""
        ends = np.load(self.path / f"{split}.ends.npy", allow_pickle=False)
        length = self.splits[split].tokens
        tokens = TokenFile(self.path / f"{split}.tokens", self.dtype, length)
        return tokens, ends

    def text_hashes(self) -> dict[str, str]:
        """What tells the text from another, by split."""
        return {split: info.sha256 for split, info in self.splits.items()}

    def document_hashes(self) -> UInt64[np.ndarray, "documents"]:
        """The `splits.content_hash` of every document, in order."""
        return np.load(self.path / "documents.npy", allow_pickle=False)

    def validation_text(self) -> bytes:
        """The documents of the validation split one after another, UTF-8."""
        return (self.path / "validation.txt").read_bytes()
