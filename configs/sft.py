"""Supervised fine-tuning: a model learns the answers of conversations, with all of its weights or
with low-rank updates of them (LoRA).

    python train.py --config=configs/sft.py:lora=runs/base --workdir=runs/sft \\
        --config.data.sources.main.path=chats.jsonl

`full=RUN` or `lora=RUN`, where RUN is the run directory of the model, also an imported one: its
sizes and its tokenizer are taken from there. Without RUN, the default model from its random start.
docs/fine_tuning.md says what is learned.

Hardware: what training RUN's model needs. The model of configs/tiny.py: a laptop, 2 cores, minutes.
"""

from gatedjax.config import config_dict
from gatedjax.errors import require
from gatedjax.training.from_run import config_from_run

METHODS = ("full", "lora")


def get_config(arg: str = "full"):
    method, _, run_dir = arg.partition("=")
    require(method in METHODS, "configs/sft.py", arg, "full=RUN or lora=RUN")
    c = config_from_run(run_dir) if run_dir else config_dict()
    c.data.sources.main.kind = "chat"
    c.data.seq_len = 1024
    c.optim.lr = 1e-5
    c.optim.weight_decay = 0.0
    c.optim.final_lr_fraction = 0.0
    c.train.steps = 200
    c.train.batch_size = 8
    c.train.eval_every = 50
    c.train.sample_tokens = 0  # what it learned is no text to go on with
    if method == "lora":
        c.model.lora.rank = 16
        c.model.lora.alpha = 32.0
        c.model.lora.targets = ("*.mixer.*", "*.ffn.*")
        c.optim.lr = 2e-4
        if run_dir:
            c.train.init_fresh = ("*.lora.*",)
    return c
