"""Groups of examples with opposing signals (arXiv 2311.04163).

    python -m gatedjax.study configs/studies/opposing.py [--small]

One example in five has a feature of large magnitude that says little of its class. At a rate that
is too high for it, the examples whose losses fall and rise most in a step are those, of
opposite classes, and the gradients of the two groups point apart.
"""

from gatedjax.evidence.opposing import OpposingSignals
from gatedjax.study import Cell, Picture, Study

EDGES = (0.25, 0.5, 0.75, 1.0, 1.1)


def get_study(small: bool) -> Study:
    """A cell for each rate."""
    cells = [Cell({"edge": edge}, experiment=OpposingSignals(edge=edge)) for edge in EDGES]
    return Study(
        title="Opposing signals, by the rate of descent",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1, 2),
        measures=(),
        columns=(
            "cosine",
            "cosine, random groups",
            "with the feature",
            "labels apart",
            "sharpness x rate / 2",
            "loss",
        ),
        pictures=(Picture("edge", "cosine"),),
    )
