"""How rates and curvature follow the size of the batch.

    python -m gatedjax.study batch_rates [--small]

arXiv 2006.09092: the largest eigenvalue of a batch's Hessian falls as the batch grows, so rates may
grow, linearly under SGD and as the square root under Adam. Each size of batch is trained with the
rate of batches of 8, and with the rate that the rule makes of it; all see as many tokens.
"hessian@B" is the largest eigenvalue (Lanczos) of the Hessian of B rows at the end.

What differs: AdamW on 1,600 windows of 128 bytes; the paper has SGD and Adam on images.
"""

from gatedjax.config import from_config_dict
from gatedjax.study import Cell, Picture, Study
from gatedjax.study.base import short_config

BASE = 8
SIZES = (2, 8, 32)
SIZES_SMALL = (4, 16)


def get_study(small: bool) -> Study:
    """A cell for each rule and size."""
    rows = 640 if small else 1_600
    sizes = SIZES_SMALL if small else SIZES
    cells = []
    for rule in ("square root", "the same"):
        for size in sizes:
            c = short_config(rows // size)
            c.optim.warmup_steps = c.train.steps // 10
            c.train.batch_size = size
            if rule == "square root":
                c.optim.base_batch_size = BASE
            cells.append(Cell({"rate": rule, "batch": size}, from_config_dict(c)))
    return Study(
        title="Rates and curvature by batch size",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1),
        measures=("validation", "curvature"),
        columns=("bits_per_byte", "hessian@1", "hessian@4", "hessian@16"),
        pictures=(Picture("batch", "bits_per_byte", line="rate", log_x=True),),
    )
