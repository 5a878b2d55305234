"""Two models trained from different seeds, averaged: as they are, permuted, transported (Git
Re-Basin, arXiv 2209.04836; soft fusion, arXiv 1910.05653).

    python -m gatedjax.study configs/studies/rebasin.py [--small]

The barrier is how far the loss between the two rises above the line between their losses, in nats.
"""

from gatedjax.evidence.rebasin import RebasinPair
from gatedjax.study import Cell, Picture, Study

FEED_FORWARDS = ("mlp", "moe")
HIDDEN = (32, 128)
HIDDEN_SMALL = (64,)


def get_study(small: bool) -> Study:
    """A cell for each feed-forward and width."""
    cells = []
    for ffn in FEED_FORWARDS:
        for hidden in HIDDEN_SMALL if small else HIDDEN:
            experiment = RebasinPair(ffn=ffn, hidden=hidden)
            cells.append(Cell({"feed-forward": ffn, "hidden": hidden}, experiment=experiment))
    ways = ("as it is", "permuted", "transported")
    return Study(
        title="Loss barriers between two trained models",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1, 2),
        measures=(),
        columns=(
            "loss",
            *(f"barrier, {way}" for way in ways),
            *(f"loss of mean, {way}" for way in ways),
        ),
        pictures=(Picture("feed-forward", "barrier, permuted"),),
    )
