"""Groups of examples with opposing signals (arXiv 2311.04163).

    python -m gatedjax.study configs/studies/opposing.py [--small]

One example in five has a feature of large magnitude that says little of its class. At a rate that
is nearly too high for it, the examples whose losses fall and rise most in a step are those, of
opposite classes, and the gradients of the two groups point apart.
"""

from gatedjax.evidence.opposing import OpposingSignals
from gatedjax.study import Cell, Picture, Study

RATES = (0.01, 0.02, 0.03, 0.04, 0.05)


def get_study(small: bool) -> Study:
    """A cell for each rate."""
    cells = [Cell({"rate": rate}, experiment=OpposingSignals(rate=rate)) for rate in RATES]
    return Study(
        title="Opposing signals, by the rate of descent",
        cells=tuple(cells),
        seeds=tuple(range(3 if small else 10)),
        measures=(),
        columns=(
            "cosine",
            "cosine, random groups",
            "with the feature",
            "labels apart",
            "sharpness x rate",
            "loss",
        ),
        pictures=(Picture("rate", "cosine", log_x=True),),
    )
