"""Images and their classes: what a source holds, and its rows.

Every source gives images with pixels from 0 to 1, float32 [height, width, channels]; mnist1d gives
signals, of height 1 and of mean 0. Training and validation are told apart as in `splits`, by a
hash: of the pixels or the file in a column; of an image in a folder of the path below that folder,
so that nothing is read for it. A folder with the folders train and val (or validation) has them
apart already, and mnist1d is published in two parts.
"""

import functools
import gzip
import hashlib
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Bool, Float32, Int64

from gatedjax.config import ImageConfig, PatchConfig, SourceConfig
from gatedjax.data import mnist1d
from gatedjax.data.formats import ParquetFile, one_line, optional_module
from gatedjax.data.sources import Source, open_source
from gatedjax.data.splits import Split, by_hash, content_hash
from gatedjax.errors import InputError, printable
from gatedjax.paths import is_bucket

VALIDATION_FOLDERS = ("val", "validation")
# Of scikit-learn's digits.
DIGITS_FILE = "datasets/data/digits.csv.gz"
DIGITS_SIDE = 8
LARGEST_DIGITS_PIXEL = 16.0

Pixels = Float32[np.ndarray, "height width channels"]


class Example(NamedTuple):
    """An image and the number of its class."""

    pixels: Pixels
    label: int


@runtime_checkable
class Images(Protocol):
    """The images of a source, in a fixed order.

    size: height and width of an image, without decoding it.
    name: what an error calls an image.
    read: an image with so many channels; with a size, made to have it.
    """

    def size(self, index: int) -> tuple[int, int]: ...

    def name(self, index: int) -> str: ...

    def read(self, index: int, channels: int, size: tuple[int, int] | None) -> Pixels: ...


@dataclass(frozen=True, eq=False)
class ImageCorpus:
    """A source of images.

    classes: their names; the number of a class is its place.
    labels: the number of the class of each image.
    hashes: of the contents of the splits.
    """

    name: str
    kind: str
    images: Images
    classes: tuple[str, ...]
    labels: Int64[np.ndarray, " images"]
    is_validation: Bool[np.ndarray, " images"]
    hashes: dict[str, str]

    @property
    def sha256(self) -> str:
        """Of all its images and classes."""
        return hashlib.sha256("".join(self.hashes.values()).encode()).hexdigest()

    def describe(self) -> str:
        """One line for the log."""
        held_out = int(self.is_validation.sum())
        return printable(
            f"{self.name}: {self.kind}, {len(self.classes)} classes, train "
            f"{len(self.labels) - held_out:,} images, validation {held_out:,}, "
            f"sha256 {self.sha256[:12]}"
        )

    def text_hashes(self) -> dict[str, str]:
        """What tells the images from others, by split."""
        return self.hashes

    def examples(self, split: Split, patches: PatchConfig, config: ImageConfig) -> "Examples":
        """The images of a split.

        Raises:
          InputError: an image that is none, or of another size than `patches` has.
        """
        indices = np.flatnonzero(self.is_validation == (split == "validation"))
        size = (patches.height, patches.width)
        if config.fit == "exact":
            _require_size(self, size)
            return Examples(self, indices, patches.channels, None)
        return Examples(self, indices, patches.channels, size)


class Examples(grain.MapDataset[Example]):
    """Images of a corpus, in order. Indices past the end start over."""

    def __init__(
        self,
        corpus: ImageCorpus,
        indices: Int64[np.ndarray, " images"],
        channels: int,
        size: tuple[int, int] | None,
    ):
        super().__init__()
        self._corpus = corpus
        self._indices = indices
        self._channels = channels
        self._size = size

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        image = int(self._indices[index % len(self)])
        pixels = self._corpus.images.read(image, self._channels, self._size)
        return Example(pixels, int(self._corpus.labels[image]))


