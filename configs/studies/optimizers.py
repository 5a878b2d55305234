"""What the optimizers of papers gain over AdamW and Muon on the small text model.

    python -m gatedjax.study optimizers [--small]

LANTON (arXiv 2510.14009) beside Muon, adaptive memory (2510.04988) beside AdamW, each at several
rates. What differs: two layers of width 48 and 200 steps of 1,024 bytes; the papers have up to a
billion parameters.
"""

from gatedjax.config import from_config_dict
from gatedjax.study import Cell, Picture, Study
from gatedjax.study.base import short_config

OPTIMIZERS = {
    "adamw": "AdamW",
    "am_adamw": "AdamW, adaptive memory",
    "muon": "Muon",
    "lanton": "LANTON",
}
RATES = (3e-3, 1e-2)
RATES_SMALL = (3e-3,)


def get_study(small: bool) -> Study:
    """A cell for each optimizer and rate."""
    cells = []
    for name, words in OPTIMIZERS.items():
        for lr in RATES_SMALL if small else RATES:
            c = short_config(steps=200)
            c.optim.name = name
            c.optim.lr = lr
            cells.append(Cell({"optimizer": words, "lr": lr}, from_config_dict(c)))
    return Study(
        title="Loss by optimizer and learning rate",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1),
        measures=("validation",),
        columns=("bits_per_byte",),
        pictures=(Picture("lr", "bits_per_byte", line="optimizer", log_x=True),),
    )
