"""What a mixer of an encoder costs by the number of patches: those of `image_mixers.py`.

    taskset -c 0 python -m gatedjax.study configs/studies/image_mixer_costs.py [--small]

Forward and backward of one layer of width 64, for one image of 16 x 16, 32 x 32 and 64 x 64
patches. `cpu_ms` is the time of the process, of all its threads; a busy machine adds little to it.
`temporary_mib` is what the compiled program needs beside parameters, input and gradients.
"""

from gatedjax.config import from_config_dict
from gatedjax.evidence.encoders import MixerCost
from gatedjax.study import Cell, Picture, Study
from gatedjax.study.image_mixers import VARIANTS, encoder, square

SIDES = (16, 32, 64)
IN_SMALL = ("softmax", "gMLP", "lion_s", "mala")
# A QR decomposition of all pairs of 64 x 64 patches takes minutes.
ONLY_SHORT = ("QR",)
# Activator has no mixer.
NAMES = tuple(name for name in VARIANTS if name != "Activator")


def get_study(small: bool) -> Study:
    """A cell for each variant and size."""
    cells = []
    for name in IN_SMALL if small else NAMES:
        is_short = small or name in ONLY_SHORT
        for side in SIDES[:2] if is_short else SIDES:
            c = encoder(name, square(side), num_layers=1)
            c.data.sources = {"main": {"kind": "digits"}}
            cost = MixerCost(from_config_dict(c))
            cells.append(Cell({"mixer": name, "tokens": side * side}, experiment=cost))
    return Study(
        title="What a mixer of patches costs by their number",
        cells=tuple(cells),
        seeds=(0,),
        measures=(),
        columns=("cpu_ms", "temporary_mib"),
        pictures=(
            Picture("mixer", "cpu_ms", line="tokens", log_x=True),
            Picture("mixer", "temporary_mib", line="tokens", log_x=True),
        ),
    )
