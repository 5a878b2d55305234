"""Files of prompts: a line of text each, or JSONL; and what follows them, as JSONL."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gatedjax.data.chat_template import Message
from gatedjax.errors import InputError, shown
from gatedjax.evaluation.chat import checked_messages
from gatedjax.files import read_plain

LARGEST_FILE = 1 << 30


class PromptLine(NamedTuple):
    """A line of a file.

    values: what is given back with the completion.
    prompt: a text; None where the line has messages.
    messages: a conversation; None where the line has a prompt.
    """

    values: Mapping[str, Any]
    prompt: str | None
    messages: list[Message] | None


def read_prompts(path: Path) -> list[PromptLine]:
    """The prompts of a file: JSONL by its name (`.jsonl`), or else a prompt a line.

    In JSONL a line is an object with "prompt", a text, or "messages", a conversation. Empty lines
    are left out.

    Raises:
      InputError: no such file, not UTF-8, no prompt in it, or a line that is none, by its number.
    """
    try:
        text = read_plain(path, LARGEST_FILE).decode()
    except UnicodeError:
        raise InputError(f"--prompts: {path}: got other bytes, expected UTF-8") from None
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"--prompts: {path} cannot be read ({reason})") from None
    prompts = list(_lines(path, text))
    if not prompts:
        raise InputError(f"--prompts: {path}: got no prompt, expected one a line")
    return prompts


def _lines(path: Path, text: str) -> Iterator[PromptLine]:
    is_jsonl = path.suffix == ".jsonl"
    # Not splitlines: a text may hold other separators than the line feed.
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        if is_jsonl:
            yield _object(line, f"--prompts: {path}:{number}")
        else:
            yield PromptLine({"prompt": line}, line, None)


def _object(line: str, where: str) -> PromptLine:
    expected = 'expected an object with "prompt" or "messages"'
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: got no JSON, {expected}") from None
    if not isinstance(values, dict) or ("prompt" in values) == ("messages" in values):
        raise InputError(f"{where}: got {shown(values)}, {expected}, one of them")
    if "messages" in values:
        messages = checked_messages(values["messages"], f"{where}: messages")
        return PromptLine(values, None, messages)
    if not isinstance(values["prompt"], str):
        raise InputError(f"{where}: prompt: got {shown(values['prompt'])}, expected a text")
    return PromptLine(values, values["prompt"], None)


def completed_line(line: PromptLine, completion: Mapping[str, Any]) -> str:
    """The line's own values and what follows the prompt, as JSON."""
    return json.dumps({**line.values, **completion}, ensure_ascii=False)
