"""Images from files, tables and generators, as rows of patches; masked tokens."""

import dataclasses
import importlib.util
import io

import numpy as np
import pytest

from gatedjax.config import (
    DataConfig,
    FrozenDict,
    GatedAttentionConfig,
    GatedMLPConfig,
    ImageConfig,
    MaskingConfig,
    ModelConfig,
    PatchConfig,
    SourceConfig,
)
from gatedjax.data import batches, image_corpora, load_tokenizer, make_dataset, mnist1d
from gatedjax.data.batch import Batch
from gatedjax.data.image_rows import augmented, patches_of, random_crop, row_of_image
from gatedjax.data.images import Example, open_images
from gatedjax.data.masking import MaskTokens, mask_id
from gatedjax.errors import InputError

Image = pytest.importorskip("PIL.Image")
RNG = np.random.default_rng(0)
PATCHES = PatchConfig(height=4, width=6)
MODEL = ModelConfig(
    task="classify",
    patches=PATCHES,
    vocab_size=3,
    mixers=FrozenDict(attention=GatedAttentionConfig(causal=False)),
    ffns=FrozenDict(mlp=GatedMLPConfig()),
)


def picture(height=4, width=6, seed=0):
    pixels = np.random.default_rng(seed).integers(256, size=(height, width), dtype=np.uint8)
    return Image.fromarray(pixels)


def folder(root, of_class=12, classes=("cat", "dog", "eel")):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(of_class):
            picture(seed=100 * number + i).save(root / name / f"{i}.png")
    return root


def data_of(path, kind="images", **values) -> DataConfig:
    source = SourceConfig(kind=kind, path=str(path), field="image")
    sources = FrozenDict(main=source)
    return DataConfig(sources=sources, seq_len=7, validation_fraction=0.3, **values)


def dataset(data, split, model=MODEL, batch_size=4):
    return make_dataset(
        data,
        split,
        batch_size=batch_size,
        rows=range(batch_size),
        seed=0,
        model=model,
    )


def test_every_image_of_a_folder_is_in_one_split_with_its_class(tmp_path):
    data = data_of(folder(tmp_path), images=ImageConfig(mean=(0.0,), std=(1.0,)))
    expected = {}
    for number in range(3):
        for i in range(12):
            pixels = np.asarray(picture(seed=100 * number + i), np.float32)[..., None] / 255
            expected[patches_of(pixels, PATCHES).tobytes()] = number
    found = {}
    padding = 0
    for batch in batches(dataset(data, "validation"), num_threads=0):
        for row in range(4):
            if not batch.loss_mask[row].any():
                padding += 1
                assert not batch.segment_ids[row].any()
                continue
            assert batch.loss_mask[row].tolist() == [1, 0, 0, 0, 0, 0, 0]
            assert not batch.patches[row, 0].any()
            found[batch.patches[row, 1:].tobytes()] = int(batch.targets[row, 0])
    assert padding < 4
    train = dataset(data, "train")
    # An endless order: two passes over what is left.
    rows = [train[i] for i in range(20)]
    seen = {patches[1:].tobytes() for batch in rows for patches in batch.patches}
    assert not seen & set(found)
    assert seen | set(found) == set(expected)
    assert all(expected[key] == label for key, label in found.items())


def test_folders_of_splits_are_kept(tmp_path):
    folder(tmp_path / "train", 5)
    folder(tmp_path / "val", 2)
    (corpus,) = image_corpora(data_of(tmp_path)).values()
    assert corpus.classes == ("cat", "dog", "eel")
    assert corpus.is_validation.sum() == 6
    assert "train 15 images, validation 6" in corpus.describe()


