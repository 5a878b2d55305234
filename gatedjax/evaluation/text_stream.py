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


class TextUntil:
    """The text after a prompt, up to a token or a string that stops it.

    What may still become a stop string is held back: the pieces never hold a part of one.

    Attributes:
      has_stopped: nothing comes any more.
      tokens: how many were added, without the one that stopped the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        stop_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
    ):
        """Before the first token.

        Args:
          tokenizer: of the model.
          prompt: the tokens before.
          stop_ids: tokens that stop the text and have none.
          stop_strings: they stop it too, the first of them that comes; none is empty.
        """
        self._stream = TextStream(tokenizer, prompt)
        self._stop_ids = frozenset(stop_ids)
        self._stop_strings = tuple(stop_strings)
        self._held = ""
        self.has_stopped = False
        self.tokens = 0

    def add(self, token: int) -> str:
        """The text that is certain with one more token."""
        if self.has_stopped:
            return ""
        if token in self._stop_ids:
            rest = self.rest()
            self.has_stopped = True
            return rest
        self.tokens += 1
        return self._handed_out(self._stream.add(token), is_last=False)

    def rest(self) -> str:
        """What was not certain, when no token comes any more."""
        if self.has_stopped:
            return ""
        return self._handed_out(self._stream.rest(), is_last=True)

    def _handed_out(self, piece: str, is_last: bool) -> str:
        """Of what was held and is new, what is no part of a stop string."""
        text = self._held + piece
        places = [text.find(stop) for stop in self._stop_strings]
        found = [place for place in places if place >= 0]
        if found:
            self.has_stopped = True
            self._held = ""
            return text[: min(found)]
        end = len(text) if is_last else len(text) - begun(text, self._stop_strings)
        self._held = text[end:]
        return text[:end]


def begun(text: str, strings: Sequence[str]) -> int:
    """How many characters at the end of a text are the beginning of one of the strings."""
    longest = max((len(string) for string in strings), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        end = text[-length:]
        if any(string.startswith(end) for string in strings):
            return length
    return 0


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
