"""Text, tokenizers and caches that are something else than they should be; what is held out."""

import itertools
import json
import os
import shutil

import numpy as np
import pytest
from tokenizer_file import train_json_tokenizer

from gatedjax import data
from gatedjax.config import DataConfig, FrozenDict, SourceConfig
from gatedjax.data import formats, token_cache, whole_cache
from gatedjax.errors import InputError, printable
from gatedjax.files import open_plain, read_plain
from gatedjax.paths import expand


def write_texts(folder, texts):
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_text(text)
    return folder


def config(tmp_path, fraction=0.2, kind="text", **paths):
    sources = {name: SourceConfig(kind=kind, path=str(path)) for name, path in paths.items()}
    return DataConfig(
        sources=FrozenDict(sources),
        seq_len=16,
        cache_dir=str(tmp_path / "cache"),
        validation_fraction=fraction,
    )


def documents(cfg):
    """By split, the set of all documents of all sources, as token strings."""
    found = {"train": set(), "validation": set()}
    for corpus in data.corpora(cfg).values():
        for split, texts in found.items():
            tokens, ends = corpus.stream(split)
            for start, end in itertools.pairwise((0, *ends)):
                texts.add(tokens[int(start) : int(end)].tobytes())
    return found


def refusal(cfg) -> str:
    with pytest.raises(InputError) as error:
        data.corpora(cfg)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- which side a document is on


def texts(count):
    return [f"document number {i} " * 3 for i in range(count)]


def test_a_source_in_a_source_and_the_same_text_as_another_kind(tmp_path):
    outer = write_texts(tmp_path / "all", texts(100))
    inner = write_texts(tmp_path / "all" / "inner", texts(160)[80:])
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(50)))
    cfg = config(tmp_path, outer=outer, inner=inner)
    sources = {**cfg.sources, "lines": SourceConfig(kind="jsonl", path=str(lines))}
    cfg = DataConfig(sources=sources, cache_dir=cfg.cache_dir, validation_fraction=0.2)
    found = documents(cfg)
    assert not found["train"] & found["validation"]
    assert len(found["train"] | found["validation"]) == 160
    assert 15 < len(found["validation"]) < 55


def test_a_document_that_stands_twice_in_one_source(tmp_path):
    folder = write_texts(tmp_path / "a", texts(40) * 3)
    found = documents(config(tmp_path, a=folder))
    assert not found["train"] & found["validation"]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_small_sources_have_two_sides_and_agree_with_each_other(tmp_path, count):
    folder = write_texts(tmp_path / "a", texts(count) * 2)
    copy = write_texts(tmp_path / "b", texts(count))
    found = documents(config(tmp_path, 0.05, a=folder, b=copy))
    assert found["train"] and found["validation"]
    assert not found["train"] & found["validation"]


@pytest.mark.parametrize("few", [1, 3])
def test_small_sources_that_contradict_a_large_one_are_refused(tmp_path, few):
    # With this fraction the small source's document has to change sides.
    small = write_texts(tmp_path / "small", texts(few))
    large = write_texts(tmp_path / "large", texts(200))
    message = refusal(config(tmp_path, 0.004, small=small, large=large))
    assert "sources.small" in message and "sources.large" in message


# --- the position


