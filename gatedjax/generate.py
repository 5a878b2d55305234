"""Continues prompts with a trained model, or chats with it.

python -m gatedjax.generate --checkpoint=runs/tiny --prompt="def "
python -m gatedjax.generate --checkpoint=runs/tiny --prompts=prompts.jsonl --out=completions.jsonl
python -m gatedjax.generate --checkpoint=runs/qwen3 --chat [--prompt="Why is the sky blue?"]

One prompt is streamed as it is sampled. --prompts reads a prompt a line, or JSONL with "prompt" or
"messages", and writes a line of JSON for each. --chat writes the conversation as the tokenizer's
chat template has it; without --prompt every line of the input is a turn.
"""

import sys
from collections.abc import Iterator
from typing import IO, NamedTuple

import numpy as np
from absl import flags

from gatedjax.data import JsonTokenizer, load_tokenizer
from gatedjax.data.chat_template import Message
from gatedjax.data.tokenizer import Tokenizer
from gatedjax.errors import InputError, printable
from gatedjax.evaluation.chat import Chat, chat_of_run
from gatedjax.evaluation.completions import Prompt, Stops, completions
from gatedjax.evaluation.filters import Sampling
from gatedjax.evaluation.prompt_files import PromptLine, completed_line, read_prompts
from gatedjax.evaluation.prompt_text import as_text, start_of_text
from gatedjax.evaluation.restore import require_language_model, restore_params
from gatedjax.evaluation.sampling import Decoder, checked_sampling, pieces_of_text
from gatedjax.evaluation.text_stream import TextUntil
from gatedjax.paths import Place, expand
from gatedjax.runtime import cli
from gatedjax.runtime.host_memory import large_blocks_given_back

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run directory, as --workdir of train.py.")
_PROMPT = flags.DEFINE_string(
    "prompt", None, "Text to continue; empty starts a new document. With --chat: the one message."
)
_PROMPTS = flags.DEFINE_string(
    "prompts", None, "File of prompts: a line of text each, or .jsonl with prompt or messages."
)
_OUT = flags.DEFINE_string("out", None, "JSONL file for what follows --prompts; default: stdout.")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "Prompts of --prompts that are continued together.", lower_bound=1
)
_CHAT = flags.DEFINE_bool("chat", False, "Prompts are messages, written by the chat template.")
_TEMPLATE = flags.DEFINE_string(
    "chat_template", "", "A .jinja file, or a folder with a tokenizer's; default: the run's own."
)
_SYSTEM = flags.DEFINE_string("system", None, "With --chat: the message before the first one.")
_TOKENS = flags.DEFINE_integer(
    "tokens", 400, "Tokens to sample at most; the end of a document or answer ends the text."
)
_STOP = flags.DEFINE_multi_string(
    "stop", [], "A string, or the name of a special token, that ends the text; repeatable."
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample among the k most likely tokens; 0 for all.")
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Sample among the fewest tokens whose probabilities reach p."
)
_TRUST = flags.DEFINE_bool(
    "trust_paths", False, "Use the tokenizer's path in a checkpoint that somebody else wrote."
)
_SEED = flags.DEFINE_integer("seed", 0, "Same seed, same text.")

# Prompts of a file that are sorted by length and then written, in batches.
_BATCHES_AT_ONCE = 16


