"""Streams of Hugging Face `datasets` against the plain list of the same documents."""

import itertools
import json
from pathlib import Path

import chex
import numpy as np
import pytest
from tokenizer_file import train_json_tokenizer

from gatedjax import data
from gatedjax.config import DataConfig, SourceConfig, StreamConfig
from gatedjax.data import streaming
from gatedjax.data.batch import cut_window, stack_rows
from gatedjax.errors import InputError, StorageError

TEXTS = [f"{i} wörds " * (1 + 5 * i % 7) for i in range(23)]
HELD_OUT = 3

pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def nothing_read_before(monkeypatch):
    monkeypatch.setattr(streaming, "_held_out", {})
    # Several groups in a pass.
    monkeypatch.setattr(streaming, "GROUP", 6)
    monkeypatch.setattr(streaming, "ENCODE_CHARACTERS", 40)


def write_parquet(folder: Path, texts=TEXTS) -> str:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir(parents=True, exist_ok=True)
    shards = 3
    per_shard = -(-len(texts) // shards)
    for i in range(shards):
        part = texts[i * per_shard : (i + 1) * per_shard]
        table = pa.table({"text": part, "n": list(range(len(part)))})
        pq.write_table(table, folder / f"train-{i:05}.parquet", row_group_size=4)
    pq.write_table(pa.table({"text": ["held out", "as well"]}), folder / "validation.parquet")
    return str(folder)


def write_jsonl(path: Path, texts=TEXTS) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def config(path: str, seq_len: int = 16, tokenizer: str = "bytes", **stream) -> DataConfig:
    stream = {"validation_documents": HELD_OUT} | stream
    source = SourceConfig(kind="hf", path=path, stream=StreamConfig(**stream))
    return DataConfig(sources={"main": source}, seq_len=seq_len, tokenizer=tokenizer)


def stream_of(cfg: DataConfig, rows=range(4), batch_size: int = 4, places=None, **options):
    dataset = data.make_dataset(cfg, "train", batch_size=batch_size, rows=list(rows), seed=0)
    return data.batches(dataset, 0, places, **options)


def take(stream, count: int) -> list[data.Batch]:
    return list(itertools.islice(stream, count))


def slow_rows(passes: list[list[str]], tokenizer, seq_len: int, count: int) -> list[data.Batch]:
    """The windows of the explicit list of documents."""
    pieces = [
        np.concatenate([tokenizer.encode(text), [tokenizer.eos_id]])
        for texts in passes
        for text in texts
    ]
    ends = np.cumsum([len(piece) for piece in pieces])
    tokens = np.concatenate(pieces)
    assert len(tokens) >= count * seq_len
    return [cut_window(tokens, ends, i, seq_len) for i in range(count)]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "tokenizer"])
def test_rows_are_the_windows_of_all_documents_in_order(tmp_path, kind):
    tokenizer = "bytes"
    if kind == "tokenizer":
        tokenizer = train_json_tokenizer(tmp_path / "tokenizer.json")
    if kind == "jsonl":
        path = write_jsonl(tmp_path / "a.jsonl")
    else:
        path = write_parquet(tmp_path / "d")
    cfg = config(path, tokenizer=tokenizer)
    batches = take(stream_of(cfg), 25 if tokenizer == "bytes" else 12)
    # Two passes and a bit.
    expected = slow_rows(
        4 * [TEXTS[HELD_OUT:]], data.load_tokenizer(tokenizer), 16, 4 * len(batches)
    )
    rows = [stack_rows(expected[i : i + 4]) for i in range(0, len(expected), 4)]
    for got, wanted in zip(batches, rows, strict=True):
        chex.assert_trees_all_equal(got, wanted)


@pytest.mark.parametrize("shuffle", [0, 5])
def test_any_number_of_processes_and_threads(tmp_path, shuffle):
    cfg = config(write_parquet(tmp_path / "d"), shuffle_documents=shuffle)
    alone = take(stream_of(cfg), 20)
    parts = [take(stream_of(cfg, rows=[i, i + 2], num_threads=0), 20) for i in range(2)]
    for whole, even, odd in zip(alone, *parts):
        for name in ("tokens", "targets", "positions", "segment_ids", "loss_mask"):
            joined = np.empty_like(getattr(whole, name))
            joined[0::2], joined[1::2] = getattr(even, name), getattr(odd, name)
            np.testing.assert_array_equal(getattr(whole, name), joined)