def test_a_table_of_images_equals_its_folder(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    files = []
    labels = []
    for i in range(20):
        encoded = io.BytesIO()
        picture(seed=i).save(encoded, "png")
        files.append({"bytes": encoded.getvalue(), "path": None})
        labels.append(9 + i % 2)
    table = arrow.table({"image": files, "label": labels})
    parquet.write_table(table, tmp_path / "images.parquet")
    (corpus,) = image_corpora(data_of(tmp_path, "image_parquet")).values()
    # Numbers in their order, not in that of words.
    assert corpus.classes == ("9", "10")
    pixels = corpus.images.read(3, 1, None)
    np.testing.assert_allclose(pixels[..., 0], np.asarray(picture(seed=3)) / np.float32(255))
    assert corpus.labels[3] == 1
    data = data_of(tmp_path, "image_parquet")
    wrong = dataclasses.replace(data.sources["main"], label="class")
    with pytest.raises(InputError, match="class"):
        open_images("main", wrong, 0.3)


def broken(path):
    (path / "cat" / "0.png").write_bytes(b"no image")


def cut_short(path):
    file = path / "cat" / "0.png"
    file.write_bytes(file.read_bytes()[:-40])


def another_size(path):
    picture(5, 6).save(path / "dog" / "x.png")


def without_class(path):
    picture().save(path / "x.png")


@pytest.mark.parametrize(
    "change, message",
    [
        (broken, r"cat/0.png: cannot be read as an image \(none of the formats"),
        (cut_short, r"cat/0.png: cannot be read as an image \("),
        (another_size, r"dog/x.png has 5 x 6 pixels, expected 4 x 6 \(model.patches\)"),
        (without_class, r"x.png: lies in no folder of sources.main.path, expected its class"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_bad_folder_is_named_in_one_line(tmp_path, change, message):
    change(folder(tmp_path, 6))
    with pytest.raises(InputError, match=message) as caught:
        for split in ("train", "validation"):
            found = dataset(data_of(tmp_path), split)
            for i in range(8 if split == "train" else len(found)):
                found[i]
    assert "\n" not in str(caught.value)


def test_one_class_is_none(tmp_path):
    with pytest.raises(InputError, match=r"sources.main: got classes 'cat', expected at least two"):
        image_corpora(data_of(folder(tmp_path, 4, ("cat",))))
    with pytest.raises(
        InputError, match=r"path: got 'gs://a/b', expected a folder or file on this"
    ):
        image_corpora(data_of("gs://a/b"))


def test_more_classes_than_the_model_has_are_refused(tmp_path):
    model = dataclasses.replace(MODEL, vocab_size=2)
    with pytest.raises(InputError, match=r"vocab_size: got 2, expected at least the 3 classes"):
        dataset(data_of(folder(tmp_path, 4)), "train", model)


def test_images_are_made_to_fit(tmp_path):
    picture(8, 24).save(tmp_path / "x.png")
    pixels = np.zeros((8, 24), np.uint8)
    pixels[:, 6:18] = 255
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "x.png")
    (tmp_path / "b").mkdir()
    for i in range(8):
        picture(8, 12, seed=i).save(tmp_path / "b" / f"{i}.png")
    (tmp_path / "x.png").unlink()
    corpus = open_images("main", data_of(tmp_path).sources["main"], 0.5)
    fitted = corpus.images.read(0, 3, (4, 6))
    assert fitted.shape == (4, 6, 3)
    np.testing.assert_allclose(fitted[:, 1:-1], 1.0, atol=1e-6)


def test_patches_follow_their_places():
    pixels = RNG.normal(size=(4, 6, 2)).astype(np.float32)
    config = dataclasses.replace(PATCHES, channels=2, patch_height=2, patch_width=3)
    cut = patches_of(pixels, config)
    assert cut.shape == (4, 12)
    for t, i, j, c in np.ndindex(4, 2, 3, 2):
        row, column = divmod(t, 2)
        assert cut[t, (i * 3 + j) * 2 + c] == pixels[2 * row + i, 3 * column + j, c]
    images = ImageConfig(mean=(1.0, 2.0), std=(2.0, 4.0))
    row = row_of_image(Example(pixels, 1), config, images)
    np.testing.assert_allclose(row.patches[1:], patches_of((pixels - [1, 2]) / [2, 4], config))
    assert row.patches.dtype == np.float32 and row.targets[0] == 1


def test_augmentation_moves_and_mirrors_and_nothing_else():
    pixels = np.arange(1, 13, dtype=np.float32).reshape(3, 4, 1)
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)))
    pieces = {
        padded[y : y + 3, x : x + 4, ::].tobytes(): (y, x) for y in range(3) for x in range(3)
    }
    seen = set()
    rng = np.random.default_rng(1)
    for _ in range(100):
        seen.add(pieces[random_crop(pixels, rng, 1).tobytes()])
    assert len(seen) == 9
    flips = [augmented(Example(pixels, 0), rng, ImageConfig(flip=True)).pixels for _ in range(50)]
    mirrored = [np.array_equal(pixels[:, ::-1], flip) for flip in flips]
    assert 10 < sum(mirrored) < 40
    for flip, is_mirrored in zip(flips, mirrored):
        assert is_mirrored or np.array_equal(pixels, flip)
    # A signal has nothing above it.
    assert random_crop(pixels[:1], rng, 2).shape == (1, 4, 1)


