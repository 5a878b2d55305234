"""Conversations to learn answers from: which tokens have a loss, and how they fill rows.

A conversation is one text by the tokenizer's chat template, and its tokens are those of this text,
special tokens in it recognized; nothing is put before or behind it. What the assistant says is
predicted, with what ends its turn, and nothing else. Where that is, the template says itself
(`{% generation %}`); one that does not is asked for the text up to each answer and behind it. A
token counts if it holds a character of an answer, as in transformers.

A row holds whole conversations, packed by length, each a segment of its own that knows nothing of
the others; one that is longer than a row is cut.

    conversation  <user> hi <end> <assistant> yo <end>
    inputs        <user> hi <end> <assistant> yo
    targets              hi <end> <assistant> yo <end>
    loss                  0     0           0  1     1
"""

import bisect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import grain
import numpy as np
from jaxtyping import Bool, Int, Integer

from gatedjax.data.batch import Batch, empty_row
from gatedjax.data.chat_template import ChatTemplate, Message, Span
from gatedjax.data.encoders import Encoded, require_known
from gatedjax.data.formats import (
    CompressedJsonLines,
    Documents,
    JsonLines,
    json_object,
)
from gatedjax.data.token_file import TokenFile
from gatedjax.data.tokenizer import Tokenizer
from gatedjax.errors import InputError

KIND = "chat"
Answers = Literal["all", "last"]