@pytest.mark.parametrize("shuffle", [0, 5])
def test_goes_on_from_any_batch_to_the_bit(tmp_path, shuffle):
    """The place is that of the batch that was given, however far the thread has read ahead."""
    cfg = config(write_parquet(tmp_path / "d"), shuffle_documents=shuffle)
    stream = stream_of(cfg)
    expected = []
    places = [stream.places()]
    for batch in itertools.islice(stream, 30):
        expected.append(batch)
        # As a checkpoint keeps it.
        places.append(json.loads(json.dumps(stream.places())))
    for i in range(0, 30, 7):
        again = take(stream_of(cfg, places=places[i], num_threads=0), 30 - i)
        chex.assert_trees_all_equal(again, expected[i:])


def test_goes_on_with_rows_of_another_length_and_batches_of_another_size(tmp_path):
    path = write_parquet(tmp_path / "d")
    stream = stream_of(config(path))
    before = take(stream, 7)
    longer = stream_of(config(path, seq_len=48), range(2), 2, places=stream.places())
    after = take(longer, 8)
    targets = [batch.targets.ravel() for batch in before + after]
    expected = slow_rows(4 * [TEXTS[HELD_OUT:]], data.ByteTokenizer(), 16, 4 * 7 + 8 * 2 * 3)
    expected_targets = np.concatenate([row.targets for row in expected])
    np.testing.assert_array_equal(np.concatenate(targets), expected_targets)


def documents_in(batches: list[data.Batch]) -> list[str]:
    targets = np.concatenate([batch.targets.ravel() for batch in batches])
    ends = np.flatnonzero(targets == data.ByteTokenizer.eos_id)
    pieces = np.split(targets, ends + 1)[:-1]
    return [data.ByteTokenizer().decode(piece) for piece in pieces]


def test_shuffled_documents_are_all_there_in_a_new_order_each_pass(tmp_path):
    cfg = config(write_parquet(tmp_path / "d"), shuffle_documents=8)
    documents = documents_in(take(stream_of(cfg), 40))
    kept = TEXTS[HELD_OUT:]
    passes = [documents[i : i + len(kept)] for i in range(0, 2 * len(kept), len(kept))]
    for one in passes:
        # Within their groups.
        for start in range(0, len(kept), 8):
            assert sorted(one[start : start + 8]) == sorted(kept[start : start + 8])
    assert passes[0] != passes[1] != kept


def test_what_is_held_out_is_not_trained_on(tmp_path):
    # One of the first documents stands once more at the end.
    texts = [*TEXTS, TEXTS[1], ""]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    corpus = data.corpora(config(path))["main"]
    assert corpus.validation_text() == "".join(TEXTS[:HELD_OUT]).encode()
    info = corpus.splits["validation"]
    assert (info.documents, info.bytes) == (HELD_OUT, len(corpus.validation_text()))
    assert info.tokens == info.bytes + HELD_OUT
    documents = documents_in(take(stream_of(config(path)), 30))
    assert documents == (3 * TEXTS[HELD_OUT:])[: len(documents)]
    assert "streaming" in corpus.describe()


def test_validation_from_a_split_of_its_own(tmp_path):
    cfg = config(write_parquet(tmp_path / "d"), validation_split="validation")
    assert data.validation_text(cfg) == b"held outas well"
    validation = data.make_dataset(cfg, "validation", batch_size=2, rows=[0, 1], seed=0)
    # 17 tokens: two windows.
    assert len(validation) == 1
    assert documents_in(take(stream_of(cfg), 20))[: len(TEXTS)] == TEXTS


def test_a_stream_beside_files(tmp_path):
    """The interleaving and the windows of the files are what they are without streams."""
    files = tmp_path / "files"
    files.mkdir()
    (files / "a.txt").write_text("abc" * 100)
    (files / "b.txt").write_text("xyz" * 100)
    text = SourceConfig(kind="text", path=str(files), weight=3.0)
    streamed = config(write_parquet(tmp_path / "d")).sources["main"]
    cfg = DataConfig(
        sources={"a": text, "b": streamed}, seq_len=16, cache_dir=str(tmp_path / "cache")
    )
    stream = stream_of(cfg)
    batches = take(stream, 6)
    rows = np.concatenate([batch.targets for batch in batches])
    is_streamed = np.array([not set(row) <= set(b"abcxyz") | {0, 256} for row in rows])
    assert is_streamed.sum() == len(rows) / 4
    expected = slow_rows([TEXTS[HELD_OUT:]], data.ByteTokenizer(), 16, is_streamed.sum())
    np.testing.assert_array_equal(rows[is_streamed], [row.targets for row in expected])
    only_files = DataConfig(sources={"a": text}, seq_len=16, cache_dir=str(tmp_path / "cache"))
    from_files = np.concatenate([batch.targets for batch in take(stream_of(only_files), 5)])
    np.testing.assert_array_equal(rows[~is_streamed], from_files[: (~is_streamed).sum()])
    # Both go on: the files by the row, the stream by its place.
    dataset = data.make_dataset(cfg, "train", batch_size=4, rows=range(4), seed=0)
    first = take(data.batches(dataset), 2)
    half = data.batches(dataset)
    take(half, 2)
    rest = take(data.batches(dataset, half.next_index, half.places()), 4)
    chex.assert_trees_all_equal(first + rest, batches)


