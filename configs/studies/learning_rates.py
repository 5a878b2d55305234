"""Which learning rates a model bears, with and without the gate.

    python -m gatedjax.study configs/studies/learning_rates.py [--small]

arXiv 2505.06708 (table 2, 48 layers, 1T tokens): without the gate training diverges at 8e-3, with
it it does not. No gradient clipping here, so that nothing else holds a run.
"""

from gatedjax.config import from_config_dict
from gatedjax.study import Cell, Picture, Study
from gatedjax.study.base import attention, text_config

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
RATES_SMALL = (3e-3, 3e-2, 1e-1)
GATES = ("none", "sdpa")
STEPS = 150


def get_study(small: bool) -> Study:
    """A cell for each gate and learning rate."""
    cells = []
    for gate in GATES:
        for lr in RATES_SMALL if small else RATES:
            c = text_config({"attention": attention(gate_position=gate)}, STEPS)
            c.optim.lr = lr
            c.optim.clip_norm = 0.0
            cells.append(Cell({"gate": gate, "lr": lr}, from_config_dict(c)))
    return Study(
        title="Loss by learning rate, with and without the gate",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1),
        measures=("validation", "probes"),
        columns=("bits_per_byte", "max_activation"),
        pictures=(Picture("lr", "bits_per_byte", line="gate", log_x=True),),
    )
