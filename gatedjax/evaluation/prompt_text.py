"""The text of a prompt, and what stands before it."""

from gatedjax.data.chat_template import IMPORTED
from gatedjax.data.tokenizer import JsonTokenizer, Tokenizer
from gatedjax.errors import InputError
from gatedjax.paths import Place


def start_of_text(run_dir: Place, tokenizer: Tokenizer) -> list[int]:
    """The ids that stand before a text, as the model was trained.

    A run's own documents begin with the end of the one before. An imported model has the special
    tokens that its tokenizer.json puts there, if it does.
    """
    is_imported = (run_dir / IMPORTED).is_dir()
    if is_imported and isinstance(tokenizer, JsonTokenizer):
        return tokenizer.start_ids()
    return [tokenizer.eos_id]


def as_text(prompt: str | bytes, name: str = "prompt") -> str:
    """A prompt as text.

    Args:
      prompt: what the user gave.
      name: of it, for the error's line.

    Raises:
      InputError: it is not UTF-8. A command line hands on such bytes as lone surrogates.
    """
    try:
        data = prompt if isinstance(prompt, bytes) else prompt.encode()
        return data.decode()
    except UnicodeError:
        raise InputError(f"{name}: got {prompt!r}, expected UTF-8") from None
