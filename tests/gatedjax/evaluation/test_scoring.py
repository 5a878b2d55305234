"""Likelihoods by hand, and that training, validation and scoring mean the same tokens."""

import json
import math
import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from tiny_run import plain

from gatedjax.config import FrozenDict, SourceConfig
from gatedjax.data import ByteTokenizer, batches, corpora, make_dataset, validation_text
from gatedjax.evaluation.scoring import log_likelihoods, log_likelihoods_of_tokens
from gatedjax.evaluation.validation import tokens_per_byte
from gatedjax.model import LanguageModel, head_weights, logits
from gatedjax.training.eval_step import batch_losses
from gatedjax.training.state import init_params

TOKENIZER = ByteTokenizer()
END = TOKENIZER.eos_id
CONFIG = plain(model__init_std=0.3, model__vocab_size=257, model__dtype="float32")
TEXTS = ["to be", "", "or not to be, that", "é", "be"]


@pytest.fixture(scope="module")
def params():
    return nn.meta.unbox(init_params(CONFIG.model, jax.random.key(0)))


@pytest.fixture(scope="module")
def log_p(params):
    """log p(next token | tokens before) in float64, for a document's tokens after its begin."""
    model = LanguageModel(CONFIG.model)
    run = jax.jit(lambda tokens: logits(model.apply({"params": params}, tokens)[0], head))
    head = head_weights(params)

    def of_document(ids):
        row = np.zeros((1, 32), np.int32)
        row[0, : len(ids)] = [END, *ids[:-1]]
        z = np.asarray(run(row), np.float64)[0, : len(ids)]
        log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
        best = z.argmax(-1)
        return log_p[np.arange(len(ids)), ids], best == ids

    return of_document


def test_scores_by_hand(params, log_p):
    """Every cut of a text into context and continuation, with and without its end."""
    text = "or not to be"
    ids = np.frombuffer(text.encode(), np.uint8).astype(int)
    by_token, is_best = log_p(np.append(ids, END))
    pairs = [(text[:cut], text[cut:]) for cut in range(len(text) + 1)]
    for with_end in (False, True):
        scores = log_likelihoods(CONFIG.model, params, TOKENIZER, pairs, with_end=with_end)
        stop = len(ids) + with_end
        for cut, score in enumerate(scores):
            np.testing.assert_allclose(score.log_likelihood, by_token[cut:stop].sum(), rtol=1e-5)
            assert score.tokens == stop - cut
            assert score.is_greedy == is_best[cut:stop].all()
    # The chain rule: what a text costs does not depend on where it is cut.
    whole, first, second = log_likelihoods(
        CONFIG.model, params, TOKENIZER, [("", text), ("", text[:5]), (text[:5], text[5:])]
    )
    assert whole.log_likelihood == pytest.approx(first.log_likelihood + second.log_likelihood, 1e-5)


class Words(ByteTokenizer):
    """A space belongs to the word after it; one at the end is a token."""

    def encode(self, text):
        words = re.findall(r" ?\w+| ", text)
        return np.array([sum(word.encode()) % 256 for word in words], np.int32)


def test_a_space_at_the_seam_belongs_to_the_continuation(params):
    """One token with the word after it: the text has none that is the space alone."""
    with_space, without = log_likelihoods(
        CONFIG.model, params, Words(), [("to ", "be"), ("to", " be")]
    )
    assert with_space == without and with_space.tokens == 1


def test_a_greedy_continuation_is_greedy(params):
    """What sampling at temperature 0 writes is what scoring calls greedy, from an empty prompt."""
    from gatedjax.evaluation.sampling import generate

    prompt = np.array([[END]])
    steps = generate(CONFIG.model, params, prompt, 6, vocab_size=257, temperature=0.0)
    ids = [int(token[0]) for token in steps]
    other = [*ids[:-1], (ids[-1] + 1) % 257]
    pairs = [([], ids), (ids[:2], ids[2:]), ([], other)]
    scores = log_likelihoods_of_tokens(CONFIG.model, params, pairs, eos_id=END, batch_size=2)
    assert [score.is_greedy for score in scores] == [True, True, False]


def test_validation_is_the_sum_over_its_documents(params, log_p, tmp_path):
    """Nats of a small text by hand; its loss; its scores; its bits per byte."""
    texts = [text for text in TEXTS if text]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 20))
    source = SourceConfig(kind="jsonl", path=str(path))
    config = plain(
        data__sources=FrozenDict(main=source),
        data__cache_dir=str(tmp_path / "cache"),
        data__tokenizer="bytes",
        data__validation_fraction=0.2,
        # Every window begins a document only if documents have its length; here one holds all.
        data__seq_len=1024,
    )
    corpus = corpora(config.data)["main"]
    tokens, ends = corpus.stream("validation")
    pieces = np.split(np.asarray(tokens[:], int), ends[:-1])
    by_hand = sum(-log_p(piece)[0].sum() for piece in pieces)
    dataset = make_dataset(config.data, "validation", batch_size=1, rows=[0], seed=0)
    (batch,) = batches(dataset)
    sums = batch_losses(CONFIG.model, params, batch)
    assert float(sums.count) == sum(len(piece) for piece in pieces) == len(tokens)
    np.testing.assert_allclose(float(sums.cross_entropy), by_hand, rtol=1e-5)

    documents = [TOKENIZER.decode(piece) for piece in pieces]
    assert set(documents) <= set(texts) and len(documents) > 5
    assert "".join(documents).encode() == validation_text(config.data)
    pairs = [("", document) for document in documents]
    scores = log_likelihoods(CONFIG.model, params, TOKENIZER, pairs, with_end=True)
    np.testing.assert_allclose(-sum(s.log_likelihood for s in scores), by_hand, rtol=1e-5)

    loss = float(sums.cross_entropy) / float(sums.count)
    bits = loss * tokens_per_byte(config.data) / math.log(2)
    num_bytes = sum(len(document.encode()) for document in documents)
    assert bits == pytest.approx(by_hand / math.log(2) / num_bytes, rel=1e-5)