def test_rows_are_changed_anew_in_each_epoch_and_the_same_in_each_run(tmp_path):
    data = data_of(folder(tmp_path, 4), images=ImageConfig(crop_padding=2))
    first, again = dataset(data, "train"), dataset(data, "train")
    epochs = [first[i].patches for i in range(12)]
    np.testing.assert_array_equal(epochs, [again[i].patches for i in range(12)])
    assert len({patches.tobytes() for batch in epochs for patches in batch}) > 20


def test_mnist1d_equals_its_package():
    found = mnist1d.make_signals(100)
    assert found.signals.shape == (100, 40)
    assert abs(found.signals.mean()) < 1e-12 and abs(found.signals.std() - 1) < 1e-12
    assert np.bincount(found.digits).tolist() == [10] * 10
    # Seen in the package at the same number of samples, seed 42.
    np.testing.assert_array_equal(found.digits[:8], [3, 0, 4, 1, 4, 6, 6, 7])
    first = [0.8041977727337886, 0.078147026163281, 2.2936238495666212, 2.321084649405448]
    np.testing.assert_allclose(found.signals[0, :4], first, atol=1e-9)


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="no scikit-learn")
def test_digits_come_with_scikit_learn():
    corpus = open_images("main", SourceConfig(kind="digits"), 0.2)
    assert len(corpus.labels) == 1797 and corpus.classes == tuple("0123456789")
    pixels = corpus.images.read(0, 1, None)
    assert pixels.shape == (8, 8, 1) and pixels.max() <= 1.0


def test_masked_tokens_are_those_of_bert():
    tokenizer = load_tokenizer("bytes")
    length = 20_000
    tokens = RNG.integers(97, 123, size=length).astype(np.int32)
    tokens[::100] = tokenizer.eos_id
    segment_ids = np.ones(length, np.int32)
    segment_ids[-1000:] = 0
    row = Batch(
        tokens=tokens,
        targets=np.zeros_like(tokens),
        segment_ids=segment_ids,
        positions=np.zeros_like(tokens),
        loss_mask=np.ones(length, np.float32),
    )
    masked = MaskTokens(MaskingConfig(fraction=0.2), tokenizer)(row, np.random.default_rng(2))
    is_chosen = masked.loss_mask == 1.0
    assert not is_chosen[::100].any() and not is_chosen[-1000:].any()
    assert abs(is_chosen[:-1000].mean() / (0.2 * 0.99) - 1) < 0.05
    np.testing.assert_array_equal(masked.targets, tokens)
    np.testing.assert_array_equal(masked.tokens[~is_chosen], tokens[~is_chosen])
    seen = masked.tokens[is_chosen]
    is_mask = seen == mask_id(tokenizer)
    assert abs(is_mask.mean() - 0.8) < 0.03
    # A random token is now and then the right one.
    is_kept = seen == tokens[is_chosen]
    assert abs(is_kept.mean() - 0.1) < 0.02
    assert seen[~is_mask].max() < tokenizer.vocab_size
