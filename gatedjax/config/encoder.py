"""The configuration of encoders: what a token of an image is, how images and tokens are changed."""

from dataclasses import dataclass
from typing import Literal

from gatedjax.config.checks import (
    Checked,
    Fraction,
    NonNegative,
    Positive,
    Size,
    SizeOrZero,
    divides,
)
from gatedjax.errors import require

# lm: the next token. masked_lm: the tokens that were masked. classify: the class of an image.
Task = Literal["lm", "masked_lm", "classify"]


@dataclass(frozen=True)
class PatchConfig(Checked):
    """How an image becomes tokens, a patch each, and the tokens one vector. Of task classify.

    A signal is an image of height 1.
    """

    # of an image, in pixels
    height: Size = 8
    width: Size = 8
    # 1: gray; 3: red, green, blue
    channels: Size = 1
    # of a patch, in pixels
    patch_height: Size = 2
    patch_width: Size = 2
    # What is added to a patch for its place on the grid: a learned vector, which the class token
    # has too (ViT, arXiv 2010.11929), or sines and cosines of row and column (arXiv 2205.01580).
    positions: Literal["learned", "sincos", "none"] = "learned"
    # What is classified: a learned token that stands before the patches, or the patches' mean.
    pooling: Literal["class_token", "mean"] = "class_token"

    def check(self) -> None:
        divides("patch_height", self.patch_height, self.height)
        divides("patch_width", self.patch_width, self.width)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.height // self.patch_height, self.width // self.patch_width

    @property
    def extra_tokens(self) -> int:
        """Tokens before the patches: the class token, if there is one."""
        return 1 if self.pooling == "class_token" else 0

    @property
    def num_tokens(self) -> int:
        """Tokens of an image."""
        rows, columns = self.grid
        return rows * columns + self.extra_tokens

    @property
    def size(self) -> int:
        """Numbers of a patch."""
        return self.patch_height * self.patch_width * self.channels


@dataclass(frozen=True)
class ImageConfig(Checked):
    """What is done to images before they are cut into patches. Of task classify."""

    # Pixels from 0 to 1 become (pixel - mean) / std; a number each for all channels, or one each
    # for every channel.
    mean: tuple[NonNegative, ...] = (0.5,)
    std: tuple[Positive, ...] = (0.5,)
    # exact: images of another size are refused; resize: the shorter side is made to fit, and the
    # middle cut out.
    fit: Literal["exact", "resize"] = "exact"
    # In training: so many pixels of 0 on all sides, then a random piece of the old size.
    crop_padding: SizeOrZero = 0
    # in training: mirrored, left and right, every other time
    flip: bool = False

    def check(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            require(len(value) > 0, name, value, "at least one number")


@dataclass(frozen=True)
class MaskingConfig(Checked):
    """Which tokens are to be predicted, and what stands in their places (BERT, arXiv 1810.04805).

    Of task masked_lm. Ends of documents are not among them.
    """

    # of the tokens, that are predicted
    fraction: Fraction = 0.15
    # of those: replaced by the mask, by a random token; the others stay as they are
    masked: Fraction = 0.8
    random: Fraction = 0.1

    def check(self) -> None:
        require(self.fraction > 0, "fraction", self.fraction, "above 0")
        require(
            self.masked + self.random <= 1.0,
            "random",
            self.random,
            f"at most 1 - masked = {1.0 - self.masked:g}",
        )
