"""Sparse experts in every layer, on the text of configs/tiny.py: loads kept even by a loss, or by a
bias rule.

    python train.py --config=configs/tiny_moe.py            (the balance loss)
    python train.py --config=configs/tiny_moe.py:bias       (DeepSeek-V3's router: the sigmoid, the
                                                             sign rule)
    python -m gatedjax.reporting.expert_load --workdir=runs/tiny_moe   (the picture of the loads)

Hardware: a laptop, 2 cores, 2 minutes.
"""

from gatedjax.config import config_dict, layer
from gatedjax.errors import require


def get_config(arg: str = "loss"):
    require(arg in ("loss", "bias"), "configs/tiny_moe.py", arg, "loss or bias")
    c = config_dict()
    c.model.width = 128
    c.model.num_layers = 2
    c.model.mixers = {
        "gla": layer(
            "gated_linear_attention",
            num_heads=4,
            num_kv_heads=4,
            key_dim=16,
            value_dim=32,
            conv_width=4,
        ),
        "attention": layer(
            "gated_attention",
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
        ),
    }
    c.model.pattern = ("gla", "attention")
    # 16 experts, 4 of which see a token.
    moe = layer("sparse_moe", num_experts=16, experts_per_token=4, hidden=96, balance_loss=0.05)
    if arg == "bias":
        moe.router.scoring = "sigmoid"
        moe.router.bias_rule = "sign"
        moe.router.bias_rate = 0.003
        moe.balance_loss = 0.0
    c.model.ffns = {"moe": moe}
    c.model.ffn_pattern = ("moe",)
    c.model.init_std = 0.05
    c.model.scan_layers = False
    c.model.dtype = "float32"  # CPUs have no fast bfloat16

    c.data.seq_len = 256
    c.optim.lr = 3e-3
    c.optim.warmup_steps = 30
    c.train.steps = 300
    c.train.batch_size = 8
    c.train.log_every = 5
    c.train.eval_every = 100
    c.train.checkpoint_every = 100
    return c
