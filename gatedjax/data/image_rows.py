"""From images to rows of patches, and what is done to them at random on the way."""

import dataclasses

import numpy as np
from jaxtyping import Float32

from gatedjax.config import ImageConfig, PatchConfig
from gatedjax.data.batch import Batch, empty_row
from gatedjax.data.images import Example, Pixels


def augmented(example: Example, rng: np.random.Generator, config: ImageConfig) -> Example:
    """The image, moved by up to `crop_padding` pixels and perhaps mirrored."""
    pixels = example.pixels
    if config.crop_padding:
        pixels = random_crop(pixels, rng, config.crop_padding)
    if config.flip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return Example(pixels, example.label)


def random_crop(pixels: Pixels, rng: np.random.Generator, padding: int) -> Pixels:
    """A piece of the image with so many pixels of 0 around it, as large as the image was.

    A signal has nothing above and below it.
    """
    height, width, _ = pixels.shape
    above = padding if height > 1 else 0
    padded = np.pad(pixels, ((above, above), (padding, padding), (0, 0)))
    top = rng.integers(2 * above + 1)
    left = rng.integers(2 * padding + 1)
    return padded[top : top + height, left : left + width]


def row_of_image(example: Example, patches: PatchConfig, config: ImageConfig) -> Batch:
    """An image as a row: its patches, and its class as the target of the first token."""
    row = empty_row(patches.num_tokens)
    row.segment_ids[:] = 1
    row.positions[:] = np.arange(patches.num_tokens)
    row.targets[0] = example.label
    row.loss_mask[0] = 1.0
    mean = np.asarray(config.mean, np.float32)
    std = np.asarray(config.std, np.float32)
    cut = patches_of((example.pixels - mean) / std, patches)
    # Where the class token comes, nothing is seen.
    padded = np.pad(cut, ((patches.extra_tokens, 0), (0, 0)))
    return dataclasses.replace(row, patches=padded)


def patches_of(pixels: Pixels, config: PatchConfig) -> Float32[np.ndarray, "patches P"]:
    """The patches of an image row by row, the pixels of each row by row, channels last."""
    rows, columns = config.grid
    shape = (rows, config.patch_height, columns, config.patch_width, config.channels)
    return pixels.reshape(shape).transpose(0, 2, 1, 3, 4).reshape(rows * columns, config.size)
