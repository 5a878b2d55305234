"""Pieces of text add up to what decoding prompt and continuation together gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gatedjax.data.tokenizer import ByteTokenizer, JsonTokenizer
from gatedjax.errors import InputError
from gatedjax.evaluation import sampling
from gatedjax.evaluation.text_stream import LONGEST_WINDOW, TextStream

TEXT = "Hello world, the cat sat on the mat. It isn't naïve 日本語 🙂 e\u0301 \n\n  x = 1\n"
CORPUS = [TEXT * 3, "the cat the mat world Hello on sat"]


def bpe(pre, decoder, alphabet=(), **options):
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "</s>"],
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    return models.BPE(unk_token="<unk>", **options), pre, decoder, trainer


KINDS = {
    "metaspace": lambda: bpe(pre_tokenizers.Metaspace(), decoders.Metaspace()),
    "byte level": lambda: bpe(
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
        pre_tokenizers.ByteLevel.alphabet(),
    ),
    "suffix": lambda: (
        models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"),
        pre_tokenizers.BertPreTokenizer(),
        decoders.BPEDecoder(),
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<unk>", "</s>"],
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    ),
    "wordpiece": lambda: (
        models.WordPiece(unk_token="[UNK]"),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
        trainers.WordPieceTrainer(
            vocab_size=300, special_tokens=["[UNK]", "[EOS]"], show_progress=False
        ),
    ),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    made = {"bytes": ByteTokenizer()}
    for name, parts in KINDS.items():
        model, pre, decoder, trainer = parts()
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoder
        tokenizer.train_from_iterator(CORPUS, trainer)
        path = tmp_path_factory.mktemp(name.replace(" ", "_")) / "tokenizer.json"
        tokenizer.save(str(path))
        made[name] = JsonTokenizer(str(path))
    return made


@pytest.mark.parametrize("name", ["bytes", *KINDS])
def test_pieces_add_up(tokenizers, name):
    """For every cut of a long text into prompt and continuation."""
    tokenizer = tokenizers[name]
    ids = tokenizer.encode(TEXT * 2).tolist()
    whole = tokenizer.decode(ids)
    for cut in range(0, len(ids), 3):
        stream = TextStream(tokenizer, ids[:cut])
        pieces = [stream.add(token) for token in ids[cut:]]
        text = tokenizer.decode(ids[:cut]) + "".join(pieces) + stream.rest()
        # Bytes of half a character in the prompt are not shown again.
        if not tokenizer.decode(ids[:cut]).endswith("\ufffd"):
            assert text == whole, cut
        assert "\ufffd" not in "".join(pieces), "no half a character"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=120))
def test_any_bytes_add_up(ids):
    """What is no text, as an untrained model writes it."""
    tokenizer = ByteTokenizer()
    stream = TextStream(tokenizer)
    text = "".join([*map(stream.add, ids), stream.rest()])
    assert text == tokenizer.decode(ids)


class Counting(ByteTokenizer):
    longest = 0
    calls = 0

    def decode(self, ids):
        self.calls += 1
        self.longest = max(self.longest, len(ids))
        return super().decode(ids)


def test_the_cost_of_a_token_does_not_grow():
    tokenizer = Counting()
    stream = TextStream(tokenizer)
    rng = np.random.default_rng(0)
    for token in [*TEXT.encode() * 20, *rng.integers(0, 256, 500)]:
        stream.add(int(token))
    assert tokenizer.longest <= 2 * LONGEST_WINDOW
    assert tokenizer.calls < 3 * (20 * len(TEXT.encode()) + 500)


@pytest.mark.parametrize("name", ["metaspace", "wordpiece"])
def test_generated_text_keeps_the_space_at_the_seam(tokenizers, name, monkeypatch):
    tokenizer = tokenizers[name]
    ids = tokenizer.encode("Hello world the cat").tolist()
    rest = ids[len(tokenizer.encode("Hello")) :]
    steps = lambda *args, **options: iter([np.array([token]) for token in rest])
    monkeypatch.setattr(sampling, "generate", steps)
    pieces = sampling.generate_text(None, None, tokenizer, "Hello", len(rest))
    assert "".join(pieces) == " world the cat"


@pytest.mark.parametrize("prompt", [b"caf\xe9", "caf\udce9", "\ud800"])
def test_a_prompt_that_is_not_utf8_is_refused(prompt):
    """As bytes, as a command line hands them on, as JSON can spell it."""
    with pytest.raises(InputError, match=r"prompt: got .*, expected UTF-8"):
        sampling.generate_text(None, None, ByteTokenizer(), prompt, 3)
    assert sampling.as_text("naïve".encode()) == "naïve"
