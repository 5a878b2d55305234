"""What one layer of attention learns of linear regression in context (arXiv 2503.12734).

    python -m gatedjax.study configs/studies/in_context.py [--small]

The paper: W_Q W_K^T becomes a multiple of the identity on x, W_V W_O reads y only, the factors of
the heads sum to zero. Two heads are then a step of gradient descent on centered inputs, which one
head is not; and the layer reads longer rows than those of training, which a linear layer does not.
"""

from gatedjax.evidence.in_context import InContextRegression
from gatedjax.study import Cell, Picture, Study

STEPS = 4_000
HEADS = {"softmax": (1, 2, 4), "linear": (2,)}


def get_study(small: bool) -> Study:
    """A cell for each mixer and number of heads."""
    cells = []
    for mixer, numbers in HEADS.items():
        for heads in numbers:
            experiment = InContextRegression(heads=heads, mixer=mixer, steps=STEPS)
            name = f"{mixer}, heads: {heads}"
            cells.append(Cell({"layer": name}, experiment=experiment))
    return Study(
        title="Linear regression in context, one layer",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1),
        measures=(),
        columns=(
            "loss@40",
            "loss@160",
            "debiased@40",
            "debiased@160",
            "bayes@40",
            "bayes@160",
            "kq_diagonal",
            "ov_last",
            "zero_sum",
            "unequal",
        ),
        pictures=(Picture("layer", "loss@40"), Picture("layer", "loss@160")),
    )
