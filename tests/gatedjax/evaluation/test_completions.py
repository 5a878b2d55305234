"""Many prompts: each as if it were alone, each until its own end."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from tiny_run import plain

from gatedjax.data import ByteTokenizer
from gatedjax.evaluation.completions import Prompt, Stops, batches_by_length, completions
from gatedjax.evaluation.filters import Sampling
from gatedjax.evaluation.sampling import Decoder
from gatedjax.evaluation.text_stream import TextUntil, begun
from gatedjax.training.state import init_params

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def decoder():
    model = plain(model__init_std=0.4, model__vocab_size=TOKENIZER.vocab_size).model
    params = nn.meta.unbox(init_params(model, jax.random.key(0)))
    return Decoder(model, params, TOKENIZER.vocab_size)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompt_in_a_batch_is_as_alone(decoder, temperature):
    """Lengths 1 to 15 in batches of 4, the last one not full; sampled tokens too."""
    rng = np.random.default_rng(1)
    prompts = [
        Prompt(number, rng.integers(0, 256, length).tolist())
        for number, length in enumerate((3, 15, 1, 7, 7))
    ]
    stops = Stops((7, 256), ("!",))
    options = dict(stops=stops, sampling=Sampling(temperature), seed=3)
    together = completions(decoder, TOKENIZER, prompts, 12, batch_size=4, **options)
    alone = [completions(decoder, TOKENIZER, [prompt], 12, **options)[0] for prompt in prompts]
    assert together == alone
    assert len({completion.text for completion in together}) == len(prompts)


def test_batches_hold_like_lengths():
    assert list(batches_by_length([3, 9, 1, 9], 2)) == [[1, 3], [0, 2]]
    assert list(batches_by_length([], 2)) == []


def text_until(data: bytes, *stops: str, ids=(256,)):
    """(pieces, what they add up to, tokens, whether it stopped)."""
    text = TextUntil(TOKENIZER, (), ids, stops)
    pieces = [text.add(token) for token in [*data, 256]]
    return pieces, "".join(pieces), text.tokens, text.has_stopped


def test_stops_in_a_stream():
    pieces, whole, _, stopped = text_until("naïve 日本 x".encode(), "本 x")
    assert whole == "naïve 日" and stopped
    assert "".join(pieces[:6]) == "naïve", "what is certain is shown at once"
    # What begins like a stop and is none comes with the token that says so.
    pieces, whole, _, _ = text_until(b"ab<|en|> c", "<|end|>")
    assert whole == "ab<|en|> c" and pieces[2:7] == ["", "", "", "", "<|en|"]
    # The first of several, also where one is a part of another.
    assert text_until(b"a\nHuman: b", "\nHuman:", "\n")[1] == "a"
    assert text_until(b"aab", "aac", "ab")[1] == "a"
    assert text_until(b"xab", "b", "ab")[1] == "x"
    # A stop that only ends with the text, and the end of the text as a token.
    assert text_until(b"ab", "abc")[1:] == ("ab", 2, True)
    text = TextUntil(TOKENIZER, (), (), ("abc",))
    assert [text.add(token) for token in b"ab"] == ["", ""] and text.rest() == "ab"
    assert not text.has_stopped


def test_begun_is_the_longest_beginning():
    assert begun("xab", ["abc"]) == 2 and begun("abab", ["abac", "b!"]) == 2
    assert begun("abc", ["abc"]) == 0 and begun("", ["a"]) == 0 and begun("a", []) == 0
