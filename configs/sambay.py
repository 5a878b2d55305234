"""SambaY (arXiv 2507.06607), small: a decoder of Mamba and windows, and one that has no cache.

    python train.py --config=sambay
    python train.py --config=sambay:yoco       (cross-attention in place of the memory units)
    python eval.py --checkpoint=runs/sambay    (says what the caches hold, and what they would)

Of L layers, those before L / 2 + 1 are by turns Mamba-2 and attention to a window. Then comes one
layer of full attention, whose keys and values are the only ones of all tokens; then by turns gated
memory units, on what the last Mamba has read, and queries on those keys and values. No positions
are encoded. The paper's scans are Mamba-1; its largest model's attention is differential.

Hardware: a laptop, 2 cores: 2 minutes of CPU, then about 2.2 bits per byte of validation text.
"""

from gatedjax.config import config_dict, layer
from gatedjax.errors import require

VARIANTS = ("sambay", "yoco")
# A multiple of 4.
LAYERS = 8


def get_config(variant: str = "sambay"):
    require(variant in VARIANTS, "configs/sambay.py", variant, " or ".join(VARIANTS))
    c = config_dict()
    c.model.width = 96
    c.model.num_layers = LAYERS
    attention = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 24,
        "gate_position": "none",
        "qk_norm": False,
        "rope_fraction": 0.0,
    }
    scan = {"num_heads": 4, "head_dim": 48}
    c.model.mixers = {
        "mamba": layer("mamba2", state_dim=16, **scan),
        "window": layer("gated_attention", window=64, **attention),
        "full": layer("gated_attention", **attention),
        "cross": layer("gated_attention", shares_cache=True, **attention),
        "memory": layer("gated_memory", **scan),
    }
    half = LAYERS // 2
    c.model.prefix = ("mamba", "window") * (half // 2) + ("mamba", "full")
    c.model.ffn_prefix = ("mlp",) * len(c.model.prefix)
    c.model.pattern = ("memory", "cross") if variant == "sambay" else ("cross",)
    c.model.ffns.mlp.hidden = 256
    c.model.init_std = 0.05
    c.model.scan_layers = False
    c.model.dtype = "float32"  # CPUs have no fast bfloat16

    c.data.seq_len = 256
    c.optim.lr = 3e-3
    c.optim.warmup_steps = 30
    c.train.steps = 300
    c.train.batch_size = 8
    c.train.log_every = 10
    c.train.eval_every = 100
    c.train.checkpoint_every = 100
    return c
