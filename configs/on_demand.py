"""Feed-forwards of which every token has as much as it needs, on a small model: a plain one to
compare with, learners (arXiv 2312.10193), slices and loops (VersatileFFN, arXiv 2512.14531).

    python train.py --config=configs/on_demand.py:base --workdir=runs/base
    python train.py --config=configs/on_demand.py:adaptive
    python train.py --config=configs/on_demand.py:versatile
    python -m gatedjax.make_adaptive --checkpoint=runs/base --workdir=runs/adaptive

Hardware: a laptop, 2 cores, one to three minutes each.
"""

from gatedjax.config import config_dict, layer
from gatedjax.errors import require

KINDS = ("base", "adaptive", "versatile")


def get_config(arg: str = "adaptive"):
    require(arg in KINDS, "configs/on_demand.py", arg, " or ".join(KINDS))
    c = config_dict()
    c.model.width = 64
    c.model.num_layers = 4
    c.model.mixers = {
        "attention": layer(
            "gated_attention",
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
        ),
    }
    c.model.pattern = ("attention",)
    ffns = {
        "base": layer("gated_mlp", hidden=128),
        "adaptive": layer("adaptive_mlp", hidden=128, gated=True, activation="silu"),
        # The temperature is at its end after the run.
        "versatile": layer("versatile_mlp", hidden=128, anneal_steps=600),
    }
    c.model.ffns = {"mlp": ffns[arg]}
    c.model.init_std = 0.05
    c.model.scan_layers = False
    c.model.dtype = "float32"  # CPUs have no fast bfloat16

    c.data.seq_len = 128
    c.optim.lr = 3e-3
    c.train.steps = 600
    c.train.batch_size = 8
    return c
