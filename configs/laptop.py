"""Two of three layers gated linear attention, one gated softmax attention, windows of 1024 bytes,
Muon.

    python train.py --config=configs/laptop.py

Hardware: a laptop, 2 cores, about an hour. Seen: 1.449 +- 0.032 bits per byte of validation text
(eval.py, 40 batches) after its 2,000 steps; gzip -9 needs 1.876 (passed after about 1,100 steps),
xz -9e 1.589 (after about 1,650).
"""

from gatedjax.config import config_dict, layer


def get_config():
    c = config_dict()
    c.model.width = 128
    c.model.num_layers = 6
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
    c.model.pattern = ("gla", "gla", "attention")
    c.model.ffns = {"mlp": layer("gated_mlp", hidden=384)}
    c.model.ffn_pattern = ("mlp",)
    c.model.init_std = 0.05
    c.model.scan_layers = False
    c.model.dtype = "float32"  # CPUs have no fast bfloat16

    c.data.seq_len = 1024
    c.optim.name = "muon"
    c.optim.lr = 0.01
    c.optim.schedule = "wsd"
    c.optim.decay_fraction = 0.3
    c.optim.final_lr_fraction = 0.05
    c.optim.warmup_steps = 50
    c.train.steps = 2000
    c.train.batch_size = 4
    c.train.log_every = 20
    c.train.eval_every = 200
    c.train.eval_batches = 16
    c.train.checkpoint_every = 200
    return c
