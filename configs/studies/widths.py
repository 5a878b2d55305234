"""Whether the best learning rate of a narrow model is that of a wide one.

    python -m gatedjax.study widths [--small]

arXiv 2510.15262: with rates of matrices as 1 / width and their decay as its root, rate and decay
transfer, and the largest singular values over sqrt(rate / decay) width^0.75 match. Three widths
with the rule, from width 48, and without it.

What differs: heads have 24 channels at every width, and models train for hundreds of steps: long
enough for rates to matter, not for the balance of growth and decay that the rule is about.
"""

from gatedjax.config import from_config_dict, layer
from gatedjax.study import Cell, Picture, Study
from gatedjax.study.base import HEAD_DIM, short_config

BASE_WIDTH = 24
WIDTHS = (24, 48, 96)
RATES = (3e-3, 1e-2, 3e-2)
RATES_SMALL = (3e-3, 1e-2)


def get_study(small: bool) -> Study:
    """A cell for each rule, width and rate."""
    cells = []
    for rule in ("by width", "the same"):
        # At the base width both rules are one.
        for width in WIDTHS if rule == "by width" else WIDTHS[1:]:
            for lr in RATES_SMALL if small else RATES:
                heads = width // HEAD_DIM
                sizes = {"num_heads": heads, "num_kv_heads": heads, "head_dim": HEAD_DIM}
                c = short_config(60 if small else 200)
                c.model.mixers.attention = layer("gated_attention", **sizes)
                c.model.width = width
                c.model.ffns.mlp.hidden = 8 * width // 3
                # Starts as 1 / sqrt(width), of both rules.
                c.model.init_std = 0.05 * (96 / width) ** 0.5
                c.optim.lr = lr
                if rule == "by width":
                    c.optim.base_width = BASE_WIDTH
                labels = {"rates": f"{rule}, width {width}", "lr": lr}
                cells.append(Cell(labels, from_config_dict(c)))
    return Study(
        title="Learning rates across widths",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1),
        measures=("validation", "width_probe"),
        columns=("bits_per_byte", "width_probe"),
        pictures=(Picture("lr", "bits_per_byte", line="rates", log_x=True),),
    )
