"""Conversations: the chat template of a tokenizer, and which tokens end an answer.

A template is a program in Jinja, of the checkpoint's author. transformers renders it in its
sandbox, without files and without Python of the checkpoint; the text is then cut into tokens by the
run's own tokenizer. Special tokens that the template writes are such tokens, and so are those that
somebody types into a message, as everywhere where these templates are used.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gatedjax.data.tokenizer import JsonTokenizer, Tokenizer
from gatedjax.errors import InputError, require, shown
from gatedjax.evaluation.sampling import IMPORTED
from gatedjax.files import read_plain

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
GENERATION_FILE = "generation_config.json"

# {"role": ..., "content": ...}
Message = Mapping[str, Any]

_LARGEST_FILE = 1 << 24
# What stands in for an answer, to see what the template writes after it.
_ANSWER = "gatedjax-answer"


class ChatTemplate:
    """How a conversation is written for a model.

    Attributes:
      source: the template.
      stop_ids: tokens that end an answer.
    """

    def __init__(
        self,
        template: str,
        tokenizer: Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        stop_ids: Sequence[int] = (),
    ):
        """A template by its text.

        Args:
          template: in Jinja.
          tokenizer: of the model.
          special_tokens: what the template may ask for by name, such as {"bos_token": "<s>"}.
          stop_ids: more tokens that end an answer.
        """
        self.source = template
        self._tokenizer = tokenizer
        self._special_tokens = dict(special_tokens or {})
        ids = {tokenizer.eos_id, *stop_ids, *self._end_of_turn()}
        self.stop_ids = tuple(sorted(ids))

    def text(self, messages: Sequence[Message], with_answer_begun: bool = True) -> str:
        """The conversation as the model reads it.

        Args:
          messages: from the first one on.
          with_answer_begun: what comes before an answer stands at the end.

        Raises:
          InputError: what are no messages; a template that is no Jinja, or that refuses them;
            transformers is not installed.
        """
        return rendered(self.source, messages, with_answer_begun, self._special_tokens)

    def unfinished(self, messages: Sequence[Message]) -> str:
        """The conversation up to the last character of its last message, which goes on.

        Raises:
          InputError: as of `text`; the template does not write the message as it stands.
        """
        *before, last = messages
        text = str(last["content"])
        marked = {**last, "content": text + _ANSWER}
        whole = self.text([*before, marked], with_answer_begun=False)
        begun, found, _ = whole.rpartition(_ANSWER)
        require(bool(found), "chat template", text, "a message that it writes as it stands")
        return begun

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The tokens after which the model writes its answer."""
        return encoded(self._tokenizer, self.text(messages))

    def _end_of_turn(self) -> set[int]:
        """The special token that the template writes after an answer, if it writes one."""
        if not isinstance(self._tokenizer, JsonTokenizer):
            return set()
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _ANSWER},
        ]
        try:
            whole = self.text(messages, with_answer_begun=False)
        except InputError:
            # It wants other messages, and will say so when it gets those of the user.
            return set()
        _, found, after = whole.rpartition(_ANSWER)
        ids = encoded(self._tokenizer, after) if found else []
        return {token for token in ids[:1] if self._tokenizer.is_special(token)}


def chat_template(
    run_dir: Path,
    tokenizer_spec: str,
    tokenizer: Tokenizer,
    given: Path | None = None,
) -> ChatTemplate:
    """The template of a run.

    Args:
      run_dir: of the checkpoint.
      tokenizer_spec: `config.data.tokenizer`.
      tokenizer: the one that this names.
      given: a file or folder that the user names in place of the run's.

    Raises:
      InputError: there is none.
    """
    folders = [run_dir / IMPORTED, run_dir, Path(tokenizer_spec).parent]
    if given is not None:
        folders = [given]
    if given is not None and given.is_file():
        return ChatTemplate(_text_of(given), tokenizer)
    for folder in folders:
        settings = _settings(folder / CONFIG_FILE)
        template = _template_of(folder, settings)
        if template is not None:
            names = _special_tokens(settings)
            stops = _stop_ids(folder, names, tokenizer)
            return ChatTemplate(template, tokenizer, names, stops)
    places = ", ".join(str(folder) for folder in dict.fromkeys(folders))
    raise InputError(
        f"--chat: no chat template in {places}; expected {TEMPLATE_FILE}, or {CONFIG_FILE} with "
        "chat_template: name a file with --chat_template"
    )


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a rendered conversation, its special ones among them."""
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer.encode_with_special_tokens(text)
    return tokenizer.encode(text).tolist()


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


def rendered(
    template: str,
    messages: Sequence[Message],
    with_answer_begun: bool,
    special_tokens: Mapping[str, str],
) -> str:
    """The text that a template makes of a conversation.

    Args:
      template: in Jinja.
      messages: from the first one on.
      with_answer_begun: what comes before an answer stands at the end.
      special_tokens: by the names that a template uses.

    Raises:
      InputError: transformers is not installed, or the template fails.
    """
    try:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template
    except ImportError:
        raise InputError(
            "--chat: templates need the transformers library: pip install 'gatedjax[chat]'"
        ) from None
    try:
        texts, _ = render_jinja_template(
            conversations=[list(messages)],
            chat_template=template,
            add_generation_prompt=with_answer_begun,
            **special_tokens,
        )
    except jinja2.TemplateError as error:
        raise InputError(f"chat template: {shown(str(error))}") from None
    except (TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"chat template: {shown(reason)}") from None
    return texts[0]


def _template_of(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / TEMPLATE_FILE
    if _is_there(path):
        return _text_of(path)
    template = settings.get("chat_template")
    if isinstance(template, list):
        # Several with names.
        by_name = {entry.get("name"): entry for entry in template if isinstance(entry, dict)}
        template = by_name.get("default", {}).get("template")
    return template if isinstance(template, str) else None


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Name -> token, of bos_token, eos_token and their like."""
    names = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            value = value.get("content")
        if name.endswith("_token") and isinstance(value, str):
            names[name] = value
    return names


def _stop_ids(folder: Path, names: Mapping[str, str], tokenizer: Tokenizer) -> list[int]:
    """The ends of an answer that the files name."""
    if not isinstance(tokenizer, JsonTokenizer):
        return []
    stops = []
    end = tokenizer.token_id(names.get("eos_token", ""))
    if end is not None:
        stops.append(end)
    ids = _settings(folder / GENERATION_FILE).get("eos_token_id")
    for token in ids if isinstance(ids, list) else [ids]:
        if isinstance(token, int) and 0 <= token < tokenizer.vocab_size:
            stops.append(token)
    return stops


def _settings(path: Path) -> dict[str, Any]:
    """A file of settings; nothing where there is none."""
    if not _is_there(path):
        return {}
    try:
        settings = json.loads(_text_of(path))
    except (ValueError, RecursionError):
        raise InputError(f"{path}: got no JSON, expected settings of a tokenizer") from None
    return settings if isinstance(settings, dict) else {}


def _is_there(path: Path) -> bool:
    # No link: in a checkpoint it could lead to any file.
    return path.is_file() and not path.is_symlink()


def _text_of(path: Path) -> str:
    try:
        return read_plain(path, _LARGEST_FILE).decode()
    except UnicodeError:
        raise InputError(f"{path}: got other bytes, expected UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