@functools.lru_cache(maxsize=8)
def open_images(name: str, source: SourceConfig, validation_fraction: float) -> ImageCorpus:
    """The source of images that `source` describes; `name` is its key in the configuration.

    A command asks several times: files are listed once.

    Raises:
      InputError: what is there is no such source, or has one class only.
    """
    images, names, keys, sides = _OPENERS[source.kind](name, source)
    classes = tuple(sorted(set(names), key=_in_order))
    if len(classes) < 2:
        found = ", ".join(map(repr, classes)) or "none"
        raise InputError(f"sources.{name}: got classes {found}, expected at least two")
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[name] for name in names], np.int64)
    if sides is None:
        sides = [by_hash(content_hash(key), validation_fraction) for key in keys]
    hashes = {}
    for split in ("train", "validation"):
        digest = hashlib.sha256()
        for key, side, label in zip(keys, sides, names):
            if side == split:
                digest.update(hashlib.sha256(key).digest() + label.encode() + b"\0")
        hashes[split] = digest.hexdigest()
        if split not in sides and not (split == "train" and validation_fraction == 1):
            raise InputError(f"sources.{name}: none of its {len(sides):,} images is for {split}")
    is_validation = np.array([side == "validation" for side in sides])
    return ImageCorpus(
        name=name,
        kind=source.kind,
        images=images,
        classes=classes,
        labels=labels,
        is_validation=is_validation,
        hashes=hashes,
    )


def _in_order(name: str) -> tuple[int, str]:
    """Numbers as numbers, and before names."""
    return (int(name), "") if name.isdecimal() and len(name) < 18 else (1 << 62, name)