def expect_input_error(cfg: DataConfig, match: str) -> None:
    with pytest.raises(InputError, match=match) as info:
        data.corpora(cfg)
    assert "\n" not in str(info.value)


def test_bad_streams(tmp_path):
    path = write_parquet(tmp_path / "d")
    expect_input_error(config(path, split="nope"), "split 'nope'.*train")
    expect_input_error(config(path, validation_split="nope"), "split 'nope'")
    expect_input_error(config(path, subset="nope"), "nope")
    expect_input_error(config(path, validation_documents=100), "no text left to train on")
    expect_input_error(config(str(tmp_path / "none")), "does not exist")
    expect_input_error(config(""), "path: empty")
    expect_input_error(config(str(tmp_path / "*.parquet")), "matches no file")
    (tmp_path / "a.bin").write_bytes(b"x")
    expect_input_error(config(str(tmp_path / "a.bin")), "ends in .parquet")
    (tmp_path / "half.parquet").write_bytes((tmp_path / "d/train-00000.parquet").read_bytes()[:99])
    expect_input_error(config(str(tmp_path / "half.parquet")), "cannot be")
    numbers = write_jsonl(tmp_path / "numbers.jsonl", [1, 2, 3, 4, 5])
    expect_input_error(config(numbers), "holds int, expected a string")


def test_a_missing_column(tmp_path):
    path = write_parquet(tmp_path / "d")
    source = SourceConfig(kind="hf", path=path, field="body")
    expect_input_error(DataConfig(sources={"main": source}), "field: got 'body', expected one of")


def test_stream_keys_of_another_kind():
    with pytest.raises(InputError, match="kind: got 'text', expected 'hf'"):
        SourceConfig(kind="text", stream=StreamConfig(split="test"))
    with pytest.raises(InputError, match="validation_split: got 'train'"):
        StreamConfig(validation_split="train")


def test_missing_library(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    expect_input_error(config(write_parquet(tmp_path / "d")), "kind hf needs the datasets library")


def test_a_name_that_the_hub_does_not_have(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def unreachable(self, name, timeout):
        raise ConnectionError("Name or service not known\nmore")

    monkeypatch.setattr(hub.HfApi, "dataset_info", unreachable)
    expect_input_error(config("nobody/none"), "nobody/none.*hub.*Name or service not known")


def test_a_hub_that_stops_to_answer_may_answer_again(tmp_path, monkeypatch):
    documents = streaming.DocumentStream(
        "main", config(write_parquet(tmp_path / "d")).sources["main"], "train"
    )
    documents.read(2)

    def fail():
        raise ConnectionError("reset by peer")
        yield

    monkeypatch.setattr(documents, "_rows", fail())
    with pytest.raises(InputError) as local:
        documents.read(2)
    assert not isinstance(local.value, StorageError)
    monkeypatch.setattr(documents, "_rows", fail())
    monkeypatch.setattr(documents, "_is_remote", True)
    with pytest.raises(StorageError, match="reset by peer"):
        documents.read(2)


def test_a_dataset_that_has_changed(tmp_path):
    path = write_parquet(tmp_path / "d")
    stream = stream_of(config(path))
    take(stream, 9)
    write_parquet(tmp_path / "d", [f"{text}!" for text in TEXTS])
    with pytest.raises(InputError, match="another document now"):
        stream_of(config(path), places=stream.places())
    for damaged in ({}, {"main": 1}, {"dataset": {}}):
        with pytest.raises(InputError, match=r"place in the stream|cannot be read"):
            stream_of(config(path), places={"main": damaged})
