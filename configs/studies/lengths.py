"""Trained on windows of 256, read in windows of up to 4,096: who can use more, and who breaks.

    python -m gatedjax.study configs/studies/lengths.py [--small]

arXiv 2505.06708 (table 5): extended by YaRN from 32k to 128k, the gated model loses less (RULER
58.82 against 31.65). Linear layers know no positions and need no extension.
"""

from gatedjax.config import from_config_dict
from gatedjax.study import Cell, Picture, Study
from gatedjax.study.base import LENGTH, attention, linear, text_config

MIXERS = {
    "attention": attention(gate_position="none"),
    "gated attention": attention(),
    "vector decay (GLA)": linear(),
    "constant decay (RetNet)": linear(decay="constant", rope_fraction=1.0),
}


def get_study(small: bool) -> Study:
    lengths = (LENGTH, 512, 1024) if small else (LENGTH, 512, 1024, 2048, 4096)
    names = ("attention", "gated attention", "vector decay (GLA)") if small else tuple(MIXERS)
    cells = []
    for name in names:
        for yarn in (False, True) if "attention" in name else (False,):
            config = from_config_dict(text_config({"mixer": MIXERS[name]}, 250 if small else 400))
            labels = {"mixer": name + (" + YaRN" if yarn else "")}
            cells.append(Cell(labels, config, lengths=lengths, yarn=yarn))
    return Study(
        title=f"Trained on windows of {LENGTH}, evaluated on longer ones",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1, 2),
        measures=("lengths",),
        columns=tuple(f"loss@{T}" for T in lengths),
        pictures=(Picture("window", "loss@", line="mixer", log_x=True),),
    )
