"""What a schedule gains that follows the gradient norms of an earlier run.

    python -m gatedjax.study refined_schedules [--small]

arXiv 2310.07831. Each run is made with linear decay to 0, then again with the schedule refined from
its gradients' sums of absolute values. What differs: AdamW on bytes, two layers of width 48
and 200 steps; the paper has ten problems up to language models.
"""

from gatedjax.config import from_config_dict
from gatedjax.study import Cell, Picture, Study
from gatedjax.study.base import short_config
from gatedjax.study.refinement import Refinement

RATES = (3e-3, 1e-2)
STEPS = 200


def get_study(small: bool) -> Study:
    """A cell for each rate."""
    cells = []
    for lr in (3e-3,) if small else RATES:
        c = short_config(STEPS)
        c.optim.lr = lr
        cells.append(Cell({"lr": lr}, experiment=Refinement(from_config_dict(c))))
    return Study(
        title="Linear decay, and a schedule refined from its run",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1, 2),
        measures=(),
        columns=("bits@linear", "bits@refined", "gained"),
        pictures=(Picture("schedule", "bits@", line="lr"),),
    )
