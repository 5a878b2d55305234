"""Bigram-Backcopy: what follows a trigger, what follows anything else, and the least loss."""

import numpy as np
import pytest

from gatedjax.data.backcopy import backcopy_row, best_loss, language
from gatedjax.data.recall import RecallConfig, language_of, recall_dataset


def test_rows_follow_the_language():
    of = language(16, 3, 0)
    np.testing.assert_allclose(of.probabilities.sum(axis=1), 1)
    assert (of.probabilities[0, :4] == 0).all(), "a row begins with an ordinary token"
    counts = np.zeros((16, 16))
    triggers = 0
    rng = np.random.default_rng(0)
    for _ in range(200):
        row = backcopy_row(rng, 40, of)
        assert row.tokens[0] == 0 and (row.targets[:-1] == row.tokens[1:]).all()
        assert row.loss_mask.all() and (row.positions == np.arange(40)).all()
        at = np.flatnonzero(of.is_trigger(row.tokens))
        np.testing.assert_array_equal(row.targets[at], row.tokens[at - 1])
        assert not of.is_trigger(row.tokens[at - 1]).any()
        triggers += len(at)
        np.add.at(counts, (row.tokens, row.targets), 1)
    assert 0.2 < triggers / 8000 < 0.3
    for token in range(4, 16):
        found = counts[token] / counts[token].sum()
        assert np.abs(found - of.probabilities[token]).max() < 0.12


def test_the_least_loss_is_that_of_the_language():
    of = language(16, 3, 0)
    tokens, targets = np.array([[0, 7, 2, 7]]), np.array([[7, 2, 7, 9]])
    p = of.probabilities
    expected = -(np.log(1 / 12) + np.log(p[7, 2]) + np.log(1.0) + np.log(p[7, 9])) / 4
    assert best_loss(tokens, targets, of) == pytest.approx(expected)


def test_splits_share_a_language_and_seeds_do_not():
    config = RecallConfig(task="bigram_backcopy", seq_len=20, vocab_size=16, num_pairs=3)
    of = language_of(config)
    for split in ("train", "validation"):
        batch = recall_dataset(config, split, batch_size=4, rows=range(4))[0]
        assert np.isfinite(best_loss(batch.tokens, batch.targets, of))
    other = language(16, 3, 1)
    assert not np.allclose(of.probabilities, other.probabilities)
    with pytest.raises(ValueError, match="vocab_size: got 5, expected above 5"):
        RecallConfig(task="bigram_backcopy", vocab_size=5, num_pairs=3)
