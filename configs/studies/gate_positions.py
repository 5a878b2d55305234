"""Where the gate sits, and what kind it is: the variants of arXiv 2505.06708, tables 1 and 4, at a
size for 2 cores.

    python -m gatedjax.study configs/studies/gate_positions.py [--small]

The paper's findings at 15B parameters, 400B tokens: a gate after the attention (sdpa) lowers
perplexity most (6.026 -> 5.761), and takes first-token attention from 0.467 to 0.048; gates shared
by heads, independent of the input or not sparse do less; largest activations fall from 1053 to 94.
"""

from typing import Any

from gatedjax.config import from_config_dict
from gatedjax.study import Cell, Picture, Study
from gatedjax.study.base import attention, text_config

# Options of the attention layer.
VARIANTS: dict[str, dict[str, Any]] = {
    "none": dict(gate_position="none"),
    "sdpa elementwise": dict(gate_position="sdpa"),
    "sdpa headwise": dict(gate_position="sdpa", gate_granularity="headwise"),
    "sdpa elementwise, shared": dict(gate_position="sdpa", gate_shared=True),
    "sdpa, non-sparse": dict(gate_position="sdpa", gate_activation="ns_sigmoid"),
    "sdpa, input-independent": dict(gate_position="sdpa", gate_input="constant"),
    "sdpa, additive SiLU": dict(gate_position="sdpa", gate_mode="additive", gate_activation="silu"),
    "sdpa, SiLU": dict(gate_position="sdpa", gate_activation="silu"),
    "value elementwise": dict(gate_position="value"),
    "value headwise": dict(gate_position="value", gate_granularity="headwise"),
    "key elementwise": dict(gate_position="key"),
    "query elementwise": dict(gate_position="query"),
    "dense output": dict(gate_position="output"),
}
IN_SMALL = (
    "none",
    "sdpa elementwise",
    "sdpa headwise",
    "sdpa, input-independent",
    "value elementwise",
)


def get_study(small: bool) -> Study:
    """A cell for each variant."""
    steps = 250 if small else 400
    names = IN_SMALL if small else tuple(VARIANTS)
    cells = []
    for name in names:
        mixers = {"attention": attention(**VARIANTS[name])}
        config = from_config_dict(text_config(mixers, steps))
        cells.append(Cell({"gate": name}, config))
    return Study(
        title="Position and kind of the gate",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1, 2),
        measures=("validation", "probes"),
        columns=(
            "bits_per_byte",
            "first_token_fraction",
            "max_activation",
            "kurtosis",
            "gate_mean",
        ),
        pictures=(Picture("gate", "bits_per_byte"), Picture("gate", "first_token_fraction")),
    )
