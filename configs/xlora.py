"""X-LoRA (arXiv 2402.07148) in its two phases, on a small model of its own: the experts, then the
router that mixes them.

    python train.py --config=configs/xlora.py:base --workdir=runs/xlora_base
    python train.py --config=configs/xlora.py:experts --workdir=runs/xlora_experts
    python train.py --config=configs/xlora.py:router --workdir=runs/xlora_router

The base may be any run of the same sizes; its gated MLPs become the frozen weights of the mixtures.

Hardware: a laptop, 2 cores, a minute each.
"""

from gatedjax.config import config_dict, layer
from gatedjax.errors import require

PHASES = ("base", "experts", "router")


def get_config(arg: str = "experts"):
    require(arg in PHASES, "configs/xlora.py", arg, " or ".join(PHASES))
    c = config_dict()
    c.model.width = 64
    c.model.num_layers = 2
    c.model.mixers = {
        "attention": layer(
            "gated_attention",
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
        ),
    }
    c.model.pattern = ("attention",)
    mixture = layer(
        "lora_mixture",
        hidden=128,
        num_experts=4,
        rank=4,
        gate="xlora",
        first_pass=True,
    )
    c.model.ffns = {
        "mlp": layer("gated_mlp", hidden=128) if arg == "base" else mixture,
    }
    c.model.init_std = 0.05
    c.model.scan_layers = False
    c.model.dtype = "float32"  # CPUs have no fast bfloat16

    c.data.seq_len = 128
    c.optim.lr = 3e-3
    c.train.steps = 200
    c.train.batch_size = 8
    if arg == "experts":
        c.train.init_from = "runs/xlora_base"
        c.train.init_rename = ("*.ffn.*.kernel -> *.ffn.*.frozen",)
        c.train.init_fresh = ("*.lora_a", "*.lora_b", "lora_classifier")
        # At their random start the classifiers weigh all experts about the same.
        c.optim.trainable = ("*.lora_a", "*.lora_b")
    if arg == "router":
        c.train.init_from = "runs/xlora_experts"
        c.optim.trainable = ("lora_classifier",)
    return c
