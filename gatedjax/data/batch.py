"""`Batch`, the input of a step, and how a window of a token stream becomes one of its rows.

A stream is the documents of a split one after another, each closed by the tokenizer's
end-of-document token. That token has two parts (docs/tokens.md):

- As a target it belongs to the document that it ends, and is predicted like any other token.
- As an input it stands before a document, at position 0, and predicts the first token of it. The
  stream begins with one more of it, for the first document.

So every token of every document, the first one and the end included, is a target exactly once in a
pass, and an empty prompt is as well trained as any other.

    stream      |  a  b  |  c  |
    documents      1  1  1  2  2        as targets
    inputs      |  a  b  |  c
    segment     1  1  1  2  2
    position    0  1  2  0  1
    targets     a  b  |  c  |

Window i predicts tokens i T .. (i + 1) T of the documents, the end excluded, each from the token
before it. A window that starts in the middle of a document does not know what came before: the
document is segment 1 of that row, and its positions count from the start of the row.
"""

import flax.struct
import jax
import numpy as np
from jax import Array
from jaxtyping import Float32, Int, Int32, Integer

from gatedjax.data.token_file import TokenFile


@flax.struct.dataclass
class Batch:
    """Rows of packed documents: a pytree of arrays [B, T] (a single row has [T]).

    tokens, targets: token ids; `targets[t]` is the token after `tokens[t]`.
    segment_ids: 1, 2, 3, ... for the documents of the row, 0 for padding at its end.
    positions: 0 at the end-of-document token that stands before a document, and at the start of the
      row for a document that began before it.
    loss_mask: 1.0 where the target is predicted, 0.0 at padding. A float, so that a task may weigh
      its tokens, or ask for some of them only.
    patches: of images, [B, T, P], a row each; None for text. The class of an image is its first
      target.
    """

    tokens: Int32[np.ndarray | Array, "*B T"]
    targets: Int32[np.ndarray | Array, "*B T"]
    segment_ids: Int32[np.ndarray | Array, "*B T"]
    positions: Int32[np.ndarray | Array, "*B T"]
    loss_mask: Float32[np.ndarray | Array, "*B T"]
    patches: Float32[np.ndarray | Array, "*B T P"] | None = None


def num_windows(num_tokens: int, seq_len: int) -> int:
    """Windows of `seq_len` targets that cover a stream of `num_tokens`; the last may be padded."""
    return -(-num_tokens // seq_len)


def cut_window(
    tokens: Integer[np.ndarray, "stream"] | TokenFile,
    document_ends: Int[np.ndarray, "documents"],
    index: int,
    seq_len: int,
) -> Batch:
    """Window `index` of the stream as a row: arrays [T].

    Args:
      tokens: the whole stream, of any integer type; every document ends with the same token.
      document_ends: ascending; document d holds tokens document_ends[d - 1] .. document_ends[d],
        the end excluded.
      index: at least 0 and below `num_windows(len(tokens), seq_len)`.
      seq_len: T.

    Returns:
      The row, padded with segment 0 where the stream ends inside the window.
    """
    start = index * seq_len
    # The first input, and T targets; fewer in the last window of the stream.
    if start > 0:
        piece = np.asarray(tokens[start - 1 : start + seq_len], np.int32)
    else:
        # Before the first document stands what ends it.
        end = int(document_ends[0])
        piece = np.concatenate([tokens[end - 1 : end], tokens[:seq_len]]).astype(np.int32)
    length = len(piece) - 1

    # Where the first target of a document is inside this window, there its input stands before it:
    # 0 < begin < length. Of what begins at 0 the row holds all, of what began earlier a part;
    # either is segment 1.
    first, last = np.searchsorted(document_ends, (start, start + length - 1), side="right")
    begins = document_ends[first:last] - start
    return row_of(piece, begins, seq_len)


def row_of(
    piece: Int32[np.ndarray, "tokens"],
    begins: Int[np.ndarray, "documents"],
    seq_len: int,
) -> Batch:
    """A piece of a stream as a row: arrays [T], padded with segment 0.

    Args:
      piece: the first input, and up to T targets.
      begins: ascending, above 0: which targets are the first ones of a document. The target at 0
        begins or continues segment 1.
      seq_len: T.
    """
    length = len(piece) - 1
    row = empty_row(seq_len)
    row.tokens[:length] = piece[:-1]
    row.targets[:length] = piece[1:]

    # A mark at the first place of every document; the running sum of the marks numbers them.
    is_first = np.zeros(length, np.int32)
    is_first[0] = 1
    is_first[begins] = 1
    segments = np.cumsum(is_first)
    row.segment_ids[:length] = segments

    # Segment 1 counts from the start of the row, segment s > 1 from its document's own begin.
    begin_of_segment = np.concatenate(([0], begins))
    row.positions[:length] = np.arange(length) - begin_of_segment[segments - 1]
    row.loss_mask[:length] = 1.0
    return row


def empty_row(seq_len: int) -> Batch:
    """A row [T] of padding: segment 0, nothing to predict."""
    return Batch(
        tokens=np.zeros(seq_len, np.int32),
        targets=np.zeros(seq_len, np.int32),
        segment_ids=np.zeros(seq_len, np.int32),
        positions=np.zeros(seq_len, np.int32),
        loss_mask=np.zeros(seq_len, np.float32),
    )


def stack_rows(rows: list[Batch]) -> Batch:
    """Rows of [T] arrays as one batch of [B, T] arrays."""
    return jax.tree.map(lambda *columns: np.stack(columns), *rows)
