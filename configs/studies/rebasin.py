"""Two models trained from different seeds, averaged: as they are, permuted, transported (Git
Re-Basin, arXiv 2209.04836; soft fusion, arXiv 1910.05653).

    python -m gatedjax.study configs/studies/rebasin.py [--small]

The barrier is how far the loss between the two rises above the line between their losses, in nats;
a transported model has a higher loss itself, so that its mean with the first one says more.
"""

from gatedjax.evidence.rebasin import RebasinPair
from gatedjax.study import Cell, Picture, Study

FEED_FORWARDS = {"mlp": "MLP", "moe": "four experts"}
HIDDEN = 64
WAYS = ("as it is", "permuted", "transported")


def get_study(small: bool) -> Study:
    """A cell for each feed-forward."""
    cells = []
    for ffn, name in FEED_FORWARDS.items():
        experiment = RebasinPair(ffn=ffn, hidden=HIDDEN)
        cells.append(Cell({"feed-forward": name}, experiment=experiment))
    return Study(
        title="Loss barriers between two trained models",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1),
        measures=(),
        columns=(
            "loss",
            *(f"barrier@{way}" for way in WAYS),
            *(f"loss of mean@{way}" for way in WAYS),
        ),
        pictures=(Picture("second model", "loss of mean@", line="feed-forward"),),
    )
