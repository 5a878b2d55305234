"""What else than softmax at a model's output does to the loss on text.

    python -m gatedjax.study outputs [--small]

Every kind is evaluated as bits of its own probabilities (`gatedjax/output.py`). The Z-loss and
SphereFace2 train no probabilities, and a Fourier head takes bytes for places on a line, which they
are not: none of the three is here.
"""

from gatedjax.config import from_config_dict
from gatedjax.study import Cell, Picture, Study
from gatedjax.study.base import short_config

KINDS = {
    "softmax": "softmax",
    "stablemax": "StableMax",
    "sparsemax": "sparsemax",
    "noisy_softmax": "noisy softmax",
    "vq": "codes (VQ-Logits)",
}


def get_study(small: bool) -> Study:
    """A cell for each kind."""
    cells = []
    for kind, name in KINDS.items():
        c = short_config(steps=200)
        c.model.tie_embeddings = False
        c.model.output.kind = kind
        cells.append(Cell({"output": name}, from_config_dict(c)))
    return Study(
        title="Bits per byte by the kind of output",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1),
        measures=("validation",),
        columns=("bits_per_byte",),
        pictures=(Picture("output", "bits_per_byte"),),
    )
