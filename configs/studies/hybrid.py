"""One layer of gated linear attention below one of gated attention: what it recalls, five seeds.

    python -m gatedjax.study configs/studies/hybrid.py [--small]

The hybrid of `mqar`, at three sizes of the linear layer's state.
"""

from gatedjax.study import Picture, Study
from gatedjax.study.mqar import HEAD_DIM, HEADS, TASK, attention, cell, linear

KEY_DIMS = (4, 16, 64)
KEY_DIMS_SMALL = (4, 64)


def get_study(small: bool) -> Study:
    """A cell for each size."""
    cells = []
    for key_dim in KEY_DIMS_SMALL if small else KEY_DIMS:
        labels = {"mixer": "hybrid", "state": HEADS * key_dim * HEAD_DIM}
        mixers = {"l": linear(key_dim, "vector"), "a": attention("sdpa")}
        cells.append(cell(labels, TASK, mixers, ("l", "a"), 1000))
    return Study(
        title=f"The hybrid's recall, {TASK.num_pairs} pairs in {TASK.seq_len} tokens",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1, 2, 3, 4),
        measures=("recall",),
        columns=("accuracy", "steps"),
        pictures=(Picture("state", "accuracy", line="mixer", log_x=True),),
        stop_at=0.99,
    )
