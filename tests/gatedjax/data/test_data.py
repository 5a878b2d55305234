"""Sources, tokenizers, the token cache, windows and the stream of global batches."""

import errno
import gzip
import itertools
import json
import multiprocessing
import os
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import chex
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_file import TEXTS, train_json_tokenizer

from gatedjax import data
from gatedjax.config import DataConfig, SourceConfig
from gatedjax.data import formats, sources, token_cache, tokenized_splits
from gatedjax.data.batch import cut_window, num_windows, stack_rows
from gatedjax.data.encoders import TextEncoder
from gatedjax.errors import InputError, TrainingError


def write_text(folder: Path, texts=TEXTS) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_bytes(text.encode())
    return str(folder)


def write_jsonl(folder: Path, texts=TEXTS) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "a.jsonl"
    path.write_bytes(b"\r\n\n".join(json.dumps({"id": 1, "text": t}).encode() for t in texts))
    return str(path)


def write_parquet(folder: Path, texts=TEXTS) -> str:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(2):
        table = pa.table({"text": texts[part::2], "n": list(range(len(texts[part::2])))})
        pq.write_table(table, folder / f"{part}.parquet", row_group_size=7)
    return str(folder)


def write_array_record(folder: Path, texts=TEXTS) -> str:
    module = pytest.importorskip("array_record.python.array_record_module")
    folder.mkdir(parents=True, exist_ok=True)
    writer = module.ArrayRecordWriter(str(folder / "a.array_record-00000-of-00001"), "group_size:1")
    for text in texts:
        writer.write(json.dumps({"text": text}).encode())
    writer.close()
    return str(folder)


def write_hf_disk(folder: Path, texts=TEXTS) -> str:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": texts, "n": list(range(len(texts)))}).save_to_disk(
        str(folder)
    )
    return str(folder)


WRITERS = {
    "text": write_text,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "array_record": write_array_record,
    "hf_disk": write_hf_disk,
}


def config(
    tmp_path, path: str = "", kind: str = "text", *, field: str = "text", **values
) -> DataConfig:
    path = path or write_text(tmp_path / "corpus")
    source = {"main": SourceConfig(kind=kind, path=path, field=field)}
    return DataConfig(
        **{"sources": source, "seq_len": 16, "cache_dir": str(tmp_path / "cache"), **values}
    )


def corpus_of(cfg: DataConfig) -> data.Corpus:
    (corpus,) = data.corpora(cfg).values()
    return corpus


def documents_of(corpus: data.Corpus, split: str, tokenizer=None) -> list[str]:
    """Back from the token stream to texts; checks that each document ends with the end-of-document
    token.
    """
    tokenizer = tokenizer or data.ByteTokenizer()
    tokens, ends = corpus.stream(split)
    assert ends[-1] == len(tokens) == corpus.splits[split].tokens
    assert all(tokens[end - 1] == tokenizer.eos_id for end in ends)
    return [tokenizer.decode(tokens[a:b]) for a, b in itertools.pairwise([0, *ends])]


# Tokenizers


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = data.ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.dtype == np.int32 and len(ids) == len(text.encode())
    assert tokenizer.decode([*ids, tokenizer.eos_id, 400]) == text


def test_bytes_decode_of_half_a_character():
    assert data.ByteTokenizer().decode(data.ByteTokenizer().encode("é")[:1]) == "\ufffd"


