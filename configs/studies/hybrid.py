"""The hybrid of `mqar` whose linear layer has the largest state, with five seeds.

    python -m gatedjax.study configs/studies/hybrid.py [--small]

One layer of gated linear attention below one of gated attention, 4,096 numbers of state. An earlier
table showed it at 0.06, which was a compiler's fault (docs/studies.md).
"""

from gatedjax.study import Study
from gatedjax.study.mqar import HEAD_DIM, HEADS, TASK, attention, cell, linear

KEY_DIM = 64


def get_study(small: bool) -> Study:
    """One cell."""
    labels = {"mixer": "hybrid", "state": HEADS * KEY_DIM * HEAD_DIM}
    mixers = {"l": linear(KEY_DIM, "vector"), "a": attention("sdpa")}
    return Study(
        title=f"The hybrid's recall, {TASK.num_pairs} pairs in {TASK.seq_len} tokens",
        cells=(cell(labels, TASK, mixers, ("l", "a"), 1000),),
        seeds=(0,) if small else (0, 1, 2, 3, 4),
        measures=("recall",),
        columns=("accuracy", "steps"),
        stop_at=0.99,
    )
