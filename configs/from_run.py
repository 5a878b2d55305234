"""Trains the model of another run further, with its weights and its tokenizer:

    python train.py --config=configs/from_run.py:runs/qwen3 --workdir=runs/more

What the run was trained on, how, and on how many devices is not taken over: name the text
(`--config.data.sources.main.path=...`) and what else differs. An imported checkpoint is such a
run (docs/import_models.md).

Hardware: what the model needs; parameters, gradients and AdamW's averages take 16 bytes a number.
"""

from pathlib import Path

from gatedjax.config import config_dict, from_config_dict
from gatedjax.errors import require
from gatedjax.training.checkpoint import Checkpointer, named_step
from gatedjax.training.identity import tokenizer_of_run


def get_config(arg: str = ""):
    require(bool(arg), "configs/from_run.py", arg, "a run directory after ':'")
    run_dir, step = named_step(Path(arg).expanduser())
    # Not `read_config`: jax must not start before the command has joined its processes.
    before = from_config_dict(Checkpointer(run_dir, read_only=True).config(step))
    c = config_dict()
    c.model = config_dict(before).model
    # Of a sequence of losses, the gradient finds nothing in memory but the layers' inputs.
    c.model.remat = "full"
    c.data.tokenizer = tokenizer_of_run(run_dir, before.data.tokenizer) or before.data.tokenizer
    c.data.end_of_document = before.data.end_of_document
    c.data.seq_len = before.data.seq_len
    c.optim.lr = 1e-5
    c.train.init_from = arg
    c.train.batch_size = 8
    return c
