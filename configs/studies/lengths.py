"""Trained on windows of 256, evaluated on windows of up to 4,096: what can use more, what breaks.

    python -m gatedjax.study configs/studies/lengths.py [--small]

arXiv 2505.06708 (table 5): extended by YaRN from 32k to 128k, the gated model loses less (RULER
58.82 against 31.65). Linear layers know no positions and need no extension.
"""

from gatedjax.config import from_config_dict
from gatedjax.study import Cell, Picture, Study
from gatedjax.study.base import LENGTH, attention, delta, linear, text_config

MIXERS = {
    "attention": attention(gate_position="none"),
    "gated attention": attention(),
    "vector decay (GLA)": linear(),
    "constant decay (RetNet)": linear(decay="constant", rope_fraction=1.0),
    "Gated DeltaNet": delta(),
    "Kimi Delta Attention": delta(decay="vector", output_gate="sigmoid"),
}
MIXERS_SMALL = ("attention", "gated attention", "vector decay (GLA)", "Gated DeltaNet")
WITH_YARN = ("attention", "gated attention")

WINDOWS = (LENGTH, 512, 1024, 2048, 4096)
WINDOWS_SMALL = (LENGTH, 512, 1024)


def get_study(small: bool) -> Study:
    """A cell for each mixer; for attention, a second one with YaRN."""
    lengths = WINDOWS_SMALL if small else WINDOWS
    steps = 250 if small else 400
    cells = []
    for name in MIXERS_SMALL if small else MIXERS:
        config = from_config_dict(text_config({"mixer": MIXERS[name]}, steps))
        cells.append(Cell({"mixer": name}, config, lengths=lengths))
        if name in WITH_YARN:
            labels = {"mixer": f"{name} + YaRN"}
            cells.append(Cell(labels, config, lengths=lengths, yarn=True))
    return Study(
        title=f"Trained on windows of {LENGTH}, evaluated on longer ones",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1, 2),
        measures=("lengths",),
        columns=tuple(f"loss@{length}" for length in lengths),
        pictures=(Picture("window", "loss@", line="mixer", log_x=True),),
    )
