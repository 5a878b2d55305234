"""Data on which softmax attention succeeds and linear attention cannot (after arXiv 2310.11685).

    python -m gatedjax.study configs/studies/superiority.py [--small]

One token of n is a needle, whose sign is asked for. The bound of linear attention falls to 1/2, a
guess, as n grows; softmax attention is right at any n (`gatedjax/evidence/superiority.py`).
"""

from gatedjax.evidence.superiority import NeedleSign
from gatedjax.study import Cell, Picture, Study

LENGTHS = (16, 64, 256)
MIXERS = ("softmax", "linear")


def get_study(small: bool) -> Study:
    """A cell for each mixer and number of tokens."""
    cells = []
    for mixer in MIXERS:
        for n in LENGTHS:
            experiment = NeedleSign(mixer=mixer, n=n)
            cells.append(Cell({"mixer": mixer, "tokens": n}, experiment=experiment))
    return Study(
        title="A needle's sign: softmax and linear attention",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1, 2),
        measures=(),
        columns=("accuracy", "linear_bound", "softmax_weight"),
        pictures=(Picture("tokens", "accuracy", line="mixer", log_x=True),),
    )
