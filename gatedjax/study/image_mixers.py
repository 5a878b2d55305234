"""The mixers of encoders that two studies compare: what they learn of images, and what they cost.

All stand in the same small encoder, which classifies the mean of its patches.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from gatedjax.config import BIDIRECTIONAL, config_dict, layer

Options = Mapping[str, Any]

WIDTH = 64
HEADS = 4
HEAD_DIM = 16
HIDDEN = 256


class Sizes(NamedTuple):
    """Of images and what depends on them.

    image, patch: height and width in pixels.
    block, grid: MAXIM's.
    landmark: SOFT's, the side of the square of patches that makes one.
    chunk: MossFormer's and FLASH's, in tokens.
    window: Gated-SwinRMT's, None for one.
    """

    image: tuple[int, int]
    patch: tuple[int, int]
    block: tuple[int, int]
    grid: tuple[int, int]
    landmark: int
    chunk: int = 8
    window: int | None = None

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        rows, columns = (side // part for side, part in zip(self.image, self.patch))
        return rows * columns


DIGITS = Sizes(image=(8, 8), patch=(2, 2), block=(2, 2), grid=(2, 2), landmark=2)
# A signal of 40 samples has one row of patches, and no squares of them.
MNIST1D = Sizes(image=(1, 40), patch=(1, 4), block=(1, 5), grid=(1, 2), landmark=1)


def square(side: int) -> Sizes:
    """An image of side x side patches; windows, blocks and landmarks do not grow with it."""
    return Sizes(
        image=(2 * side, 2 * side),
        patch=(2, 2),
        block=(8, 8),
        grid=(8, 8),
        landmark=side // 8,
        chunk=64,
        window=8,
    )


# Kind and options of the mixers that see all pairs, or gate with a matrix over all tokens ...
_ALL_PAIRS: dict[str, tuple[str, Options]] = {
    "softmax": ("gated_attention", {"gate_position": "none"}),
    "softmax, gated": ("gated_attention", {}),
    "Sinkhorn": ("gated_attention", {"normalizer": "sinkhorn"}),
    "QR": ("gated_attention", {"normalizer": "qr"}),
    "ConViT": ("gated_positional", {"num_heads": HEADS}),
    "gMLP": ("spatial_gate", {"hidden": HIDDEN}),
}
# ... and of those whose time grows as the number of tokens.
_LINEAR: dict[str, tuple[str, Options]] = {
    "MAXIM": ("spatial_gate", {"over": "blocks_and_grid", "hidden": 128}),
    "NiNformer": ("mixer_gate", {"token_hidden": 32, "channel_hidden": 128}),
    "MossFormer": (
        "gated_unit",
        {"form": "mossformer", "causal": False, "hidden": 128, "key_dim": 32},
    ),
    "Activator": ("no_mixer", {}),
}
_LATER: dict[str, tuple[str, Options]] = {
    "FLASH": ("gated_unit", {"form": "flash", "causal": False, "hidden": 128, "key_dim": 32}),
    **{name: ("bidirectional_linear_attention", values) for name, values in BIDIRECTIONAL.items()},
    "lion_s, serpentine": (
        "bidirectional_linear_attention",
        {**BIDIRECTIONAL["lion_s"], "order": "serpentine"},
    ),
}
VARIANTS = {**_ALL_PAIRS, **_LINEAR, **_LATER}
# Time and memory of these are to grow as the number of tokens (fft_rpe: times its logarithm).
LINEAR = (*_LINEAR, *_LATER)


def encoder(name: str, sizes: Sizes, num_layers: int) -> ConfigDict:
    """An encoder of width 64 with ten classes, and the length of its rows.

    Args:
      name: of `VARIANTS`.
      sizes: of its images.
      num_layers: how many.

    Returns:
      The configuration, to be given data and steps.
    """
    kind, options = VARIANTS[name]
    c = config_dict()
    c.model.task = "classify"
    patches = c.model.patches
    patches.height, patches.width = sizes.image
    patches.patch_height, patches.patch_width = sizes.patch
    patches.pooling = "mean"
    c.model.vocab_size = 10
    c.model.width = WIDTH
    c.model.num_layers = num_layers
    c.model.mixers = {"attention": layer(kind, **{**options, **_of_sizes(name, sizes)})}
    if name == "Activator":
        feed_forward = layer("gated_mlp", hidden=HIDDEN, activation="gelu", bias=True, norm=True)
    else:
        feed_forward = layer("mlp", hidden=HIDDEN, activation="gelu")
    c.model.ffns = {"mlp": feed_forward}
    c.model.dtype = "float32"
    c.data.seq_len = sizes.tokens
    return c


def _of_sizes(name: str, sizes: Sizes) -> Options:
    """What the mixers' options say of heads and images."""
    kind, options = VARIANTS[name]
    if kind == "gated_attention":
        return {
            "num_heads": HEADS,
            "head_dim": HEAD_DIM,
            "rope_fraction": 0.0,
            "causal": False,
        }
    if name == "MAXIM":
        return {"block": sizes.block, "grid": sizes.grid}
    if kind == "gated_unit":
        return {"chunk": sizes.chunk}
    if kind != "bidirectional_linear_attention":
        return {}
    of_heads = {
        "num_heads": HEADS,
        "key_dim": HEAD_DIM,
        "value_dim": HEAD_DIM,
        "length": sizes.tokens,
    }
    if options.get("form") == "gaussian":
        return {**of_heads, "landmark_size": sizes.landmark}
    if options.get("form") == "manhattan":
        return {**of_heads, "window": sizes.window}
    return of_heads
