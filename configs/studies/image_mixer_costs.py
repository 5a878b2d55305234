"""What a mixer of an encoder costs by the number of patches: those of `image_mixers.py`.

    taskset -c 0 python -m gatedjax.study configs/studies/image_mixer_costs.py [--small]

A training step, with AdamW, of an encoder of one layer of width 64, on one image of 16 x 16, 32 x
32 and 64 x 64 patches. `step_ms` is the time of the process, of all its threads; on one core a busy
machine adds little to it. `temporary_mib` is what the compiled step needs beside its state and the
image. Activator has no mixer: what it takes is what the others have around theirs.
"""

from gatedjax.config import from_config_dict
from gatedjax.evidence.encoders import StepCost
from gatedjax.study import Cell, Picture, Study
from gatedjax.study.image_mixers import VARIANTS, encoder, square

SIDES = (16, 32, 64)
IN_SMALL = ("softmax", "gMLP", "lion_s", "mala")


def get_study(small: bool) -> Study:
    """A cell for each variant and size."""
    cells = []
    for name in IN_SMALL if small else VARIANTS:
        for side in SIDES[:2] if small else SIDES:
            c = encoder(name, square(side), num_layers=1)
            c.data.sources = {"main": {"kind": "digits"}}
            c.train.batch_size = 1
            cost = StepCost(from_config_dict(c))
            cells.append(Cell({"mixer": name, "tokens": side * side}, experiment=cost))
    return Study(
        title="What a training step costs by mixer and number of patches",
        cells=tuple(cells),
        seeds=(0, 1),
        measures=(),
        columns=("step_ms", "temporary_mib"),
        pictures=(
            Picture("mixer", "step_ms", line="tokens", log_x=True),
            Picture("mixer", "temporary_mib", line="tokens", log_x=True),
        ),
    )
