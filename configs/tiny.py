"""Gated linear and gated softmax attention by turns, with sparse experts, on the standard library's
source.

    python train.py --config=configs/tiny.py        (or: make train)
    python train.py --config=configs/tiny.py:mla    (any other kind of mixer, at its default sizes,
                                                     in place of softmax attention)

Hardware: a laptop, 2 cores: 2 to 4 minutes, then about 2.3 bits per byte of validation text
(Python 3.12.1).
"""

from gatedjax.config import MIXERS, config_dict, layer
from gatedjax.errors import require

# What a model that predicts the next token can have.
CAUSAL = [kind for kind, mixer in MIXERS.items() if getattr(mixer(), "not_causal", None) is None]


def get_config(mixer: str = "gated_attention"):
    require(mixer in CAUSAL, "configs/tiny.py", mixer, f"one of {', '.join(CAUSAL)}")
    sizes = {}
    if mixer == "gated_attention":
        sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    c = config_dict()
    c.model.width = 128
    c.model.num_layers = 4
    c.model.mixers = {
        "gla": layer(
            "gated_linear_attention",
            num_heads=4,
            num_kv_heads=4,
            key_dim=16,
            value_dim=32,
            conv_width=4,
        ),
        "attention": layer(mixer, **sizes),
    }
    c.model.pattern = ("gla", "attention")
    c.model.ffns = {
        "mlp": layer("gated_mlp", hidden=384),
        "moe": layer(
            "sparse_moe",
            num_experts=8,
            experts_per_token=2,
            hidden=128,
            shared_hidden=128,
        ),
    }
    c.model.ffn_pattern = ("mlp", "moe")
    c.model.init_std = 0.05
    c.model.scan_layers = False
    c.model.dtype = "float32"  # CPUs have no fast bfloat16

    c.data.seq_len = 256
    c.optim.lr = 3e-3
    c.optim.warmup_steps = 30
    c.train.steps = 400
    c.train.batch_size = 8
    c.train.log_every = 10
    c.train.eval_every = 100
    c.train.checkpoint_every = 100
    return c
