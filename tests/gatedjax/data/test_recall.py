"""The recall tasks are what their papers say, element by element, and the same for any division
into processes.
"""

import numpy as np
import pytest

from gatedjax.data.recall import RecallConfig, recall_dataset, task_row
from gatedjax.data.recall_rows import copy_row, mqar_row, needle_row
from gatedjax.data.tokenizer import ByteTokenizer


def rng(seed=0):
    return np.random.default_rng(seed)


def zoology(seed, T, V, D, power):
    """The study's algorithm, restated for one example with a zero filler: inputs, and labels (-100
    for none).
    """
    r = rng(seed)
    keys = 1 + r.choice(V // 2 - 1, D, replace=False)
    values = V // 2 + r.choice(V - V // 2, D, replace=False)
    space = (T - 2 * D) // 2
    p = power * np.arange(1, space + 1) ** (power - 1)
    gaps = r.choice(space, D, replace=False, p=p / p.sum())
    examples, labels = np.zeros(T + 1, int), np.full(T + 1, -100)
    examples[0 : 2 * D : 2], examples[1 : 2 * D : 2] = keys, values
    examples[2 * D + 2 * gaps] = keys
    labels[2 * D + 2 * gaps + 1] = values
    return examples[:-1], labels[1:]


@pytest.mark.parametrize("T, D", [(64, 4), (64, 16), (128, 8)])
def test_mqar_is_the_studys(T, D):
    row = mqar_row(rng(3), T, 8192, D, 0.01, random_filler=False)
    tokens, labels = zoology(3, T, 8192, D, 0.01)
    np.testing.assert_array_equal(row.tokens, tokens)
    np.testing.assert_array_equal(row.loss_mask, labels >= 0)
    np.testing.assert_array_equal(row.targets[labels >= 0], labels[labels >= 0])


def test_mqar_can_be_solved_and_its_filler_is_random():
    row = mqar_row(rng(), 128, 64, 8, 0.01, random_filler=True)
    pairs = dict(zip(row.tokens[:16:2], row.tokens[1:16:2]))
    asked = np.flatnonzero(row.loss_mask)
    assert len(pairs) == len(asked) == 8 and min(asked) >= 16
    assert [pairs[k] for k in row.tokens[asked]] == list(row.targets[asked])
    assert np.mean(row.tokens == 0) < 0.1
    assert all(1 <= k < 32 <= v < 64 for k, v in pairs.items())


def test_queries_come_soon():
    """Slot i has probability ~ 1 / i: half of all queries are asked in the first tenth of the
    slots.
    """
    asked = [
        np.flatnonzero(mqar_row(rng(i), 512, 8192, 1, 0.01, False).loss_mask)[0] for i in range(500)
    ]
    assert 0.5 < np.mean(np.array(asked) < 2 + 51) < 0.75


@pytest.mark.parametrize("selective", [False, True])
def test_copies_repeat_their_content(selective):
    row = copy_row(rng(), 40, 16, 8, selective=selective)
    before = row.tokens[:32]
    content = before[before >= 2]
    asked = np.flatnonzero(row.loss_mask)
    assert row.tokens[32] == 1 and list(asked) == list(range(32, 40))
    np.testing.assert_array_equal(row.targets[asked], content)
    np.testing.assert_array_equal(row.tokens[33:], content[:-1])
    gaps = np.diff(np.flatnonzero(before >= 2))
    assert (gaps.max() > 1) == selective


@pytest.mark.parametrize("depth, where", [(0.0, slice(0, 60)), (1.0, slice(110, 180))])
def test_needle_says_what_it_asks_for(depth, where):
    tokenizer = ByteTokenizer()
    text = np.asarray(tokenizer.encode("lorem ipsum dolor sit amet " * 50))
    row = needle_row(rng(), text, tokenizer, 200, depth)
    shown, asked = tokenizer.decode(list(row.tokens)), np.flatnonzero(row.loss_mask)
    code = tokenizer.decode(list(row.targets[asked]))
    assert len(asked) == 5 and code.isdigit() and f"is {code}." in shown[where]
    # The blank after the question predicts the first digit, each digit the next.
    assert list(asked) == list(range(195, 200)) and shown[190:196].endswith("? ")
    np.testing.assert_array_equal(row.tokens[196:], row.targets[195:199])


def test_rows_do_not_depend_on_who_reads_them():
    config = RecallConfig(num_pairs=4, train_examples=50, validation_examples=10)
    whole = recall_dataset(config, "train", batch_size=8, rows=range(8))
    halves = [
        recall_dataset(config, "train", batch_size=8, rows=r) for r in (range(4), range(4, 8))
    ]
    for i in (0, 3, 7):  # 50 rows: batch 7 is in the second epoch
        np.testing.assert_array_equal(
            whole[i].tokens, np.concatenate([h[i].tokens for h in halves])
        )
    validation = recall_dataset(config, "validation", batch_size=8, rows=range(8))
    assert len(validation) == 2 and validation[1].loss_mask.sum() == 2 * 4
    seen = {row.tobytes() for i in range(7) for row in whole[i].tokens}
    assert not seen & {row.tobytes() for i in range(2) for row in validation[i].tokens}
    assert task_row(RecallConfig("copy"))(rng()).tokens.shape == (64,)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(task="recall"), "task: got 'recall', expected one of mqar"),
        (dict(num_pairs=17), "seq_len: got 64, expected at least 68 for num_pairs = 17, even"),
        (dict(seq_len=65), "seq_len: got 65, expected at least 16 for num_pairs = 4, even"),
        (dict(vocab_size=8), "vocab_size: got 8, expected above 9"),
        (dict(task="copy", num_pairs=40), "seq_len: got 64, expected at least 80"),
        (dict(validation_examples=0), "validation_examples: got 0"),
    ],
)
def test_impossible_tasks_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        RecallConfig(**values)


def test_a_needle_needs_a_text_and_room():
    with pytest.raises(ValueError, match="row: got None"):
        recall_dataset(RecallConfig("needle"), "train", batch_size=1, rows=range(1))
    with pytest.raises(ValueError, match="seq_len: got 20, expected above"):
        needle_row(rng(), np.zeros(100), ByteTokenizer(), 20)
    with pytest.raises(ValueError, match="text: got '9 tokens', expected at least"):
        needle_row(rng(), np.zeros(9), ByteTokenizer(), 200)
