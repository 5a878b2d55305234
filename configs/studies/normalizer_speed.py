"""What each way from logits to weights costs in a training step.

    python -m gatedjax.study configs/studies/normalizer_speed.py [--small]

The cells of `normalizers.py`, trained for a few steps. `step_ms` is the mean time of a step,
compilation left out: have the machine to itself, with one worker.
"""

from gatedjax.config import from_config_dict
from gatedjax.study import Cell, Picture, Study
from gatedjax.study.base import attention, text_config
from gatedjax.study.normalizers import IN_SMALL, VARIANTS

STEPS = 75


def get_study(small: bool) -> Study:
    """A cell for each variant."""
    cells = []
    for name in IN_SMALL if small else VARIANTS:
        options = {"gate_position": "none", **VARIANTS[name]}
        config = from_config_dict(text_config({"attention": attention(**options)}, STEPS))
        cells.append(Cell({"normalizer": name}, config))
    return Study(
        title="What a normalizer costs in a step",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1),
        measures=("speed",),
        columns=("step_ms",),
        pictures=(Picture("normalizer", "step_ms"),),
    )
