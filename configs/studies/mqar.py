"""How much a mixer of bounded state can recall, by the size of its state.

    python -m gatedjax.study configs/studies/mqar.py [--small]

Multi-query associative recall: two layers of one mixer each (hybrid: a linear one, then gated
attention), as in arXiv 2312.04927, with a smaller vocabulary and fewer examples; linear mixers have
the short convolution of that study's later version. Linear mixers, and those with the delta rule,
are trained at several key widths: K x V numbers of state in each of the heads of a layer.
"""

import dataclasses

from gatedjax.study import Picture, Study
from gatedjax.study.mqar import HEAD_DIM, HEADS, TASK, WIDTH, attention, cell, delta, linear

TRAIN_EXAMPLES_SMALL = 20_000

KEY_DIMS = (4, 16, 64)
KEY_DIMS_SMALL = (4, 16)

ATTENTION_GATES = {"attention": "none", "gated attention": "sdpa"}
DECAYS = {"linear attention": "none", "scalar decay": "scalar", "vector decay (GLA)": "vector"}
# The same decays with the delta rule: a token erases what its key finds before it writes.
DELTA_DECAYS = {"DeltaNet": "none", "Gated DeltaNet": "scalar", "Kimi Delta Attention": "vector"}
DELTA_SMALL = ("Gated DeltaNet",)


def get_study(small: bool) -> Study:
    """Cells of attention, and of each other mixer and the hybrid at several sizes of state."""
    task = TASK
    if small:
        task = dataclasses.replace(TASK, train_examples=TRAIN_EXAMPLES_SMALL)
    steps = 800 if small else 1000
    cells = []
    for name, gate in ATTENTION_GATES.items():
        labels = {"mixer": name, "state": 2 * task.seq_len * WIDTH}
        cells.append(
            cell(
                labels,
                task,
                {"a": attention(gate)},
                ("a", "a"),
                steps,
            )
        )
    for key_dim in KEY_DIMS_SMALL if small else KEY_DIMS:
        # Of the linear layer, for the hybrid.
        state = HEADS * key_dim * HEAD_DIM
        for name, decay in DECAYS.items():
            labels = {"mixer": name, "state": state}
            cells.append(
                cell(
                    labels,
                    task,
                    {"l": linear(key_dim, decay)},
                    ("l", "l"),
                    steps,
                )
            )
        labels = {"mixer": "hybrid", "state": state}
        hybrid = {"l": linear(key_dim, "vector"), "a": attention("sdpa")}
        cells.append(cell(labels, task, hybrid, ("l", "a"), steps))
        for name in DELTA_SMALL if small else DELTA_DECAYS:
            labels = {"mixer": name, "state": state}
            mixers = {"d": delta(key_dim, DELTA_DECAYS[name])}
            cells.append(cell(labels, task, mixers, ("d", "d"), steps))
    return Study(
        title=f"Multi-query associative recall, {task.num_pairs} pairs in {task.seq_len} tokens",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1),
        measures=("recall",),
        columns=("accuracy", "steps"),
        pictures=(Picture("state", "accuracy", line="mixer", log_x=True),),
        stop_at=0.99,
    )
