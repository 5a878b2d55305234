"""What mixes patches: attention and gates, on digits of 8 x 8 pixels and on signals of 40 samples.

    python -m gatedjax.study configs/studies/image_mixers.py [--small]

Encoders of one layer and of the same width, which classify the mean of their patches: all mixers on
the digits, which need the extra "vision", and on the signals, which are generated; some on the
signals in the small version. What the mixers cost is in `image_mixer_costs.py`.
"""

from gatedjax.config import from_config_dict
from gatedjax.evidence.encoders import EncoderRun
from gatedjax.study import Cell, Picture, Study
from gatedjax.study.image_mixers import DIGITS, MNIST1D, VARIANTS, encoder

SIZES = {"digits": DIGITS, "mnist1d": MNIST1D}
# A few minutes' worth of them.
IN_SMALL = (
    "softmax",
    "softmax, gated",
    "gMLP",
    "NiNformer",
    "Activator",
    "lion_s",
    "mala",
    "vig",
)


def get_study(small: bool) -> Study:
    """A cell for each variant."""
    cells = []
    for data in ("mnist1d",) if small else SIZES:
        for name in IN_SMALL if small else VARIANTS:
            run = EncoderRun(from_config_dict(configured(data, name)))
            cells.append(Cell({"data": data, "mixer": name}, experiment=run))
    return Study(
        title="What mixes patches",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1),
        measures=(),
        columns=("accuracy", "loss"),
        pictures=(Picture("mixer", "accuracy", line="data"),),
    )


def configured(data: str, name: str):
    """The encoder, its data and its training."""
    c = encoder(name, SIZES[data], num_layers=1)
    c.model.scan_layers = False
    c.data.sources = {"main": {"kind": data}}
    c.data.validation_fraction = 0.2
    if data == "mnist1d":
        c.data.images.mean = (0.0,)
        c.data.images.std = (1.0,)
    c.optim.lr = 2e-3
    c.optim.warmup_steps = 30
    c.train.steps = 300
    c.train.batch_size = 32
    return c