ASSISTANT = "assistant"
# Where a record has its messages, besides the configured field.
_KEYS = ("messages", "conversations")
# ShareGPT's names.
_ROLES = {"human": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bot": ASSISTANT}
# Of a conversation, in an error.
_SHOWN = 80


def open_conversations(path: Path, field: str) -> Documents:
    """The conversations of a file of JSON lines, each as canonical JSON."""
    if path.suffix in (".gz", ".zst"):
        return CompressedJsonLines(path, field, conversation)
    return JsonLines(path, field, conversation)


def conversation(
    line: bytes,
    field: str,
    where: str,
) -> str:
    """The conversation of a record: `{"messages": [{"role", "content"}, ...]}`, or ShareGPT's.

    Args:
      line: the record as JSON. What it has under "tools" goes to the template.
      field: where its messages are, if not under "messages" or "conversations".
      where: file and line, for the message.

    Returns:
      The same as JSON, in one form.

    Raises:
      InputError: it is none, or has no answer.
    """
    record = json_object(line, where)
    key = next((key for key in (field, *_KEYS) if key in record), None)
    if key is None:
        raise InputError(f"{where}: no field 'messages'; it has {', '.join(record)}")
    if not isinstance(record[key], list):
        kind = type(record[key]).__name__
        raise InputError(f"{where}: field {key!r} holds {kind}, expected a list of messages")
    messages = [_message(m, f"{where}, message {i}") for i, m in enumerate(record[key])]
    if not any(message["role"] == ASSISTANT for message in messages):
        raise InputError(f"{where}: no answer, expected a message of role {ASSISTANT!r}")
    values = {"messages": messages, "tools": record.get("tools")}
    return json.dumps(values, ensure_ascii=False)


def _message(raw: Any, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise InputError(f"{where}: got {type(raw).__name__}, expected an object")
    # Many templates take a key without a value for a value.
    message = {name: value for name, value in raw.items() if value is not None}
    if "role" not in message and "from" in message:
        role = message.pop("from")
        message["role"] = _ROLES.get(role, role) if isinstance(role, str) else role
        message["content"] = message.pop("value", "")
    if not isinstance(message.get("role"), str):
        raise InputError(f"{where}: no 'role', expected such as 'user' or {ASSISTANT!r}")
    if not isinstance(message.get("content", ""), str | list):
        kind = type(message["content"]).__name__
        raise InputError(f"{where}: 'content' holds {kind}, expected a string")
    return message


def answer_spans(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Any = None,
    special_tokens: Sequence[str] = (),
    answers: Answers = "all",
) -> tuple[str, list[Span]]:
    """The text of a conversation, and where in it the assistant's answers are.

    Args:
      template: what makes the text.
      messages: of the conversation.
      tools: for the template.
      special_tokens: of the tokenizer. The end of a turn is the last one in it: white space behind
        it is no part of the answer.
      answers: all of them, or the last one only.

    Returns:
      The text, and the begin and end of each answer.

    Raises:
      InputError: the template has no generation blocks, and what it writes before an answer is not
        what it asks for one with, or is not what stands there once the conversation goes on.
    """
    if template.marks_answers:
        text, spans = template.render_with_answers(messages, tools)
    else:
        text, spans = _by_prefixes(
            template,
            messages,
            tools,
            special_tokens,
            answers,
        )
    return text, spans if answers == "all" else spans[-1:]


def _by_prefixes(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Any,
    special_tokens: Sequence[str],
    answers: Answers,
) -> tuple[str, list[Span]]:
    whole = template.render(messages, tools)
    places = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
    if answers == "last":
        places = places[-1:]
    spans = []
    for i in places:
        before = template.render(messages[:i], tools, add_generation_prompt=True)
        behind = whole
        if i + 1 < len(messages):
            behind = template.render(messages[: i + 1], tools)
        if not (behind.startswith(before) and whole.startswith(behind)):
            raise InputError(
                f"message {i}: the chat template writes this answer otherwise than its generation "
                "prompt and its own end say; mark answers in it with {% generation %}, or give "
                "config.data.chat_answers=last"
            )
        spans.append((len(before), _end_of_turn(behind, len(before), special_tokens)))
    return whole, spans


def _end_of_turn(text: str, begin: int, special_tokens: Sequence[str]) -> int:
    """The end of the last special token from `begin` on, if nothing but white space follows it."""
    if not special_tokens:
        return len(text)
    pattern = "|".join(map(re.escape, special_tokens))
    ends = [match.end() for match in re.finditer(pattern, text[begin:])]
    if not ends or text[begin + ends[-1] :].strip():
        return len(text)
    return begin + ends[-1]


def tokens_in(
    spans: Sequence[Span],
    begins: Int[np.ndarray, "tokens"],
    ends: Int[np.ndarray, "tokens"],
) -> Bool[np.ndarray, "tokens"]:
    """Which tokens hold a character of one of the spans.

    Args:
      spans: of the text.
      begins: the first character of each token.
      ends: behind the last character of each token.
    """
    is_inside = np.zeros(len(begins), bool)
    for begin, end in spans:
        is_inside |= (begins < end) & (ends > begin)
    return is_inside


class ChatEncoder:
    """Conversations as streams: of each token twice its id, and one more where it is answered."""

    dtype = "uint32"
    takes_parts = False

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, answers: Answers):
        self.name = f"{tokenizer.name} and its chat template"
        self.fingerprint = f"chat-1-{answers}-{tokenizer.fingerprint}-{template.fingerprint}"
        self._tokenizer = tokenizer
        self._template = template
        self._answers: Answers = answers

    def encode(self, documents: list[str]) -> list[Encoded]:
        """The streams of conversations, which `conversation` made.

        Raises:
          InputError: a conversation that the template does not take, whose answers cannot be told,
            or that spells out a special token.
        """
        rendered = [self._rendered(document) for document in documents]
        encoded = []
        marked_batch = self._tokenizer.encode_marked([text for text, _ in rendered])
        for document, (text, spans), marked in zip(documents, rendered, marked_batch):
            require_known(self._tokenizer, marked.ids)
            is_answer = tokens_in(spans, marked.begins, marked.ends)
            # Nothing predicts the first token.
            targets = int(is_answer[1:].sum())
            if not targets:
                raise InputError(f"{_named(document)}: the chat template writes no answer")
            stream = marked.ids.astype(np.int64) * 2 + is_answer
            answers = "".join(text[begin:end] for begin, end in spans)
            encoded.append(Encoded(stream, targets, answers.encode()))
        return encoded

    def _rendered(self, document: str) -> tuple[str, list[Span]]:
        values = json.loads(document)
        special_tokens = self._tokenizer.special_tokens
        try:
            _require_no_special(values["messages"], special_tokens)
            return answer_spans(
                self._template,
                values["messages"],
                values["tools"],
                special_tokens,
                self._answers,
            )
        except InputError as error:
            raise InputError(f"{_named(document)}: {error}") from None


def _named(document: str) -> str:
    return f"the conversation that begins {document[:_SHOWN]!r}"


def _require_no_special(messages: Sequence[Message], special_tokens: Sequence[str]) -> None:
    """InputError if a message could end its own turn, or begin another."""
    for i, message in enumerate(messages):
        content = message.get("content", "")
        for token in special_tokens:
            if isinstance(content, str) and token in content:
                raise InputError(f"message {i}: holds the special token {token!r}; leave it out")


def pack(lengths: Int[np.ndarray, "documents"], seq_len: int) -> list[list[int]]:
    """Documents into rows of `seq_len`: the longest first, each where it leaves the least space.

    Args:
      lengths: of the documents, at most `seq_len`; those of 0 are left out.
      seq_len: of a row.

    Returns:
      For each row its documents.
    """
    rows: list[list[int]] = []
    # Rows by the space that they have left, and those spaces in order.
    with_space: dict[int, list[int]] = {}
    spaces: list[int] = []
    for document in np.argsort(-lengths, kind="stable"):
        length = int(lengths[document])
        if not length:
            break
        place = bisect.bisect_left(spaces, length)
        if place == len(spaces):
            row = len(rows)
            rows.append([])
            left = seq_len
        else:
            left = spaces[place]
            row = with_space[left].pop()
            if not with_space[left]:
                del with_space[left], spaces[place]
        rows[row].append(int(document))
        left -= length
        if left and left not in with_space:
            bisect.insort(spaces, left)
        if left:
            with_space.setdefault(left, []).append(row)
    return rows


class Conversations(grain.MapDataset[Batch]):
    """Rows of [T] arrays of packed conversations. Indices past the end start over.

    cut: conversations that are longer than a row.
    """

    def __init__(
        self,
        stream: Integer[np.ndarray, "stream"] | TokenFile,
        document_ends: Int[np.ndarray, "documents"],
        seq_len: int,
    ):
        super().__init__()
        self._stream = stream
        self._seq_len = seq_len
        self._begins = np.concatenate([[0], document_ends[:-1]]).astype(np.int64)
        # Inputs: the last token of a conversation is a target only.
        inputs = document_ends - self._begins - 1
        self.cut = int((inputs > seq_len).sum())
        self._lengths = np.minimum(inputs, seq_len)
        self._rows = pack(self._lengths, seq_len)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        row = empty_row(self._seq_len)
        at = 0
        for segment, document in enumerate(self._rows[index % len(self)], start=1):
            begin = self._begins[document]
            length = self._lengths[document]
            stored = np.asarray(self._stream[begin : begin + length + 1], np.int64)
            tokens = stored // 2
            place = slice(at, at + length)
            row.tokens[place] = tokens[:-1]
            row.targets[place] = tokens[1:]
            row.segment_ids[place] = segment
            row.positions[place] = np.arange(length)
            row.loss_mask[place] = stored[1:] % 2
            at += length
        return row
