"""Does a Mamba layer learn in context although examples are outliers? (arXiv 2510.00399)

    python -m gatedjax.study configs/studies/outliers.py [--small]

One head on prompts of examples with labels, trained on prompts of which a fraction are outliers,
tested on other tasks with outliers of other mixtures and with the wrong label. The paper: the gate
shuts where an example is an outlier, if training had some; linear attention, which cannot, fails
when they are half of the examples.
"""

from gatedjax.evidence.outliers import OutliersInContext
from gatedjax.study import Cell, Picture, Study

MIXERS = ("mamba", "linear")


def get_study(small: bool) -> Study:
    """A cell for each layer and fraction of outliers in training."""
    steps = 4_000 if small else 20_000
    fractions = (0.0, 0.4) if small else (0.0, 0.2, 0.4, 0.6)
    cells = []
    for mixer in MIXERS:
        for fraction in fractions:
            experiment = OutliersInContext(mixer, fraction, steps=steps)
            name = f"{mixer}, outliers in training: {fraction:g}"
            cells.append(Cell({"layer": name}, experiment=experiment))
    errors = [f"error@{fraction}" for fraction in OutliersInContext.tested]
    return Study(
        title="In-context learning with outliers, one layer",
        cells=tuple(cells),
        seeds=tuple(range(3 if small else 5)),
        measures=(),
        columns=(*errors, "gate_clean", "gate_outlier"),
        pictures=(Picture("fraction of outliers", "error@", line="layer"),),
    )
