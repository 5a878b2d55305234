"""What mixes patches: attention and gates, on digits of 8 x 8 pixels and on signals of 40 samples.

    python -m gatedjax.study configs/studies/image_mixers.py [--small]

Encoders of the same width and depth, which classify the mean of their patches. The small version is
on MNIST-1D, which is generated; scikit-learn's digits need the extra "vision".
"""

from typing import Any

from gatedjax.config import config_dict, from_config_dict, layer
from gatedjax.study import Cell, Picture, Study

# Height and width of an image and of a patch, and MAXIM's block and grid of patches.
SIZES: dict[str, dict[str, tuple[int, int]]] = {
    "digits": {"image": (8, 8), "patch": (2, 2), "block": (2, 2), "grid": (2, 2)},
    "mnist1d": {"image": (1, 40), "patch": (1, 4), "block": (1, 5), "grid": (1, 2)},
}
# Kind and options of the mixer.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("gated_attention", {"gate_position": "none"}),
    "softmax, gated": ("gated_attention", {}),
    "Sinkhorn": ("gated_attention", {"normalizer": "sinkhorn"}),
    "QR": ("gated_attention", {"normalizer": "qr"}),
    "ConViT": ("gated_positional", {"num_heads": 4}),
    "gMLP": ("spatial_gate", {"hidden": 256}),
    "MAXIM": ("spatial_gate", {"over": "blocks_and_grid", "hidden": 128}),
    "NiNformer": ("mixer_gate", {"token_hidden": 32, "channel_hidden": 128}),
    "MossFormer": (
        "gated_unit",
        {"form": "mossformer", "causal": False, "hidden": 128, "key_dim": 32, "chunk": 8},
    ),
    "Activator": ("no_mixer", {}),
}
ATTENTION = {"num_heads": 4, "head_dim": 16, "rope_fraction": 0.0, "causal": False}


def get_study(small: bool) -> Study:
    """A cell for each variant and data set."""
    steps = 250 if small else 1500
    cells = []
    for data in ("mnist1d",) if small else SIZES:
        for name in VARIANTS:
            config = from_config_dict(configured(data, name, steps))
            cells.append(Cell({"data": data, "mixer": name}, config))
    return Study(
        title="What mixes patches",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1),
        measures=("validation",),
        columns=("accuracy", "loss"),
        pictures=(Picture("mixer", "accuracy", line="data"),),
    )


def configured(data: str, name: str, steps: int):
    """An encoder of four layers of width 64."""
    sizes = SIZES[data]
    kind, options = VARIANTS[name]
    if kind == "gated_attention":
        options = {**ATTENTION, **options}
    if name == "MAXIM":
        options = {**options, "block": sizes["block"], "grid": sizes["grid"]}
    c = config_dict()
    c.model.task = "classify"
    patches = c.model.patches
    patches.height, patches.width = sizes["image"]
    patches.patch_height, patches.patch_width = sizes["patch"]
    patches.pooling = "mean"
    c.model.vocab_size = 10
    c.model.width = 64
    c.model.num_layers = 4
    c.model.mixers = {"attention": layer(kind, **options)}
    if name == "Activator":
        feed_forward = layer("gated_mlp", hidden=256, activation="gelu", bias=True, norm=True)
    else:
        feed_forward = layer("mlp", hidden=256, activation="gelu")
    c.model.ffns = {"mlp": feed_forward}
    c.model.scan_layers = False
    c.model.dtype = "float32"

    c.data.sources = {"main": {"kind": data}}
    rows, columns = (side // part for side, part in zip(sizes["image"], sizes["patch"]))
    c.data.seq_len = rows * columns
    c.data.validation_fraction = 0.2
    if data == "mnist1d":
        c.data.images.mean = (0.0,)
        c.data.images.std = (1.0,)
    else:
        c.data.images.crop_padding = 1
    c.optim.lr = 2e-3
    c.optim.warmup_steps = 50
    c.train.steps = steps
    c.train.batch_size = 64
    c.train.eval_batches = 100  # all of them
    return c
