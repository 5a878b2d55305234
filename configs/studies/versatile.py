"""What slices and loops of one MLP give for the FLOPs that they take (VersatileFFN, arXiv
2512.14531).

    python -m gatedjax.study configs/studies/versatile.py [--small]

Two layers of width 48. With the same stored parameters, to the number: a plain gated MLP of hidden
size 132, and a versatile one of 128, whose two routers weigh as much as the 4 channels. A wider
plain one is there because loops spend FLOPs that the first does not. `mflop` is of a token on
validation text, forward, with the loops that it had.
"""

from gatedjax.config import from_config_dict, layer
from gatedjax.study import Cell, Picture, Study
from gatedjax.study.base import short_config

HIDDEN = 128
SLICES = 8
LOOPS = 4
# Routers have a weight for every slice and loop, an MLP three for every channel.
SAME_PARAMETERS = HIDDEN + (SLICES + LOOPS) // 3


def get_study(small: bool) -> Study:
    """A cell for each feed-forward."""
    steps = 100 if small else 300
    versatile = layer(
        "versatile_mlp",
        hidden=HIDDEN,
        experts=SLICES,
        loops=LOOPS,
        # The temperature is at its end after the run.
        anneal_steps=steps,
    )
    feed_forwards = {
        "plain, the same parameters": layer("gated_mlp", hidden=SAME_PARAMETERS),
        "versatile": versatile,
        "plain, twice as wide": layer("gated_mlp", hidden=2 * SAME_PARAMETERS),
    }
    cells = []
    for name, feed_forward in feed_forwards.items():
        c = short_config(steps)
        c.model.ffns = {"mlp": feed_forward}
        cells.append(Cell({"feed-forward": name}, from_config_dict(c)))
    return Study(
        title="One MLP in slices and loops",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1),
        measures=("spent",),
        columns=("loss", "accuracy", "loops", "mflop", "parameters"),
        pictures=(Picture("feed-forward", "loss"), Picture("feed-forward", "mflop")),
    )
