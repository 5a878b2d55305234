"""Conversations with a model: what it reads of them, and which tokens end its answers.

The chat template makes a text of the messages (`data.chat_template`), and its tokens are those of
that text, special tokens in it recognized; nothing is put before it. A message that spells out a
special token therefore is read as that token, as everywhere where these templates are used.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gatedjax.data.chat_template import (
    CONFIG_NAME,
    IMPORTED,
    TEMPLATE_NAME,
    ChatTemplate,
    Message,
    load_chat_template,
    read_text,
)
from gatedjax.data.tokenizer import JsonTokenizer, Tokenizer
from gatedjax.errors import InputError, require
from gatedjax.paths import Place, is_bucket

GENERATION_FILE = "generation_config.json"

# What stands in for an answer, to see what the template writes after it.
_ANSWER = "gatedjax-answer"


class Chat:
    """A template and a tokenizer.

    Attributes:
      template: what makes the text.
      stop_ids: tokens that end an answer.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        stop_ids: Sequence[int] = (),
    ):
        """Looks at what the template writes after an answer.

        Args:
          template: of the conversations.
          tokenizer: of the model.
          stop_ids: more tokens that end an answer.
        """
        self.template = template
        self._tokenizer = tokenizer
        ids = {tokenizer.eos_id, *stop_ids, *self._end_of_turn()}
        self.stop_ids = tuple(sorted(ids))

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The tokens after which the model writes its answer.

        Raises:
          InputError: the template does not take these messages, or makes nothing of them.
        """
        ids = self._ids(self.template.render(messages, add_generation_prompt=True))
        require(bool(ids), "chat template", "no text", "some for these messages")
        return ids

    def unfinished(self, messages: Sequence[Message]) -> str:
        """The conversation up to the last character of its last message, which goes on.

        Raises:
          InputError: the template does not write the message as it stands.
        """
        *before, last = messages
        text = str(last["content"])
        marked = {**last, "content": text + _ANSWER}
        begun, found, _ = self.template.render([*before, marked]).rpartition(_ANSWER)
        require(bool(found), "chat template", text, "a message that it writes as it stands")
        return begun

    def _ids(self, text: str) -> list[int]:
        (marked,) = self._tokenizer.encode_marked([text])
        return marked.ids.tolist()

    def _end_of_turn(self) -> set[int]:
        """The special token that the template writes after an answer, if it writes one."""
        if not isinstance(self._tokenizer, JsonTokenizer):
            return set()
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _ANSWER},
        ]
        try:
            whole = self.template.render(messages)
        except InputError:
            # It wants other messages, and will say so when it gets those of the user.
            return set()
        _, found, after = whole.rpartition(_ANSWER)
        ids = self._ids(after) if found else []
        return {token for token in ids[:1] if self._tokenizer.is_special(token)}


def chat_of_run(
    run_dir: Place,
    tokenizer_spec: str,
    tokenizer: Tokenizer,
    template: str = "",
) -> Chat:
    """How a run is talked to.

    Args:
      run_dir: of the checkpoint.
      tokenizer_spec: `config.data.tokenizer`.
      tokenizer: the one that this names.
      template: a file or folder that the user names; "" for the run's own.

    Raises:
      InputError: there is none.
    """
    try:
        found = load_chat_template(tokenizer_spec, template)
    except InputError as error:
        if template:
            raise InputError(str(error).replace("config.data.", "--", 1)) from None
        raise InputError(
            f"--chat: {run_dir} has no chat template ({TEMPLATE_NAME}, or {CONFIG_NAME} with one, "
            f"there or in {IMPORTED}): name a file with --chat_template"
        ) from error
    return Chat(found, tokenizer, _named_ends(run_dir, found, tokenizer))


def _named_ends(run_dir: Place, template: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    """The ends of an answer that the files of the model name."""
    if not isinstance(tokenizer, JsonTokenizer):
        return []
    ends = []
    end = tokenizer.token_id(template.special_tokens.get("eos_token", ""))
    if end is not None:
        ends.append(end)
    for folder in (run_dir, run_dir / IMPORTED):
        ids = _settings(folder / GENERATION_FILE).get("eos_token_id")
        for token in ids if isinstance(ids, list) else [ids]:
            is_number = isinstance(token, int) and not isinstance(token, bool)
            if is_number and 0 <= token < tokenizer.vocab_size:
                ends.append(token)
    return ends


def _settings(path: Place) -> dict[str, Any]:
    """A file of settings; nothing where there is none, or only a link, which may lead anywhere."""
    is_link = not is_bucket(path) and Path(path).is_symlink()
    text = None if is_link else read_text(path)
    if text is None:
        return {}
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{path}: got no JSON, expected settings of generation") from None
    return settings if isinstance(settings, dict) else {}


def checked_messages(messages: Any, where: str) -> list[Message]:
    """The messages of a conversation.

    Args:
      messages: what a file says they are.
      where: they come from, for the error's line.

    Raises:
      InputError: they are no list of objects with a role and a content.
    """
    is_list = isinstance(messages, list) and bool(messages)
    require(is_list, where, messages, "a list of messages")
    for message in messages:
        is_message = isinstance(message, dict) and isinstance(message.get("role"), str)
        is_message = is_message and "content" in message
        require(is_message, where, message, 'an object with "role" and "content"')
    return messages
