"""The encoder of digits.py with linear attention in both directions in place of softmax.

python train.py --config=configs/linear_digits.py
python train.py --config=configs/linear_digits.py:vig     (or another name of BIDIRECTIONAL:
                                                           lion_d, mala, inline, soft ...)
"""

from gatedjax.config import BIDIRECTIONAL, config_dict, layer
from gatedjax.errors import require


def get_config(name: str = "lion_s"):
    names = ", ".join(BIDIRECTIONAL)
    require(name in BIDIRECTIONAL, "configs/linear_digits.py", name, f"one of {names}")
    c = config_dict()
    c.model.task = "classify"
    c.model.patches.patch_height = 2
    c.model.patches.patch_width = 2
    # Windows of rows and columns have no place for a class token.
    c.model.patches.pooling = "mean" if name == "gated_swin_rmt" else "class_token"
    c.model.width = 64
    c.model.num_layers = 4
    mixer = layer(
        "bidirectional_linear_attention",
        num_heads=4,
        key_dim=16,
        value_dim=16,
        length=17,
        **BIDIRECTIONAL[name],
    )
    c.model.pattern = ("linear",)
    c.model.mixers = {"linear": mixer}
    c.model.ffns = {"mlp": layer("mlp", hidden=256, activation="gelu")}
    c.model.dtype = "float32"  # CPUs have no fast bfloat16

    c.data.sources = {"main": {"kind": "digits"}}
    c.data.seq_len = 16 if name == "gated_swin_rmt" else 17  # patches, and the class token
    c.data.validation_fraction = 0.2
    c.data.images.crop_padding = 1
    c.optim.lr = 2e-3
    c.optim.weight_decay = 0.1
    c.optim.warmup_steps = 100
    c.train.steps = 2000
    c.train.batch_size = 64
    c.train.log_every = 100
    c.train.eval_every = 500
    c.train.eval_batches = 100  # all of them: there are 6
    c.train.checkpoint_every = 1000
    return c
