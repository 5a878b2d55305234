"""Requests of a harness, packed: against a plain loop over each of them, with a model in numpy."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from tiny_run import VOCAB, plain

from gatedjax.evaluation import packed_scoring
from gatedjax.evaluation.packed_scoring import OfTokens, Request, packings, scores, windows
from gatedjax.evaluation.scoring import log_likelihoods_of_tokens
from gatedjax.training.state import init_params

RNG = np.random.default_rng(0)
# A model of the last two tokens of a document.
TABLE = RNG.normal(size=(VOCAB, VOCAB, VOCAB))
TABLE -= np.log(np.exp(TABLE).sum(axis=-1, keepdims=True))


def logits_after(document):
    """[X], of a document so far."""
    return TABLE[document[-1], document[-2] if len(document) > 1 else 0]


def fake_forward(batch):
    """Place by place, with nothing but what a document's own tokens say."""
    nats, is_best = np.zeros(batch.tokens.shape, np.float32), np.zeros(batch.tokens.shape, bool)
    for row, place in zip(*np.nonzero(batch.mask)):
        same = batch.segment_ids[row] == batch.segment_ids[row, place]
        assert batch.segment_ids[row, place] > 0
        log_p = logits_after(batch.tokens[row][same & (np.arange(same.size) <= place)])
        nats[row, place] = -log_p[batch.targets[row, place]]
        is_best[row, place] = log_p.argmax() == batch.targets[row, place]
    return OfTokens(nats, is_best)


def plain_score(request, most):
    """Sum of log p, token after token, of the last `most` + 1 tokens."""
    document = [*request.context, *request.continuation][-(most + 1) :]
    count = min(len(request.continuation), most)
    total, is_greedy = 0.0, True
    for end in range(len(document) - count, len(document)):
        log_p = logits_after(document[:end])
        total += log_p[document[end]]
        is_greedy &= log_p.argmax() == document[end]
    return total, is_greedy


def some_requests(count):
    made = []
    for i in range(count):
        context = RNG.integers(0, VOCAB, RNG.integers(1, 30)).tolist()
        continuation = RNG.integers(0, VOCAB, RNG.integers(0 if i % 7 == 0 else 1, 25)).tolist()
        if i % 3 == 0:
            continuation = []
            for _ in range(4):
                continuation.append(int(logits_after([*context, *continuation]).argmax()))
        made.append(Request(context, continuation))
    return made


@pytest.mark.parametrize("most", [100, 20, 3])
def test_scores_equal_a_plain_loop(most):
    requests = some_requests(60)
    found = scores(fake_forward, requests, most_tokens=most, batch_size=3)
    assert any(score.is_greedy for score in found) and not all(score.is_greedy for score in found)
    for request, score in zip(requests, found):
        total, is_greedy = plain_score(request, most)
        np.testing.assert_allclose(score.log_likelihood, total, rtol=1e-6, atol=1e-6)
        assert score.is_greedy == is_greedy and score.tokens == min(len(request.continuation), most)


def test_every_document_is_packed_once_and_rows_are_full():
    lengths = RNG.integers(1, 200, 400).tolist()
    seen, places, longest = [], 0, []
    for length, of_batch in packings(lengths, 4):
        longest.append(length)
        places += 4 * length
        used = np.zeros((4, length), int)
        for place in of_batch:
            end = place.start + lengths[place.request]
            assert end <= length
            used[place.row, place.start : end] += 1
            seen.append(place.request)
        assert used.max() == 1, "no token of two documents"
    assert sorted(seen) == list(range(400)) and longest == sorted(longest, reverse=True)
    assert sum(lengths) > 0.95 * places, "hardly any padding"


def test_windows_are_those_of_the_harness():
    """Its own example: every token once, the last window with all the context that fits."""
    cut = windows(range(10), -1, 4)
    assert [(list(r.context), r.continuation) for r in cut] == [
        ([-1], [0, 1, 2, 3]),
        ([3], [4, 5, 6, 7]),
        ([5, 6, 7], [8, 9]),
    ]
    assert windows([], 0, 4) == []


def test_packed_documents_score_as_alone():
    """The model itself, against a row for each document."""
    model = plain(model__init_std=0.3).model
    params = nn.meta.unbox(init_params(model, jax.random.key(0)))
    requests = [Request([5, *r.context], r.continuation) for r in some_requests(9)]
    pairs = [(r.context[1:], r.continuation) for r in requests]
    alone = log_likelihoods_of_tokens(model, params, pairs, eos_id=5, batch_size=9)
    forward = packed_scoring.forward_of(model, params)
    packed = scores(forward, requests, most_tokens=100, batch_size=2)
    for one, other in zip(alone, packed):
        np.testing.assert_allclose(one.log_likelihood, other.log_likelihood, rtol=1e-4, atol=1e-4)
        assert one.is_greedy == other.is_greedy and one.tokens == other.tokens
