"""The text of tokens while they are sampled: pieces that add up to what decoding all at once gives.

A token has no text of its own. Metaspace and WordPiece put a space before a word unless it is the
first; a character may be spread over several tokens. So tokens are decoded behind those before
them, and the text that is new is handed out. A window of tokens is enough for that: the cost of a
token does not depend on how many came before.
"""

from collections.abc import Sequence

from gatedjax.data.tokenizer import Tokenizer

# What a decoder makes of bytes that are no character, or not yet.
REPLACEMENT = "\ufffd"
# A character has at most 4 bytes, of which each may be a token. Of a longer run of replacements at
# the end only so many can still become a character.
UNFINISHED = 4
# Tokens that are decoded again with every new one, and when their number is brought back to that.
CONTEXT = 16
LONGEST_WINDOW = 2 * CONTEXT
# A decoder may change what it said (a byte makes a whole run of bytes no text). It is waited for
# its return to what was handed out, for so many tokens.
MOST_WAITING = 16


class TextStream:
    """The text after a prompt.

    The pieces of `add` and then `rest` are `decode(prompt + added)` without `decode(prompt)`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._window = [int(token) for token in prompt]
        # The text of the window, as far as it was handed out.
        self._shown = tokenizer.decode(self._window)
        self._waiting = 0
        self._shorten(self._shown)

    def add(self, token: int) -> str:
        """The text that is certain with one more token; "" inside a character."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        if not text.startswith(self._shown):
            self._waiting += 1
            if self._waiting < MOST_WAITING:
                return ""
        self._waiting = 0
        start = _common_length(text, self._shown)
        end = max(start, len(text) - _unfinished(text))
        self._shown = text[:end]
        if len(self._window) > LONGEST_WINDOW:
            self._shorten(text)
        return text[start:end]

    def rest(self) -> str:
        """What was not certain, when no token comes any more."""
        text = self._tokenizer.decode(self._window)
        start = _common_length(text, self._shown)
        return text[start:]

    def _shorten(self, text: str) -> None:
        """Forgets all but the last tokens of the window, whose text is `text`."""
        pending = len(text) - len(self._shown)
        first = max(len(self._window) - CONTEXT, 0)
        for start in range(first, len(self._window)):
            window = self._window[start:]
            end_of_text = self._tokenizer.decode(window)
            # Not in the middle of a character or of a word.
            if len(end_of_text) > pending and text.endswith(end_of_text):
                self._window = window
                self._shown = end_of_text[: len(end_of_text) - pending]
                return


def _unfinished(text: str) -> int:
    """How many characters at the end of a text may still become another one."""
    replacements = len(text) - len(text.rstrip(REPLACEMENT))
    return replacements if replacements <= 2 * UNFINISHED else UNFINISHED


def _common_length(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    length = min(len(a), len(b))
    while length and a[:length] != b[:length]:
        length -= 1
    return length
