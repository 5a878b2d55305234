"""Trains the model of another run further, with its weights and its tokenizer:

    python train.py --config=configs/from_run.py:runs/qwen3 --workdir=runs/more

What the run was trained on, how, and on how many devices is not taken over: name the text
(`--config.data.sources.main.path=...`) and what else differs. An imported checkpoint is such a
run (docs/import_models.md).

Hardware: what the model needs; parameters, gradients and AdamW's averages take 16 bytes a number.
"""

from gatedjax.errors import require
from gatedjax.training.from_run import config_from_run


def get_config(arg: str = ""):
    require(bool(arg), "configs/from_run.py", arg, "a run directory after ':'")
    c = config_from_run(arg)
    # The gradient finds nothing in memory but the layers' inputs.
    c.model.remat = "full"
    c.optim.lr = 1e-5
    c.train.batch_size = 8
    return c
