"""One layer of attention, trained, points to a support vector machine (arXiv 2308.16898).

    python -m gatedjax.study configs/studies/support_vectors.py [--small]

Cosines of the trained W with the solutions of the two machines, as W grows: W trained by itself
goes to that of the Frobenius norm, W = K Q^T to that of the nuclear norm, whose rank is low.
"""

from gatedjax.evidence.support_vectors import AttentionSVM
from gatedjax.study import Cell, Picture, Study

TRAINED = ("W", "K, Q")


def get_study(small: bool) -> Study:
    """A cell for each way to train."""
    cells = [Cell({"trained": name}, experiment=AttentionSVM(name)) for name in TRAINED]
    norms = AttentionSVM("W").norms
    machines = ("frobenius", "nuclear")
    cosines = [f"{name}@{norm}" for name in machines for norm in norms]
    return Study(
        title="Trained attention and support vector machines",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1, 2),
        measures=(),
        columns=(*cosines, "rank", "frobenius_rank", "nuclear_rank", "best_chosen"),
        pictures=(
            Picture("norm of W", "frobenius@", line="trained", log_x=True),
            Picture("norm of W", "nuclear@", line="trained", log_x=True),
        ),
    )