@pytest.mark.parametrize("processes", [1, 2])
def test_another_batch_size_goes_on_at_the_next_row(tmp_path, processes):
    cfg = config(tmp_path, main=write_texts(tmp_path / "a", texts(60)))

    def rows(batch_size, start, count):
        per = batch_size // processes
        parts = []
        for process in range(processes):
            mine = range(process * per, (process + 1) * per)
            dataset = data.make_dataset(cfg, "train", batch_size=batch_size, rows=mine, seed=0)
            parts.append(data.batches(dataset, start))
        found = []
        for _ in range(count // batch_size):
            for part in parts:
                batch = next(part)
                found.extend(
                    (b.tobytes(), t.tobytes()) for b, t in zip(batch.tokens, batch.targets)
                )
        return found, parts[0].next_index

    order, end = rows(2, 0, 240)
    assert end == 240
    first, next_row = rows(4, 0, 40)
    assert first == order[:40] and next_row == 40
    for batch_size, count in ((8, 64), (2, 20), (6, 60)):
        again, end = rows(batch_size, next_row, count)
        assert again == order[40 : 40 + count] and end == 40 + count


def test_validation_ends_with_padding_wherever_it_begins(tmp_path):
    cfg = config(tmp_path, main=write_texts(tmp_path / "a", texts(60)))
    dataset = data.make_dataset(cfg, "validation", batch_size=4, rows=range(4), seed=0)
    whole = list(data.batches(dataset))
    masks = [batch.loss_mask.sum() for batch in data.batches(dataset, 6)]
    assert sum(masks) == sum(b.loss_mask.sum() for b in whole) - sum(
        row.sum() for row in np.concatenate([b.loss_mask for b in whole])[:6]
    )
    assert len(dataset[:2]) == 2 and len(list(data.batches(dataset[1:]))) == len(whole) - 1


# --- files that are none


def test_pipes_devices_and_broken_links_in_a_folder_of_text(tmp_path):
    folder = write_texts(tmp_path / "a", texts(5))
    os.mkfifo(folder / "x.txt")
    assert "x.txt: is a pipe" in refusal(config(tmp_path, a=folder))
    (folder / "x.txt").unlink()
    (folder / "x.txt").symlink_to(tmp_path / "nowhere")
    assert "cannot be read" in refusal(config(tmp_path, a=folder))
    (folder / "x.txt").unlink()
    (folder / "x.txt").symlink_to("/dev/zero")
    assert "is a device" in refusal(config(tmp_path, a=folder))
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe" in refusal(config(tmp_path, a=tmp_path / "pipe"))
    assert "is a device" in refusal(config(tmp_path, a="/dev/zero"))
    (folder / "x.txt").unlink()
    (folder / "x.txt").symlink_to(folder / "000.txt")
    assert data.corpora(config(tmp_path, a=folder))["a"].documents == 6


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    folder = write_texts(tmp_path / "a", texts(5))
    (folder / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "Permission denied" in refusal(config(tmp_path, a=folder))


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_files_without_contents_are_refused_unread(tmp_path, kind):
    folder = write_texts(tmp_path / "a", texts(3))
    large = folder / "large.jsonl"
    for size in (1 << 40, 1 << 24):
        with open(large, "wb") as file:
            file.write(b'{"text": "a"}\n')
            file.truncate(size)
        target = folder if kind == "text" else large
        assert "large.jsonl: cannot be read" in refusal(config(tmp_path, kind=kind, a=target))


def test_paths_that_lead_nowhere_are_one_line(tmp_path, monkeypatch):
    assert "~" in refusal(config(tmp_path, a="~nouser/x"))
    assert "cannot be used" in refusal(config(tmp_path, a="/x" * 2500))
    assert "zero bytes" in refusal(config(tmp_path, a="/a\0b"))
    assert "expected a path, gs://BUCKET/PATH or" in refusal(config(tmp_path, a="az://a/b"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/a", "x") == tmp_path / "a"
    write_texts(tmp_path / "at home", texts(5))
    assert data.corpora(config(tmp_path, a="~/at home"))["a"].documents == 5
    for name in ("", "s3://x"):
        with pytest.raises(InputError, match=r"--workdir: got"):
            expand(name, "--workdir")


def test_a_saved_dataset_that_names_files_elsewhere(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": texts(20)}).save_to_disk(str(tmp_path / "other"))
    shutil.copytree(tmp_path / "other", tmp_path / "saved")
    path = tmp_path / "saved" / "state.json"
    state = json.loads(path.read_text())
    (name,) = [entry["filename"] for entry in state["_data_files"]]
    for bad in (f"../other/{name}", str(tmp_path / "other" / name), "..", 3, None):
        state["_data_files"] = [{"filename": bad}]
        path.write_text(json.dumps(state))
        message = refusal(config(tmp_path, kind="hf_disk", a=tmp_path / "saved"))
        assert "state.json: names the file" in message
    for bad in ([], {"_data_files": 3}, {"_data_files": [3]}):
        path.write_text(json.dumps(bad))
        assert "cannot be read" in refusal(config(tmp_path, kind="hf_disk", a=tmp_path / "saved"))


@pytest.mark.parametrize("target", ["pipe", "/dev/zero", "folder", "large", "~nouser/x"])
def test_a_tokenizer_that_is_no_file(tmp_path, target):
    pytest.importorskip("tokenizers")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 40)
    path = target if target[0] in "/~" else str(tmp_path / target)
    with pytest.raises(InputError, match="tokenizer: ") as error:
        data.load_tokenizer(path)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_makes_ids_outside_its_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr(data.ByteTokenizer, "vocab_size", 100)
    folder = write_texts(tmp_path / "a", texts(5))
    assert "outside its 100 entries" in refusal(config(tmp_path, a=folder))


# --- the token cache


def flip(content):
    return bytes([content[0] ^ 1]) + content[1:]


def zeros(content):
    return bytes(len(content))


def all_ones(content):
    return b"\xff" * len(content)


def swapped_blocks(content):
    half = len(content) // 4 * 2
    return content[half:] + content[:half]


FILES = (
    "train.tokens",
    "validation.tokens",
    "train.ends.npy",
    "validation.txt",
    "documents.npy",
    "meta.json",
)


@pytest.mark.parametrize("change", [flip, zeros, all_ones, swapped_blocks])
def test_a_damaged_cache_is_built_again(tmp_path, monkeypatch, change):
    warnings = []
    monkeypatch.setattr(token_cache.logging, "warning", lambda *args: warnings.append(args))
    cfg = config(tmp_path, a=write_texts(tmp_path / "a", texts(30)))
    folder = data.corpora(cfg)["a"].path
    right = {name: (folder / name).read_bytes() for name in FILES}
    for i, name in enumerate(FILES, start=1):
        (folder / name).write_bytes(change(right[name]))
        data.corpora(cfg)
        assert len(warnings) == i and "built again" in str(warnings[-1])
        assert (folder / "train.tokens").read_bytes() == right["train.tokens"]
    assert [p.name for p in folder.parent.iterdir() if p.is_dir()] == [folder.name]


def test_pipes_and_links_in_a_cache(tmp_path):
    cfg = config(tmp_path, a=write_texts(tmp_path / "a", texts(30)))
    folder = data.corpora(cfg)["a"].path
    for name in FILES:
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert data.corpora(cfg)["a"].documents == 30
        assert (folder / name).is_file()


def test_ends_out_of_order_and_ids_beyond_are_seen_even_with_their_checksums(tmp_path):
    cfg = config(tmp_path, a=write_texts(tmp_path / "a", texts(30)))
    corpus = data.corpora(cfg)["a"]
    ends = np.load(corpus.path / "train.ends.npy")
    ends[[0, 1]] = ends[[1, 0]]
    np.save(corpus.path / "train.ends.npy", ends)
    name = "train.ends.npy"
    checksums = {name: whole_cache.checksum_of(corpus.path / name)}
    with pytest.raises(ValueError, match="in order"):
        whole_cache.require_whole(corpus, checksums)


def test_a_cache_is_verified_once_per_process(tmp_path, monkeypatch):
    cfg = config(tmp_path, a=write_texts(tmp_path / "a", texts(30)))
    data.corpora(cfg)
    monkeypatch.setattr(whole_cache, "checksum_of", lambda _: pytest.fail("read again"))
    data.corpora(cfg)


def test_everything_reaches_the_disk_before_the_name_does(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename

    def synced(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2])
        fsync(descriptor)

    def renamed(source, target):
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    data.corpora(config(tmp_path, a=write_texts(tmp_path / "a", texts(30))))
    before = events[: events.index("rename")]
    assert set(FILES) <= set(before) and events[-1] == "cache"


# --- one place each


def test_files_are_opened_only_if_they_are_files(tmp_path):
    plain = tmp_path / "plain"
    plain.write_bytes(b"12345")
    assert read_plain(plain, 5) == b"12345"
    with pytest.raises(OSError, match="has 5 bytes"):
        read_plain(plain, 4)
    (tmp_path / "link").symlink_to(plain)
    assert read_plain(tmp_path / "link", 5) == b"12345"
    with pytest.raises(OSError, match="is a link"):
        open_plain(tmp_path / "link", follow_links=False)
    with pytest.raises(OSError, match="is a folder"):
        open_plain(tmp_path)


@pytest.mark.parametrize("bad", ["\x1b[2J", "\x9b2J", "\x07", "\r", "\u202e", "\ud800", "\x7f"])
def test_what_a_terminal_acts_on_is_written_out(bad):
    shown = printable(f"a{bad}b")
    assert bad not in shown and shown.isprintable() and shown.isascii()
    assert printable("line\n\ttabs, wörds 語 🙂") == "line\n\ttabs, wörds 語 🙂"


def test_a_document_too_large_to_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LARGEST_DOCUMENT", 30)
    folder = write_texts(tmp_path / "a", ["short", "much longer than thirty bytes, it is"])
    assert "001.txt: cannot be read (has 36 bytes" in refusal(config(tmp_path, a=folder))


def test_the_tokenizer_keeps_its_file(tmp_path):
    path = train_json_tokenizer(tmp_path / "t.json")
    assert data.load_tokenizer(path).data == (tmp_path / "t.json").read_bytes()
