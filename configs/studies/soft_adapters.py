"""Small experts beside frozen feed-forwards (Soft-MoA), and what else adapts an encoder.

    python -m gatedjax.study configs/studies/soft_adapters.py [--small]

An encoder of two layers learns scikit-learn's digits (extra "vision") in 300 steps, and is then
adapted to the digits a quarter turned, in 300 more: by its head and the norms before its
feed-forwards; by these and 4 bottlenecks of 8 channels a layer, softly mixed; by these and the same
bottlenecks, through which every token goes; by these and low-rank updates of its feed-forwards,
about as many parameters; or with all of its parameters.
"""

from ml_collections import ConfigDict

from gatedjax.config import from_config_dict
from gatedjax.evidence.adapted_encoders import AdaptedEncoder
from gatedjax.study import Cell, Picture, Study
from gatedjax.study.image_mixers import DIGITS, encoder

HEAD = ("head", "*.ffn_norm.*")
WAYS = (
    "head",
    "low-rank updates",
    "ordinary adapters",
    "soft mixture of adapters",
    "all parameters",
)


def get_study(small: bool) -> Study:
    """A cell for each way to adapt."""
    base = from_config_dict(configured())
    cells = []
    for way in WAYS:
        run = AdaptedEncoder(base, from_config_dict(adapted(way)))
        cells.append(Cell({"adapted": way}, experiment=run))
    return Study(
        title="An encoder of digits, adapted to digits a quarter turned",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1, 2),
        measures=(),
        columns=("accuracy", "loss", "parameters"),
        pictures=(Picture("adapted", "accuracy"),),
    )


def configured() -> ConfigDict:
    """The encoder, its data and its training."""
    c = encoder("softmax", DIGITS, num_layers=2)
    c.model.scan_layers = False
    c.data.sources = {"main": {"kind": "digits"}}
    c.data.validation_fraction = 0.2
    c.optim.lr = 2e-3
    c.optim.warmup_steps = 30
    c.train.steps = 300
    c.train.batch_size = 32
    return c


def adapted(way: str) -> ConfigDict:
    """The same for the second part."""
    c = configured()
    if way == "all parameters":
        return c
    c.optim.trainable = HEAD
    if way == "low-rank updates":
        c.model.lora.rank = 7
        c.model.lora.targets = ("*.ffn.*",)
    if "adapters" in way:
        c.model.ffns.mlp.adapters.number = 4
        c.model.ffns.mlp.adapters.slots = 0 if way == "ordinary adapters" else 1
        c.model.ffns.mlp.adapters.hidden = 8
        c.optim.trainable = (*HEAD, "*.adapters.*")
    return c
