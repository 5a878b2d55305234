"""How logits become weights: every causal normalizer at a size for 2 cores, without a gate.

    python -m gatedjax.study configs/studies/normalizers.py [--small]

What the papers say is of models that are orders of magnitude larger: softmax sends much of its
attention to a document's first token, and its residual stream has massive activations; weights that
need not sum to 1 (sigmoid, softpick, exp with a norm) do without that sink; sparse ones (entmax)
reach exact zeros. Trained on windows of 256, each is also evaluated on longer ones. What each costs
is a study of its own, `normalizer_speed.py`: it needs a machine that does nothing else.
"""

from gatedjax.config import from_config_dict
from gatedjax.study import Cell, Picture, Study
from gatedjax.study.base import LENGTH, attention, text_config
from gatedjax.study.normalizers import IN_SMALL, VARIANTS

WINDOWS = (LENGTH, 512, 1024)
WINDOWS_SMALL = (LENGTH, 512)


def get_study(small: bool) -> Study:
    """A cell for each variant."""
    steps = 100 if small else 400
    lengths = WINDOWS_SMALL if small else WINDOWS
    cells = []
    for name in IN_SMALL if small else VARIANTS:
        options = {"gate_position": "none", **VARIANTS[name]}
        config = from_config_dict(text_config({"attention": attention(**options)}, steps))
        cells.append(Cell({"normalizer": name}, config, lengths=lengths))
    return Study(
        title="How logits become weights",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1),
        measures=("validation", "probes", "lengths"),
        columns=(
            "bits_per_byte",
            "first_token_fraction",
            "max_activation",
            *(f"loss@{length}" for length in lengths),
        ),
        pictures=(
            Picture("normalizer", "bits_per_byte"),
            Picture("normalizer", "first_token_fraction"),
        ),
    )
