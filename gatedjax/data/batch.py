"""What a step sees: `Batch`, and how a window of a token stream becomes one of its rows.

A stream is the documents of a split one after another, each closed by the tokenizer's
end-of-document token. Window i holds tokens i T .. (i + 1) T, both ends included: T inputs and T
targets. The last token of a window is the first of the next, so over one pass every token is an
input once and a target once.
"""

import flax.struct
import numpy as np
from jax import Array
from jaxtyping import Float32, Int, Int32, Integer


@flax.struct.dataclass
class Batch:
    """Rows of packed documents: a pytree of arrays [B, T] (a single row has [T]).

    tokens, targets: token ids; `targets[t]` is the token after `tokens[t]`.
    segment_ids: 1, 2, 3, ... for the documents of the row, 0 for padding at its end.
    positions: 0 at the first token of a document, and at the start of the row for a document that
    began before it.
    loss_mask: 1.0 where the target is predicted, 0.0 where it belongs to another document or is
      padding. The end-of-document token belongs to its document and is predicted; the first token
      of a document never is. A float, so that a loss multiplies by it and a task may weigh its
      tokens.
    """

    tokens: Int32[np.ndarray | Array, "*B T"]
    targets: Int32[np.ndarray | Array, "*B T"]
    segment_ids: Int32[np.ndarray | Array, "*B T"]
    positions: Int32[np.ndarray | Array, "*B T"]
    loss_mask: Float32[np.ndarray | Array, "*B T"]


def num_windows(num_tokens: int, seq_len: int) -> int:
    """Windows of `seq_len` targets that cover all tokens of a stream but its first; the last may be
    padded.
    """
    return -(-(num_tokens - 1) // seq_len)


def cut_window(
    tokens: Integer[np.ndarray, "N"],
    document_ends: Int[np.ndarray, "documents"],
    index: int,
    seq_len: int,
) -> Batch:
    """Window `index` of the stream as a row: arrays [T].

    Args:
      tokens: the whole stream, any integer type, an array or a `TokenFile`.
      document_ends: ascending; document d holds tokens document_ends[d - 1] .. document_ends[d],
        the end excluded.
      index: in [0, num_windows(N, seq_len)).
      seq_len: T.
    """
    start = index * seq_len
    piece = np.asarray(tokens[start : start + seq_len + 1], np.int32)
    length = len(piece) - 1  # targets that exist
    first, last = np.searchsorted(document_ends, (start, start + length), side="right")
    bounds = (
        document_ends[first:last] - start
    )  # where a document begins in this window, 1 <= bound <= length
    row = empty_row(seq_len)
    row.tokens[:length], row.targets[:length] = piece[:-1], piece[1:]
    row.segment_ids[0] = 1
    row.segment_ids[bounds[bounds < length]] = 1
    row.segment_ids[:length] = np.cumsum(row.segment_ids[:length])
    begins = np.concatenate(([0], bounds))
    row.positions[:length] = np.arange(length) - begins[row.segment_ids[:length] - 1]
    row.loss_mask[:length] = 1.0
    row.loss_mask[bounds - 1] = 0.0
    return row


def empty_row(seq_len: int) -> Batch:
    """A row [T] of padding: segment 0, nothing to predict."""
    return Batch(
        *(np.zeros(seq_len, np.int32) for _ in range(4)), loss_mask=np.zeros(seq_len, np.float32)
    )


def stack_rows(rows: list[Batch]) -> Batch:
    """Rows of [T] arrays as one batch of [B, T] arrays."""
    return Batch(
        *(np.stack([getattr(row, name) for row in rows]) for name in Batch.__dataclass_fields__)
    )