class Found(NamedTuple):
    """What a kind of source says of itself.

    classes: the name of each image's class.
    keys: bytes that tell an image from others.
    sides: of the images; None for a hash of the key.
    """

    images: Images
    classes: list[str]
    keys: list[bytes]
    sides: Sequence[Split] | None = None


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images that are held in memory."""

    pixels: Float32[np.ndarray, "images height width channels"]
    kind: str

    def size(self, index: int) -> tuple[int, int]:
        return self.pixels.shape[1:3]

    def name(self, index: int) -> str:
        return f"{self.kind}, image {index}"

    def read(self, index: int, channels: int, size: tuple[int, int] | None) -> Pixels:
        found = self.pixels.shape[1:]
        if size is not None and size != found[:2]:
            raise InputError(f"config.data.images.fit: got 'resize', expected 'exact': {self.kind}")
        if channels != found[2]:
            raise InputError(
                f"config.model.patches.channels: got {channels}, expected {found[2]}: {self.kind}"
            )
        return self.pixels[index]


@dataclass(frozen=True, eq=False)
class FileImages:
    """Images in files, or in the bytes of files, that Pillow decodes."""

    files: Sequence[Path | bytes]
    names: Sequence[str]

    def size(self, index: int) -> tuple[int, int]:
        with self._opened(index) as image:
            return image.height, image.width

    def name(self, index: int) -> str:
        return self.names[index]

    def read(self, index: int, channels: int, size: tuple[int, int] | None) -> Pixels:
        try:
            with self._opened(index) as image:
                image = image.convert(_MODES[channels])
                if size is not None:
                    image = _fitted(image, size)
                pixels = np.asarray(image, np.float32) / 255.0
        except InputError:
            raise
        except Exception as error:  # each decoder raises its own
            raise self._broken(index, error) from None
        return pixels.reshape(*pixels.shape[:2], channels)

    def _opened(self, index: int) -> Any:
        pillow = optional_module("PIL.Image", "images", extra="vision")
        file = self.files[index]
        try:
            return pillow.open(io.BytesIO(file) if isinstance(file, bytes) else file)
        except Exception as error:
            raise self._broken(index, error) from None

    def _broken(self, index: int, error: Exception) -> InputError:
        reason = one_line(error)
        if type(error).__name__ == "UnidentifiedImageError":
            # Pillow's own words name the file once more.
            reason = "none of the formats that Pillow knows"
        return InputError(
            printable(f"{self.names[index]}: cannot be read as an image ({reason})"),
        )


# Pillow's names for pixels of so many channels.
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def _fitted(image: Any, size: tuple[int, int]) -> Any:
    """The middle of an image whose shorter side was made to fit."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    whole = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(whole)
    left = (whole[0] - width) // 2
    top = (whole[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


@functools.lru_cache(maxsize=16)
def _require_size(corpus: ImageCorpus, size: tuple[int, int]) -> None:
    """InputError naming the first image of another size. Headers are read, not pixels."""
    for index in range(len(corpus.labels)):
        found = corpus.images.size(index)
        if found != size:
            raise InputError(
                printable(
                    f"sources.{corpus.name}: {corpus.images.name(index)} has {found[0]} x "
                    f"{found[1]} pixels, expected {size[0]} x {size[1]} (model.patches), or "
                    "data.images.fit 'resize'"
                )
            )


def _digits(name: str, source: SourceConfig) -> Found:
    """1,797 handwritten digits of 8 x 8 pixels, from the files of scikit-learn."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise InputError("kind digits needs scikit-learn: pip install 'gatedjax[vision]'")
    # The library itself is not needed: it takes a second to import.
    with gzip.open(Path(spec.origin).parent / DIGITS_FILE) as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    pixels = table[:, :-1].reshape(-1, DIGITS_SIDE, DIGITS_SIDE, 1) / LARGEST_DIGITS_PIXEL
    return _of_arrays(source.kind, pixels, table[:, -1])


def _mnist1d(name: str, source: SourceConfig) -> Found:
    """5,000 signals of 40 samples, 1,000 of them for validation, as published."""
    signals, digits = mnist1d.make_signals()
    pixels = signals.astype(np.float32)[:, None, :, None]
    sides = [_side(i < mnist1d.TRAIN_SAMPLES) for i in range(len(digits))]
    return _of_arrays(source.kind, pixels, digits)._replace(sides=sides)


def _of_arrays(
    kind: str,
    pixels: Float32[np.ndarray, "images height width channels"],
    labels: np.ndarray,
) -> Found:
    return Found(
        ArrayImages(pixels, kind),
        classes=[str(int(label)) for label in labels],
        keys=[image.tobytes() for image in pixels],
    )


def _folder(name: str, source: SourceConfig) -> Found:
    """Files of images. The class of an image is the name of the folder that it lies in."""
    opened = _opened(name, source)
    root = Path(opened.root)
    paths = [Path(file) for file in opened.files]
    parts = [path.relative_to(root).parts for path in paths]
    for path, names in zip(paths, parts):
        if len(names) < 2:
            raise InputError(
                printable(f"{path}: lies in no folder of sources.{name}.path, expected its class")
            )
    sides: Sequence[Split] | None = None
    tops = {names[0] for names in parts}
    if "train" in tops and len(tops) == 2 and not tops.isdisjoint(VALIDATION_FOLDERS):
        sides = [_side(names[0] == "train") for names in parts]
    # Not the contents, which would all be read at every start: names and sizes.
    keys = [f"{'/'.join(p)}\0{path.stat().st_size}".encode() for p, path in zip(parts, paths)]
    return Found(
        FileImages(paths, [str(path) for path in paths]),
        classes=[names[-2] for names in parts],
        keys=keys,
        sides=sides,
    )


def _opened(name: str, source: SourceConfig) -> Source:
    """The files of a source on this machine."""
    if is_bucket(source.path):
        expected = f"a folder or file on this machine for kind {source.kind}"
        raise InputError(f"sources.{name}.path: got {source.path!r}, expected {expected}")
    return open_source(name, source)


def _side(is_training: bool) -> Split:
    return "train" if is_training else "validation"


def _parquet(name: str, source: SourceConfig) -> Found:
    """Columns of images, the bytes of a file each, and of classes. They are held in memory."""
    files = []
    names = []
    classes = []
    for _, table in _opened(name, source).parts():
        assert isinstance(table, ParquetFile)
        rows = table.rows(source.field, source.label)
        for row, (image, label) in enumerate(rows):
            where = f"{table.path}, row {row}"
            # As the datasets library writes it: bytes and a path.
            data = image.get("bytes") if isinstance(image, dict) else image
            if not isinstance(data, bytes):
                raise InputError(
                    f"{where}: got {type(data).__name__} under {source.field!r}, expected the "
                    "bytes of an image"
                )
            if not isinstance(label, str | int):
                raise InputError(
                    f"{where}: got {type(label).__name__} under {source.label!r}, expected a class"
                )
            files.append(data)
            names.append(where)
            classes.append(str(label))
    return Found(FileImages(files, names), classes, files)


_OPENERS = {
    "digits": _digits,
    "mnist1d": _mnist1d,
    "images": _folder,
    "image_parquet": _parquet,
}
