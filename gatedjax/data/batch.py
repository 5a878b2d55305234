"""`Batch`, the input of a step, and how a window of a token stream becomes one of its rows.

A stream is the documents of a split one after another, each closed by the tokenizer's
end-of-document token. Window i holds tokens i T .. (i + 1) T, both ends included: T inputs and T
targets. The last token of a window is the first of the next, so over one pass every token is an
input once and a target once.
"""

import dataclasses

import flax.struct
import numpy as np
from jax import Array
from jaxtyping import Float32, Int, Int32, Integer

from gatedjax.data.token_file import TokenFile


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
    """Windows of `seq_len` targets that cover a stream of `num_tokens`; the last may be padded."""
    # The first token of the stream is never a target.
    num_targets = num_tokens - 1
    return -(-num_targets // seq_len)


def cut_window(
    tokens: Integer[np.ndarray, "stream"] | TokenFile,
    document_ends: Int[np.ndarray, "documents"],
    index: int,
    seq_len: int,
) -> Batch:
    """Window `index` of the stream as a row: arrays [T].

    Args:
      tokens: the whole stream, of any integer type.
      document_ends: ascending; document d holds tokens document_ends[d - 1] .. document_ends[d],
        the end excluded.
      index: at least 0 and below `num_windows(len(tokens), seq_len)`.
      seq_len: T.

    Returns:
      The row, padded with segment 0 where the stream ends inside the window.
    """
    start = index * seq_len
    # T inputs and one more token, the last target; fewer in the last window of the stream.
    piece = np.asarray(tokens[start : start + seq_len + 1], np.int32)
    length = len(piece) - 1

    # Where a document begins inside this window: 1 <= begin <= length. One that begins at `length`
    # has no input here, but its first token is the last target.
    first, last = np.searchsorted(document_ends, (start, start + length), side="right")
    begins = document_ends[first:last] - start

    row = empty_row(seq_len)
    row.tokens[:length] = piece[:-1]
    row.targets[:length] = piece[1:]

    # A mark at the first token of every document; the running sum of the marks numbers them.
    is_first = np.zeros(length, np.int32)
    is_first[0] = 1
    is_first[begins[begins < length]] = 1
    segments = np.cumsum(is_first)
    row.segment_ids[:length] = segments

    # Segment 1 counts from the start of the row, segment s > 1 from its document's own begin.
    begin_of_segment = np.concatenate(([0], begins))
    row.positions[:length] = np.arange(length) - begin_of_segment[segments - 1]

    row.loss_mask[:length] = 1.0
    # The last token of a document would predict the first one of the next.
    row.loss_mask[begins - 1] = 0.0
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
    stacked = {}
    for field in dataclasses.fields(Batch):
        columns = [getattr(row, field.name) for row in rows]
        stacked[field.name] = np.stack(columns)
    return Batch(**stacked)
