"""What it costs to share output rows among tokens, and what memory it saves.

    python -m gatedjax.study codes [--small]

VQ-Logits (arXiv 2505.10202): a model is trained with a row for every token, k-means makes codes of
the rows, and the model goes on with those. Bits per byte with all rows ("whole") and after as many
steps more ("whole_longer"); with codes "at_once" and after as many steps more ("tuned"): tokens of
one code have equal probabilities. The memory is that of the loss alone, of 1,024 tokens at
width 256 with 32,000 tokens in the vocabulary and the same part of them as codes.

What differs: 288 bytes in place of words; the paper has no public code.
"""

from gatedjax.config import from_config_dict
from gatedjax.study import Cell, Picture, Study
from gatedjax.study.base import short_config
from gatedjax.study.codes import Quantization

CODES = (32, 128)


def get_study(small: bool) -> Study:
    """A cell for each number of codes."""
    cells = []
    for codes in (32,) if small else CODES:
        c = short_config(steps=200)
        c.model.tie_embeddings = False
        labels = {"codes": codes, "steps": c.train.steps}
        experiment = Quantization(from_config_dict(c), codes)
        cells.append(Cell(labels, experiment=experiment))
    return Study(
        title="Codes in place of output rows",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1),
        measures=(),
        columns=("whole", "whole_longer", "at_once", "tuned", "softmax_MiB", "vq_MiB"),
        pictures=(Picture("codes", "tuned", log_x=True),),
    )
