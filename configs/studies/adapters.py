"""Adapters beside a frozen encoder: ordinary ones, and a soft mixture of them (Soft-MoA, arXiv
2402.00828).

    python -m gatedjax.study configs/studies/adapters.py [--small]

An encoder of two layers learns to tell five kinds of signals of 40 samples apart. Then it is
frozen, and what is added to it learns five others, for as many steps. Adapters have nearly the same
number of parameters: one bottleneck that every token goes through, or four on slots. Beside them:
the output matrix alone, and the whole encoder.
"""

from typing import Any

from gatedjax.config import from_config_dict, layer
from gatedjax.evidence.adapters import AdapterRun
from gatedjax.study import Cell, Picture, Study
from gatedjax.study.image_mixers import HIDDEN, MNIST1D, encoder

NUM_LAYERS = 2
NUM_CLASSES = 5
FRESH = ("head",)
ADAPTERS = ("*.adapters.*", "*.ffn_norm.*", *FRESH)
# Options of the adapters, and what trains; () for everything.
WAYS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "output matrix": ({}, FRESH),
    "one dense adapter": ({"number": 1, "slots": 0, "hidden": 68}, ADAPTERS),
    "Soft-MoA, 1 slot each": ({"number": 4, "slots": 1, "hidden": 16}, ADAPTERS),
    "Soft-MoA, 4 slots each": ({"number": 4, "slots": 4, "hidden": 15}, ADAPTERS),
    "everything": ({}, ()),
}


def get_study(small: bool) -> Study:
    """A cell for each way."""
    base = from_config_dict(configured(200 if small else 600))
    cells = []
    for name, (options, trains) in WAYS.items():
        c = configured(200 if small else 600)
        c.model.ffns.mlp.adapters.update(options)
        c.optim.trainable = trains
        run = AdapterRun(base, from_config_dict(c))
        cells.append(Cell({"trains": name}, experiment=run))
    return Study(
        title="Adapters beside a frozen encoder",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1),
        measures=(),
        columns=("accuracy", "loss", "trained", "mflop"),
        pictures=(Picture("trains", "accuracy"),),
    )


def configured(steps: int):
    """The encoder without adapters, its signals and its training."""
    c = encoder("softmax", MNIST1D, num_layers=NUM_LAYERS)
    c.model.vocab_size = NUM_CLASSES
    c.model.ffns = {"mlp": layer("mlp", hidden=HIDDEN, activation="gelu")}
    c.model.scan_layers = False
    c.data.sources = {"main": {"kind": "mnist1d"}}
    c.data.images.mean = (0.0,)
    c.data.images.std = (1.0,)
    c.optim.lr = 2e-3
    c.optim.warmup_steps = 30
    c.train.steps = steps
    c.train.batch_size = 32
    return c