class Model(NamedTuple):
    """What continues a text.

    decoder: the model.
    tokenizer: its own.
    start: the ids that stand before a text that is no conversation.
    template: of conversations; None without --chat.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    start: list[int]
    chat: Chat | None


def main(_) -> None:
    """Restores, then prints what follows one prompt, or writes what follows many."""
    checkpoint = cli.given_place(_CHECKPOINT)
    require_flags_that_go_together()
    sampling = checked_sampling(
        _TEMPERATURE.value,
        _TOP_K.value,
        _TOP_P.value,
        _TOKENS.value,
        _SEED.value,
    )
    lines = None
    if _PROMPTS.value is not None:
        lines = read_prompts(expand(_PROMPTS.value, "--prompts"))
    model = restored_model(checkpoint, needs_chat=_CHAT.value or _has_messages(lines))
    if lines is not None:
        complete_lines(model, lines, sampling)
    elif not _CHAT.value:
        prompt = _PROMPT.value or ""
        _print(prompt)
        continue_text(model, prompt, sampling)
    else:
        converse(model, sampling)


def require_flags_that_go_together() -> None:
    """InputError if one flag makes another one meaningless."""
    if _PROMPTS.value is not None and _PROMPT.value is not None:
        raise InputError("--prompts: got --prompt too, expected one of them")
    if _OUT.value is not None and _PROMPTS.value is None:
        raise InputError("--out: got no --prompts, whose completions it would hold")
    if _SYSTEM.value is not None and not _CHAT.value:
        raise InputError("--system: got no --chat, of which it is the first message")
    if "" in _STOP.value:
        raise InputError("--stop: got '', expected a text or the name of a token")


def restored_model(checkpoint: Place, needs_chat: bool) -> Model:
    """The model of a run.

    Args:
      checkpoint: the run directory.
      needs_chat: some prompt is a conversation.
    """
    with large_blocks_given_back():
        restored_run, params, _ = restore_params(checkpoint, trust_paths=_TRUST.value)
    require_language_model(restored_run)
    data = restored_run.config.data
    tokenizer = load_tokenizer(data.tokenizer, data.end_of_document)
    chat = None
    if needs_chat:
        template = _TEMPLATE.value or data.chat_template
        chat = chat_of_run(checkpoint, data.tokenizer, tokenizer, template)
    return Model(
        decoder=Decoder(restored_run.config.model, params, tokenizer.vocab_size),
        tokenizer=tokenizer,
        start=start_of_text(checkpoint, tokenizer),
        chat=chat,
    )


def stops_of(model: Model, is_chat: bool) -> Stops:
    """What ends a text: the end of a document or of an answer, and what --stop names."""
    ids = {model.tokenizer.eos_id}
    if is_chat and model.chat is not None:
        ids |= set(model.chat.stop_ids)
    strings = []
    for name in _STOP.value:
        token = special_token(model.tokenizer, name)
        if token is not None:
            ids.add(token)
        else:
            strings.append(as_text(name, "--stop"))
    return Stops(tuple(sorted(ids)), tuple(strings))


def special_token(tokenizer: Tokenizer, name: str) -> int | None:
    """The id of a special token; None if it has none of this name."""
    if not isinstance(tokenizer, JsonTokenizer):
        return None
    token = tokenizer.token_id(name)
    return token if token is not None and tokenizer.is_special(token) else None


def continue_text(model: Model, prompt: str, sampling: Sampling) -> None:
    """Prints what follows a prompt, as it is sampled."""
    text_ids = model.tokenizer.encode(as_text(prompt)).tolist()
    ids = [*model.start, *text_ids] or [model.tokenizer.eos_id]
    for piece in streamed(model, ids, text_ids, sampling, is_chat=False):
        _print(piece)
    _print("\n")


def converse(model: Model, sampling: Sampling) -> None:
    """One message of --prompt and its answer; or turn by turn, until the input ends."""
    messages: list[Message] = []
    if _SYSTEM.value is not None:
        messages.append({"role": "system", "content": as_text(_SYSTEM.value, "--system")})
    for text in turns():
        messages.append({"role": "user", "content": as_text(text)})
        assert model.chat is not None
        ids = model.chat.encode(messages)
        answer = ""
        for piece in streamed(model, ids, [], sampling, is_chat=True):
            answer += piece
            _print(piece)
        _print("\n")
        messages.append({"role": "assistant", "content": answer})


def turns() -> Iterator[str]:
    """What the user says."""
    if _PROMPT.value is not None:
        yield _PROMPT.value
        return
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            _print("> ")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def streamed(
    model: Model,
    ids: list[int],
    text_ids: list[int],
    sampling: Sampling,
    is_chat: bool,
) -> Iterator[str]:
    """Pieces of what follows a single prompt.

    Args:
      model: what continues it.
      ids: what the model sees.
      text_ids: those of them behind which the text is decoded.
      sampling: how tokens are chosen.
      is_chat: an end of an answer is an end.
    """
    stops = stops_of(model, is_chat)
    steps = model.decoder.generate(
        np.asarray([ids], np.int32),
        _TOKENS.value,
        seed=_SEED.value,
        stop_ids=stops.ids,
        **sampling._asdict(),
    )
    return pieces_of_text(steps, TextUntil(model.tokenizer, text_ids, *stops))


def complete_lines(model: Model, lines: list[PromptLine], sampling: Sampling) -> None:
    """Writes what follows each line, in the order of the file."""
    at_once = _BATCHES_AT_ONCE * _BATCH_SIZE.value
    prompts = [prompt_of_line(model, number, line) for number, line in enumerate(lines)]
    with opened_output() as out:
        for first in range(0, len(prompts), at_once):
            found = completions(
                model.decoder,
                model.tokenizer,
                prompts[first : first + at_once],
                _TOKENS.value,
                stops=stops_of(model, is_chat=True),
                sampling=sampling,
                seed=_SEED.value,
                batch_size=_BATCH_SIZE.value,
            )
            for line, completion in zip(lines[first:], found):
                values = {
                    "completion": completion.text,
                    "tokens": completion.tokens,
                    "finish": completion.finish,
                }
                out.write(completed_line(line, values) + "\n")
            out.flush()


def prompt_of_line(model: Model, number: int, line: PromptLine) -> Prompt:
    """What the model sees of a line of --prompts."""
    messages = line.messages
    if messages is None and _CHAT.value:
        messages = [{"role": "user", "content": line.prompt}]
    if messages is None:
        text_ids = model.tokenizer.encode(as_text(line.prompt or "")).tolist()
        ids = [*model.start, *text_ids] or [model.tokenizer.eos_id]
        return Prompt(number, ids, text_ids)
    if _SYSTEM.value is not None:
        messages = [{"role": "system", "content": _SYSTEM.value}, *messages]
    assert model.chat is not None
    return Prompt(number, model.chat.encode(messages))


def opened_output() -> IO[str]:
    """The file of --out, or stdout.

    Raises:
      InputError: it cannot be written.
    """
    if _OUT.value is None:
        return open(sys.stdout.fileno(), "w", encoding="utf-8", closefd=False)
    path = expand(_OUT.value, "--out")
    try:
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out: could not write {path}: {error.strerror}") from None


def _has_messages(lines: list[PromptLine] | None) -> bool:
    return any(line.messages is not None for line in lines or ())


def _print(text: str) -> None:
    # A model may write escape sequences: a terminal must not act on them. A file gets every byte.
    shown = printable(text) if sys.stdout.isatty() else text
    print(shown, end="", flush=True)


def run() -> None:
    """The command: parses the flags, then calls `main`."""
    cli.run(main)


if __name__ == "__main__":
    run()