def test_json_tokenizer_round_trip(tmp_path):
    tokenizer = data.load_tokenizer(train_json_tokenizer(tmp_path / "tokenizer.json"))
    assert (tokenizer.name, tokenizer.eos_id) == ("tokenizer.json", 0)

    @settings(max_examples=50, deadline=None)
    @given(st.text())
    def check(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert (ids < tokenizer.vocab_size).all()

    check()
    assert len(tokenizer.encode(TEXTS[6])) < len(TEXTS[6]) / 2
    forged = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eos_id not in forged and tokenizer.decode(forged) == "a<|endoftext|>b"
    other = data.load_tokenizer(train_json_tokenizer(tmp_path / "other.json", ("</s>", "<pad>")))
    assert other.eos_id == 0 and other.fingerprint != tokenizer.fingerprint


def test_a_folder_or_a_name_on_the_hub(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    path = train_json_tokenizer(tmp_path / "tokenizer.json")
    asked = []

    def download(name, file):
        asked.append((name, file))
        if name == "away/model":
            raise OSError("nobody answers\nmore lines")
        # The library's cache is made of links.
        (tmp_path / "link.json").unlink(missing_ok=True)
        (tmp_path / "link.json").symlink_to(path)
        return str(tmp_path / "link.json")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    right = data.load_tokenizer(path).fingerprint
    assert data.load_tokenizer(str(tmp_path)).fingerprint == right and not asked
    for name in ("gpt2", "Qwen/Qwen3-0.6B"):
        assert data.load_tokenizer(name).fingerprint == right
        assert asked[-1] == (name, "tokenizer.json")
    with pytest.raises(InputError, match=r"no file 'away/model' here.* hub \(nobody answers\)$"):
        data.load_tokenizer("away/model")
    for path_only in ("./gpt2", "a/b/c", "/gpt2", "../gpt2"):
        with pytest.raises(InputError, match="cannot be read"):
            data.load_tokenizer(path_only)
    assert len(asked) == 3


def test_the_end_of_a_document_by_name(tmp_path):
    names = ("<|endoftext|>", "<|im_end|>")
    path = train_json_tokenizer(tmp_path / "tokenizer.json", names)
    usual = data.load_tokenizer(path)
    by_name = [data.load_tokenizer(path, name) for name in names]
    assert [t.eos_id for t in by_name] == [0, 1] and usual.eos_id == 0
    # The stream of tokens is another one, and so are cache and identity.
    assert by_name[0].fingerprint == usual.fingerprint != by_name[1].fingerprint
    with pytest.raises(InputError, match=r"end_of_document: .* has no token '<end>'"):
        data.load_tokenizer(path, "<end>")
    with pytest.raises(InputError, match="end_of_document: got 'x', expected '' for"):
        data.load_tokenizer("bytes", "x")
    unusual = train_json_tokenizer(tmp_path / "unusual.json", ("<fin>",))
    assert data.load_tokenizer(unusual, "<fin>").eos_id == 0


def test_tokenizer_errors(tmp_path):
    with pytest.raises(
        InputError, match=r"tokenizer: './bites' cannot be read .* expected 'bytes', a file or"
    ):
        data.load_tokenizer("./bites")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(InputError, match=r"x.json' is not a tokenizer.json"):
        data.load_tokenizer(str(tmp_path / "x.json"))
    no_end = train_json_tokenizer(tmp_path / "no_end.json", ("<pad>",))
    with pytest.raises(
        InputError, match=r"no end-of-document token; expected one of <\|endoftext\|>"
    ):
        data.load_tokenizer(no_end)


# Sources and the cache


def compressed_lines(path: Path, texts=TEXTS) -> str:
    """A JSON Lines file in two pieces, as tools append them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        compress = gzip.compress
    else:
        compress = formats._zstandard().compress
    half = len(texts) // 2
    pieces = []
    for part in (texts[:half], texts[half:]):
        lines = "".join(json.dumps({"text": text}) + "\r\n\n" for text in part)
        pieces.append(compress(lines.encode()))
    path.write_bytes(b"".join(pieces))
    return str(path)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_lines_hold_the_same_documents(tmp_path, ending):
    plain = corpus_of(config(tmp_path, write_jsonl(tmp_path / "plain"), "jsonl"))
    path = compressed_lines(tmp_path / "corpus" / f"a.jsonl{ending}")
    for named in (path, str(tmp_path / "corpus")):
        corpus = corpus_of(config(tmp_path, named, "jsonl"))
        assert (corpus.sha256, corpus.documents) == (plain.sha256, plain.documents)
    whole = Path(path).read_bytes()
    for bad in (whole[: len(whole) // 3], whole[:20] + b"xxx" + whole[23:], b"no archive"):
        Path(path).write_bytes(bad)
        with pytest.raises(InputError, match=rf"a.jsonl{ending}.*: "):
            corpus_of(config(tmp_path, path, "jsonl"))


def test_a_pattern_of_files(tmp_path):
    folder = tmp_path / "corpus"
    for name in ("b/1.jsonl", "b/2.jsonl", "a/1.jsonl", "a/x.txt", "c.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": f"of {name}, " * 9}) + "\n")

    def documents(pattern):
        source = SourceConfig(kind="jsonl", path=str(folder / pattern))
        return [text[:12].split(",")[0] for text in sources.open_source("main", source).texts()]

    assert documents("b/*.jsonl") == ["of b/1.jsonl", "of b/2.jsonl"]
    assert documents("?/1.jsonl") == ["of a/1.jsonl", "of b/1.jsonl"]
    assert documents("**/*.jsonl") == documents("") and len(documents("")) == 4
    with pytest.raises(InputError, match=r"sources.main.path: .*\*.parquet' matches no file"):
        documents("*.parquet")


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_keeps_every_document(tmp_path, kind):
    cfg = config(tmp_path, WRITERS[kind](tmp_path / "corpus"), kind, validation_fraction=0.3)
    corpus = corpus_of(cfg)
    parts = {split: documents_of(corpus, split) for split in ("train", "validation")}
    assert sorted(parts["train"] + parts["validation"]) == sorted(TEXTS)
    in_order = [*TEXTS[0::2], *TEXTS[1::2]] if kind == "parquet" else TEXTS  # parquet: two files
    for part in parts.values():
        assert part == [t for t in in_order if t in part]
    assert 4 <= corpus.splits["validation"].documents <= 22
    assert corpus.documents == 40 and corpus.bytes == sum(len(t.encode()) for t in TEXTS)
    assert corpus.bytes == sum(s.bytes for s in corpus.splits.values())
    assert data.validation_text(cfg) == "".join(parts["validation"]).encode()
    # With bytes, what is predicted (every token but the first of a document) is as many as the
    # bytes.
    train = corpus.splits["train"]
    assert train.tokens == train.bytes + train.documents, "a byte a token, and the ends"
    assert "sha256" in corpus.describe() and "\n" not in corpus.describe()
    assert corpus_of(cfg) == corpus


def test_hash_is_of_the_text(tmp_path):
    a = corpus_of(config(tmp_path, write_text(tmp_path / "a")))
    b = corpus_of(config(tmp_path, write_jsonl(tmp_path / "b"), "jsonl"))
    c = corpus_of(config(tmp_path, write_text(tmp_path / "c", [*TEXTS[:-1], TEXTS[-1] + "."])))
    assert a.sha256 == b.sha256 != c.sha256


def test_split_of_a_document_does_not_depend_on_the_others(tmp_path):
    whole = corpus_of(config(tmp_path, write_text(tmp_path / "a"), validation_fraction=0.3))
    path = Path(write_text(tmp_path / "b"))
    for i in range(0, 40, 3):
        (path / f"{i:03}.txt").unlink()
    part = corpus_of(config(tmp_path, str(path), validation_fraction=0.3))
    kept = [t for i, t in enumerate(TEXTS) if i % 3]
    assert documents_of(part, "validation") == [
        t for t in documents_of(whole, "validation") if t in kept
    ]


@pytest.mark.parametrize("fraction, split", [(1e-9, "validation"), (1 - 1e-6, "train")])
def test_both_splits_get_a_document(tmp_path, fraction, split):
    corpus = corpus_of(config(tmp_path, validation_fraction=fraction))
    assert corpus.splits[split].documents == 1 and corpus.documents == 40


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1]])
def test_all_of_a_text_can_be_held_out(tmp_path, texts):
    cfg = config(tmp_path, write_text(tmp_path / "corpus", texts), validation_fraction=1.0)
    corpus = corpus_of(cfg)
    assert corpus.exception is None and corpus.splits["train"].documents == 0
    assert corpus.splits["validation"].documents == sum(1 for text in texts if text)
    assert data.validation_text(cfg) == "".join(texts).encode()
    assert "train" not in corpus.describe().split("bytes: ")[-1].split("cache")[0]
    dataset = data.make_dataset(cfg, "validation", batch_size=2, rows=range(2), seed=0)
    assert (
        sum(batch.loss_mask.sum() for batch in data.batches(dataset))
        == corpus.splits["validation"].tokens
    )
    with pytest.raises(InputError, match="validation_fraction: got 1"):
        data.make_dataset(cfg, "train", batch_size=2, rows=range(2), seed=0)


def test_one_document_is_cut_at_a_line_end(tmp_path):
    (tmp_path / "one.txt").write_text("".join(f"line {i}\n" for i in range(100)))
    corpus = corpus_of(config(tmp_path, str(tmp_path / "one.txt"), validation_fraction=0.1))
    train, validation = (documents_of(corpus, split)[0] for split in ("train", "validation"))
    assert train.endswith("\n") and validation.startswith("line 9")
    assert train + validation == (tmp_path / "one.txt").read_text()


def test_files_that_are_not_utf8_are_counted(tmp_path):
    path = write_text(tmp_path / "corpus")
    (tmp_path / "corpus" / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / "corpus" / "empty.txt").write_bytes(b"")
    (tmp_path / "corpus" / ".hidden").write_bytes(b"hidden")
    corpus = corpus_of(config(tmp_path, path))
    assert (corpus.documents, corpus.skipped) == (40, 1)
    assert "1 files not UTF-8 left out" in corpus.describe()


def test_json_lines_has_random_access(tmp_path):
    lines = sources.JsonLines(Path(write_jsonl(tmp_path)), "text")
    assert len(lines) == 40 and [lines[i] for i in (39, 0, 17)] == [TEXTS[39], TEXTS[0], TEXTS[17]]


def test_json_lines_with_a_lone_surrogate(tmp_path):
    lines = [f'{{"text": "a\\ud800b{i}"}}\n' for i in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    corpus = corpus_of(config(tmp_path, str(tmp_path / "a.jsonl"), "jsonl"))
    texts = documents_of(corpus, "validation") + documents_of(corpus, "train")
    assert sorted(texts) == ["a?b0", "a?b1", "a?b2"]


def test_array_record_of_plain_text(tmp_path):
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for text in TEXTS:
        writer.write(text.encode())
    writer.close()
    corpus = corpus_of(config(tmp_path, str(tmp_path / "a.array_record"), "array_record", field=""))
    assert sorted(documents_of(corpus, "train") + documents_of(corpus, "validation")) == sorted(
        TEXTS
    )
    with pytest.raises(InputError, match=r"record 0: not JSON .* set field to ''"):
        data.corpora(config(tmp_path, str(tmp_path / "a.array_record"), "array_record"))


def test_python_stdlib(tmp_path):
    cfg = DataConfig(cache_dir=str(tmp_path / "cache"))
    corpus = corpus_of(cfg)
    root = Path(sysconfig.get_path("stdlib"))
    names = {
        f.relative_to(root).as_posix() for f in sources.open_source("main", SourceConfig()).files
    }
    assert {"ast.py", "json/decoder.py", "unittest/case.py"} <= names
    assert not any(
        {"test", "tests", "idle_test", "site-packages"} & set(name.split("/")[:-1])
        for name in names
    )
    assert corpus.documents + corpus.skipped <= len(names) and corpus.bytes > 5_000_000
    assert 0.02 < corpus.splits["validation"].bytes / corpus.bytes < 0.15
    texts = documents_of(corpus, "train") + documents_of(corpus, "validation")
    assert (root / "ast.py").read_bytes().decode() in texts
    assert len(data.validation_text(cfg)) == corpus.splits["validation"].bytes


def test_a_changed_source_is_tokenized_again(tmp_path):
    cfg = config(tmp_path)
    before = corpus_of(cfg)
    file = tmp_path / "corpus" / "000.txt"
    file.write_text("changed")
    after = corpus_of(cfg)
    assert after.path != before.path and after.sha256 != before.sha256
    os.utime(file, ns=(0, 0))
    assert corpus_of(cfg).path != after.path
    assert (
        corpus_of(config(tmp_path, str(tmp_path / "corpus"), validation_fraction=0.2)).path
        != after.path
    )


def test_json_tokenizer_cache(tmp_path):
    cfg = config(
        tmp_path, tokenizer=train_json_tokenizer(tmp_path / "t.json"), validation_fraction=0.3
    )
    corpus, tokenizer = corpus_of(cfg), data.load_tokenizer(cfg.tokenizer)
    texts = documents_of(corpus, "train", tokenizer) + documents_of(corpus, "validation", tokenizer)
    assert sorted(texts) == sorted(TEXTS)
    info = corpus.splits["train"]
    assert info.bytes_per_token == info.bytes / info.tokens > 1.5
    assert (
        corpus.path
        != corpus_of(config(tmp_path, str(tmp_path / "corpus"), validation_fraction=0.3)).path
    )


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    tokenizer = data.ByteTokenizer()
    tokenizer.vocab_size, tokenizer.eos_id, tokenizer.fingerprint = 70_000, 69_999, "wide"
    cfg = config(tmp_path)
    source = sources.open_source("main", cfg.sources["main"])
    corpus = token_cache.tokenize(source, TextEncoder(tokenizer), 0.3, tmp_path / "cache")
    assert corpus.dtype == "uint32" and documents_of(corpus, "train", tokenizer)


# Bad input: one line, nothing left behind


def bad_jsonl(tmp_path, line: str) -> str:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n\n' + line + '\n{"text": "fine"}\n')
    return str(tmp_path / "bad.jsonl")


BAD_LINES = {
    '{"text": "bro': r"bad.jsonl, line 3: not JSON",
    '{"txt": "a", "n": 1}': r"bad.jsonl, line 3: no field 'text'; it has txt, n",
    '{"text": 7}': r"bad.jsonl, line 3: field 'text' holds int, expected a string",
    '["text"]': r"bad.jsonl, line 3: got list, expected an object with field 'text'",
    "[" * 100_000: r"bad.jsonl, line 3: not JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:14])
def test_bad_json_lines(tmp_path, line):
    expect_input_error(config(tmp_path, bad_jsonl(tmp_path, line), "jsonl"), BAD_LINES[line])


def expect_input_error(cfg: DataConfig, match: str) -> None:
    """InputError of one line, and no cache of any kind."""
    with pytest.raises(InputError, match=match) as e:
        data.corpora(cfg)
    assert "\n" not in str(e.value)
    cache = Path(cfg.cache_dir)
    assert not cache.is_dir() or all(f.name.endswith(".lock") for f in cache.iterdir())


def test_missing_and_unknown(tmp_path):
    expect_input_error(
        config(tmp_path, str(tmp_path / "nowhere")),
        r"sources.main.path: '.*nowhere' does not exist",
    )
    with pytest.raises(InputError, match=r"kind: got 'csv', expected one of python_"):
        config(tmp_path, str(tmp_path), "csv")
    nameless = DataConfig(
        sources={"main": SourceConfig(kind="jsonl")}, cache_dir=str(tmp_path / "cache")
    )
    expect_input_error(
        nameless, r"sources.main.path: empty, expected a file or folder for kind jsonl"
    )
    with pytest.raises(InputError, match=r"weight: got 0.0, expected above 0"):
        SourceConfig(kind="text", path=str(tmp_path), weight=0.0)


def test_nothing_to_read(tmp_path):
    (tmp_path / "empty").mkdir()
    expect_input_error(
        config(tmp_path, str(tmp_path / "empty")), r"'.*empty' holds no file of kind text"
    )
    (tmp_path / "empty" / "a.txt").write_bytes(b"")
    expect_input_error(
        config(tmp_path, str(tmp_path / "empty")), r"no text for the train split: 0 documents"
    )
    (tmp_path / "empty" / "a.txt").write_bytes(b"\xff")
    expect_input_error(
        config(tmp_path, str(tmp_path / "empty")), r"0 documents, 1 files that are not UTF-8"
    )
    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
    expect_input_error(
        config(tmp_path, str(tmp_path / "empty.jsonl"), "jsonl"), r"no text for the train split"
    )


@pytest.mark.parametrize("kind", ["parquet", "array_record", "hf_disk"])
def test_files_of_another_kind(tmp_path, kind):
    WRITERS[kind](tmp_path / "good")
    path = tmp_path / "bad"
    path.mkdir()
    name = "x" if kind == "hf_disk" else f"x.{kind}"
    (path / name).write_bytes(b"nothing of the kind" * 100)
    target = path if kind == "hf_disk" else path / name
    expect_input_error(config(tmp_path, str(target), kind), rf"{target.name}: not a")
    if kind != "array_record":
        expect_input_error(
            config(tmp_path, str(tmp_path / "good"), kind, field="body"),
            r"no field 'body'; it has text, n",
        )
        expect_input_error(
            config(tmp_path, str(tmp_path / "good"), kind, field="n"),
            r"row 0: field 'n' holds int, expected",
        )


def test_saved_dataset_with_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    parts = datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": TEXTS}))
    parts.save_to_disk(str(tmp_path / "saved"))
    expect_input_error(
        config(tmp_path, str(tmp_path / "saved"), "hf_disk"),
        r"holds the splits train; give the folder",
    )


@pytest.mark.parametrize("kind, module", [("parquet", "pyarrow.parquet"), ("hf_disk", "datasets")])
def test_missing_extra(tmp_path, monkeypatch, kind, module):
    path = WRITERS[kind](tmp_path / "corpus")
    monkeypatch.setitem(os.sys.modules, module, None)
    expect_input_error(
        config(tmp_path, path, kind),
        rf"kind {kind} needs the {module.split('.')[0]} library: pip install",
    )


def test_a_truncated_file(tmp_path):
    path = Path(write_parquet(tmp_path / "corpus")) / "1.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    expect_input_error(
        config(tmp_path, str(path.parent), "parquet"), r"1.parquet: not a Parquet file"
    )


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(formats, "open_plain", refuse)
    expect_input_error(config(tmp_path), r"000.txt: cannot be read \(.*Permission denied")


def test_full_disk(tmp_path, monkeypatch):
    class FullDisk:
        def __init__(self, file):
            self.file = file

        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            self.file.close()

    def full(path, mode="r"):
        return FullDisk(open(path, mode)) if path.name == "train.tokens" else open(path, mode)

    cfg = config(tmp_path)
    kept = corpus_of(config(tmp_path, str(tmp_path / "corpus"), validation_fraction=0.3))
    with monkeypatch.context() as patch:
        patch.setattr(tokenized_splits, "open", full, raising=False)
        with pytest.raises(
            InputError, match=rf"cache_dir: {cfg.cache_dir}: no space left; nothing was kept"
        ):
            data.corpora(cfg)
    folders = [f for f in Path(cfg.cache_dir).iterdir() if f.is_dir()]
    assert folders == [kept.path]
    assert corpus_of(cfg).documents == 40


def test_cache_dir_is_a_file(tmp_path):
    (tmp_path / "cache").write_text("mine")
    with pytest.raises(InputError, match=r"cache_dir: .*: cannot be written"):
        data.corpora(config(tmp_path))
    assert (tmp_path / "cache").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["meta.json", "train.tokens", "validation.ends.npy", "validation.txt"]
)
def test_damaged_cache(tmp_path, name):
    cfg = config(tmp_path)
    file = corpus_of(cfg).path / name
    right = file.read_bytes()
    file.write_bytes(right[:-3])
    with mock.patch.object(token_cache.logging, "warning") as warning:
        data.corpora(cfg)
    assert "it is built again" in str(warning.call_args)
    assert file.read_bytes() == right


# Crashes and races. Processes start as forks would not: JAX has threads.


def tokenize_and_die(cfg: DataConfig) -> None:
    """Dies at once, without any clean-up, with all data written and the rename not done."""
    os.rename = lambda *_: os._exit(9)
    data.corpora(cfg)


def no_locks(*_):
    """flock on a file system that has no locks."""
    raise OSError(errno.ENOLCK, "No locks available")


def tokenize_when_told(cfg: DataConfig, barrier, results) -> None:
    token_cache.fcntl.flock = no_locks  # so that both build, and race for the rename
    finish = token_cache._sync
    token_cache._sync = lambda folder: (finish(folder), barrier.wait(60))
    results.put(corpus_of(cfg).sha256)


def test_half_written_cache_is_never_used(tmp_path):
    cfg = config(tmp_path)
    process = multiprocessing.get_context("spawn").Process(target=tokenize_and_die, args=(cfg,))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    cache = Path(cfg.cache_dir)
    (leftover,) = (f for f in cache.iterdir() if f.is_dir())
    assert "partial" in leftover.name and (leftover / "meta.json").exists()
    (leftover / "train.tokens").write_bytes(b"wrong")
    corpus = corpus_of(cfg)
    assert sorted(documents_of(corpus, "train") + documents_of(corpus, "validation")) == sorted(
        TEXTS
    )
    assert [f for f in cache.iterdir() if f.is_dir()] == [corpus.path]


def test_two_writers_at_once(tmp_path):
    cfg = config(tmp_path)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=tokenize_when_told, args=(cfg, barrier, results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    digests = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    corpus = corpus_of(cfg)
    assert digests == [corpus.sha256] * 2
    assert [f for f in Path(cfg.cache_dir).iterdir() if f.is_dir()] == [corpus.path]


def test_processes_of_one_machine_tokenize_once(tmp_path, monkeypatch):
    cfg, builds = config(tmp_path), []
    build = token_cache._build

    def counted(folder, *rest):
        builds.append(folder)
        build(folder, *rest)

    monkeypatch.setattr(token_cache, "_build", counted)
    with ThreadPoolExecutor(4) as pool:
        digests = {c.sha256 for c in pool.map(corpus_of, [cfg] * 4)}
    assert len(digests) == len(builds) == 1


@pytest.mark.parametrize("has_locks", [True, False])
def test_leftovers_go_only_where_no_writer_can_be_at_work(tmp_path, monkeypatch, has_locks):
    cfg = config(tmp_path)
    made = corpus_of(cfg).path
    leftover = token_cache._partial_prefix(made).with_name(
        token_cache._partial_prefix(made).name + "0123"
    )
    made.rename(leftover)
    if not has_locks:
        monkeypatch.setattr(token_cache.fcntl, "flock", no_locks)
    assert corpus_of(cfg).path == made and leftover.exists() != has_locks


def test_a_file_that_holds_less_than_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.JsonLines, "__len__", lambda self: len(self._starts) + 1)
    monkeypatch.setattr(
        sources.JsonLines, "__iter__", lambda self: (self[i] for i in range(len(self._starts)))
    )
    cfg = config(tmp_path, write_jsonl(tmp_path / "corpus"), "jsonl")
    expect_input_error(cfg, r"a.jsonl: 40 documents could be read, expected 41")


# Windows


def slow_windows(documents: list[list[int]], seq_len: int) -> list[list[tuple]]:
    """Token by token: windows of (token, target, segment, position, weight), straight from the
    documents.
    """
    end = documents[0][-1]
    pairs = [
        (token, target, place == 0)
        for document in documents
        for place, (token, target) in enumerate(zip([end, *document], document))
    ]
    windows = []
    for start in range(0, len(pairs), seq_len):
        window, segment, position = [], 0, 0
        for t in range(start, start + seq_len):
            if t >= len(pairs):
                window.append((0, 0, 0, 0, 0.0))
                continue
            token, target, is_first = pairs[t]
            is_new = t == start or is_first
            segment, position = (segment + 1, 0) if is_new else (segment, position + 1)
            window.append((token, target, segment, position, 1.0))
        windows.append(window)
    return windows


def test_window_by_hand():
    # Documents (1 2 3 |) (4 |) (5 6 7 |), "|" = 9 ends each, and stands before each.
    stream, ends = np.array([1, 2, 3, 9, 4, 9, 5, 6, 7, 9], np.uint16), np.array([4, 6, 10])
    first, second, third = (cut_window(stream, ends, i, 4) for i in range(3))
    np.testing.assert_array_equal(first.tokens, [9, 1, 2, 3])
    np.testing.assert_array_equal(first.targets, [1, 2, 3, 9])
    np.testing.assert_array_equal(first.segment_ids, [1, 1, 1, 1])
    np.testing.assert_array_equal(first.positions, [0, 1, 2, 3])
    np.testing.assert_array_equal(second.tokens, [9, 4, 9, 5])
    np.testing.assert_array_equal(second.targets, [4, 9, 5, 6])
    np.testing.assert_array_equal(second.segment_ids, [1, 1, 2, 2])
    np.testing.assert_array_equal(second.positions, [0, 1, 0, 1])
    np.testing.assert_array_equal(second.loss_mask, [1, 1, 1, 1])
    # Begins in the middle of a document, and ends with the stream.
    np.testing.assert_array_equal(third.tokens, [6, 7, 0, 0])
    np.testing.assert_array_equal(third.targets, [7, 9, 0, 0])
    np.testing.assert_array_equal(third.segment_ids, [1, 1, 0, 0])
    np.testing.assert_array_equal(third.positions, [0, 1, 0, 0])
    np.testing.assert_array_equal(third.loss_mask, [1, 1, 0, 0])


@given(
    st.lists(st.lists(st.integers(0, 300), max_size=9), min_size=1, max_size=8), st.integers(1, 12)
)
def test_windows_match_the_slow_reference(documents, seq_len):
    documents = [[*document, 257] for document in documents]
    stream = np.array([token for document in documents for token in document], np.uint16)
    ends = np.cumsum([len(document) for document in documents])
    expected = slow_windows(documents, seq_len)
    assert num_windows(len(stream), seq_len) == len(expected)
    if not expected:
        return
    actual = stack_rows([cut_window(stream, ends, i, seq_len) for i in range(len(expected))])
    for name, column in zip(
        data.Batch.__dataclass_fields__, np.moveaxis(np.array(expected), -1, 0)
    ):
        np.testing.assert_array_equal(getattr(actual, name), column, err_msg=name)
    # Every token is predicted once.
    assert actual.loss_mask.sum() == len(stream)
    np.testing.assert_array_equal(actual.targets[actual.loss_mask == 1], stream)


# The stream of global batches


def stream(
    cfg, split="train", processes=1, batch_size=8, count=12, start=0, seed=0, **how
) -> list[data.Batch]:
    """Global batches, put together from the rows that each of `processes` reads."""
    rows_each = batch_size // processes
    rows = [range(p * rows_each, (p + 1) * rows_each) for p in range(processes)]
    datasets = [
        data.make_dataset(cfg, split, batch_size=batch_size, rows=r, seed=seed) for r in rows
    ]
    first_row = start * batch_size
    readers = [
        itertools.islice(data.batches(dataset, first_row, **how), count) for dataset in datasets
    ]
    return [jax.tree.map(lambda *parts: np.concatenate(parts), *parts) for parts in zip(*readers)]


def test_batch_is_a_pytree_of_the_promised_types(tmp_path):
    (batch,) = stream(config(tmp_path), count=1)
    chex.assert_shape(jax.tree.leaves(batch), (8, 16))
    assert [leaf.dtype.name for leaf in jax.tree.leaves(batch)] == ["int32"] * 4 + ["float32"]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_global_batches_are_the_same_for_any_number_of_processes_and_threads(tmp_path, split):
    cfg = config(tmp_path, validation_fraction=0.3)
    expected = stream(cfg, split, num_threads=0)
    assert len(expected) == (12 if split == "train" else 6)
    for processes, num_threads in ((1, 3), (2, 0), (4, 1), (8, 2)):
        chex.assert_trees_all_equal(
            stream(cfg, split, processes, num_threads=num_threads), expected
        )


def test_rows_may_be_uneven_and_scattered(tmp_path):
    cfg = config(tmp_path)
    (whole,) = stream(cfg, count=1)
    rows = (0, 1, 4), (2, 3, 5, 6, 7)
    parts = [data.make_dataset(cfg, "train", batch_size=8, rows=r, seed=0)[0] for r in rows]
    for r, part in zip(rows, parts):
        chex.assert_trees_all_equal(part, jax.tree.map(lambda x, r=r: x[list(r)], whole))


@pytest.mark.parametrize("num_threads", [0, 2])
def test_resume_from_one_number(tmp_path, num_threads):
    cfg = config(tmp_path)
    dataset = data.make_dataset(cfg, "train", batch_size=8, rows=range(8), seed=0)
    straight = data.batches(dataset, num_threads=num_threads)
    before = list(itertools.islice(straight, 7))
    assert straight.next_index == 7 * 8
    after = list(itertools.islice(straight, 7))
    again = data.batches(dataset, straight.next_index - 7 * 8, num_threads=num_threads)
    chex.assert_trees_all_equal(list(itertools.islice(again, 7)), after)
    assert again.next_index == straight.next_index == 14 * 8
    chex.assert_trees_all_equal(dataset[3], before[3])


def rows_of(batches: list[data.Batch]) -> list[tuple]:
    """Each real row as a hashable value."""
    return [
        tuple(row)
        for b in batches
        for row, mask in zip(b.tokens.tolist(), b.segment_ids)
        if mask.any()
    ]


def test_each_epoch_has_every_window_in_a_new_order(tmp_path):
    cfg = config(tmp_path)
    tokens, ends = corpus_of(cfg).stream("train")
    windows = [
        tuple(cut_window(tokens, ends, i, 16).tokens.tolist())
        for i in range(num_windows(len(tokens), 16))
    ]
    rows = rows_of(stream(cfg, batch_size=1, count=2 * len(windows)))
    epochs = rows[: len(windows)], rows[len(windows) :]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(windows)
    assert epochs[0] != epochs[1] and epochs[0] != windows
    other_seed = rows_of(stream(cfg, batch_size=1, count=len(windows), seed=1))
    assert sorted(other_seed) == sorted(windows) and other_seed not in epochs


def test_validation_is_finite_and_drops_nothing(tmp_path):
    cfg = config(tmp_path, validation_fraction=0.3)
    info = corpus_of(cfg).splits["validation"]
    count = -(-num_windows(info.tokens, 16) // 8)
    batches = stream(cfg, "validation", processes=2, count=count + 5)
    assert (
        len(batches)
        == count
        == len(data.make_dataset(cfg, "validation", batch_size=8, rows=range(2), seed=0))
    )
    assert sum(b.loss_mask.sum() for b in batches) == info.tokens
    tokens, ends = corpus_of(cfg).stream("validation")
    windows = [
        tuple(cut_window(tokens, ends, i, 16).tokens.tolist())
        for i in range(num_windows(len(tokens), 16))
    ]
    assert sorted(rows_of(batches)) == sorted(windows)
    assert len(windows) % 8 != 0, "the last batch must need padding for this test to mean anything"
    chex.assert_trees_all_equal(stream(cfg, "validation", count=count, seed=5), batches)


def test_mixture_follows_the_weights(tmp_path):
    paths = {letter: write_text(tmp_path / letter, [letter * 50] * 9) for letter in "abc"}
    weights = {"c": 0.5, "a": 3.0, "b": 1.5}
    mixed = {n: SourceConfig(kind="text", path=paths[n], weight=w) for n, w in weights.items()}
    cfg = config(tmp_path, paths["a"], sources=mixed)
    batches = stream(cfg, batch_size=10, count=40)
    letters = [next(chr(t) for t in row if t < 256) for row in rows_of(batches)]
    assert {n: letters.count(n) for n in "abc"} == {"a": 240, "b": 120, "c": 40}
    assert 3 <= letters[:20].count("b") <= 9, "interleaved, not one after another"
    # By name, not by the order of the configuration; and for any number of processes.
    sorted_cfg = config(tmp_path, paths["a"], sources=dict(sorted(mixed.items())))
    chex.assert_trees_all_equal(stream(sorted_cfg, batch_size=10, count=40, processes=5), batches)
    validation = stream(cfg, "validation", batch_size=10, count=1000)
    splits = [c.splits["validation"] for c in data.corpora(cfg).values()]
    targets = sum(split.tokens for split in splits)
    ends = sum(split.documents for split in splits)
    assert sum(b.loss_mask.sum() for b in validation) == targets
    assert targets == len(data.validation_text(cfg)) + ends


def test_sources_shuffle_apart(tmp_path):
    texts = [f"{i:02} of some text\n" * 5 for i in range(30)]
    paths = [write_text(tmp_path / name, texts) for name in "ab"]
    orders = [
        rows_of(stream(config(tmp_path, p, sources={n: SourceConfig(kind="text", path=p)})))
        for n, p in zip("ab", paths)
    ]
    assert orders[0] != orders[1]


def test_a_corpus_of_less_than_one_window(tmp_path):
    cfg = config(tmp_path, write_text(tmp_path / "tiny", ["ab", "cd"]), seq_len=64)
    (batch,) = stream(cfg, count=1, batch_size=2)
    assert batch.loss_mask.sum() == 2 * 3 and batch.segment_ids[0].tolist() == [1, 1, 1] + [0] * 61


def test_a_cache_that_vanishes_or_shrinks_under_a_run(tmp_path):
    """Deleted files stay readable while they are open; a cut one ends the run with a line, not with
    a bus error.
    """
    cfg = config(tmp_path)
    corpus = corpus_of(cfg)
    dataset = data.make_dataset(cfg, "train", batch_size=8, rows=range(8), seed=0)
    before = dataset[0]
    path = corpus.path / "train.tokens"
    kept = path.read_bytes()
    path.unlink()
    chex.assert_trees_all_equal(dataset[0], before)
    path.write_bytes(kept)
    dataset = data.make_dataset(cfg, "train", batch_size=8, rows=range(8), seed=0)
    os.truncate(path, 20)
    with pytest.raises(TrainingError, match=r"train\.tokens: .* could be read, expected"):
        for batch in itertools.islice(data.batches(dataset), 20):
            assert batch.tokens.shape == (8, 16)


@pytest.mark.parametrize(
    "rows", [range(8, 10), range(0, 9), range(0), (3, 2), (1, 1), range(-1, 3)]
)
def test_rows_outside_the_batch(tmp_path, rows):
    with pytest.raises(
        ValueError, match=r"rows: got .*, expected ascending rows within a batch_size of 8"
    ):
        data.make_dataset(config(tmp_path), "train", batch_size=8, rows=rows, seed=0)


def test_unknown_split_and_start(tmp_path):
    with pytest.raises(ValueError, match=r"split: got 'test'"):
        data.make_dataset(config(tmp_path), "test", batch_size=8, rows=range(8), seed=0)
    dataset = data.make_dataset(config(tmp_path), "train", batch_size=8, rows=range(8), seed=0)
    with pytest.raises(ValueError, match=r"start: got -1"):
        data.batches(dataset, -1)
