"""PHATGOOSE (arXiv 2402.05859): low-rank experts, each trained by itself on a text of its own, then
its gate; then all of them together on one model.

    python train.py --config=configs/phatgoose.py:expert=runs/base --workdir=runs/expert_a \\
        --config.data.sources.main.kind=text --config.data.sources.main.path=a/
    python train.py --config=configs/phatgoose.py:gate=runs/expert_a --workdir=runs/gate_a \\
        --config.data.sources.main.kind=text --config.data.sources.main.path=a/
    python -m gatedjax.stack_experts --runs=runs/gate_a,runs/gate_b --workdir=runs/stacked

The base is any run with gated MLPs, also an imported one; they become the frozen weights of
mixtures. An expert trains at weight 1; its gate, `sigmoid(<x, v>)` with v = 0 at first, for 100
steps with all else frozen. Stacked, the two experts with the largest normalized <x, v> are taken.

Hardware: what the base needs; only the experts have an optimizer state.
"""

from gatedjax.config import layer
from gatedjax.errors import require
from gatedjax.training.from_run import config_from_run

PHASES = ("expert", "gate")


def get_config(arg: str = ""):
    key = "configs/phatgoose.py"
    phase, _, run = arg.partition("=")
    require(phase in PHASES and bool(run), key, arg, "expert=RUN or gate=RUN")
    c = config_from_run(run)
    kind, new_kind = ("gated_mlp", "lora_mixture")
    kinds = {ffn.kind for ffn in c.model.ffns.values()}
    needed = kind if phase == "expert" else new_kind
    require(needed in kinds, key, f"a run with {sorted(kinds)}", needed)
    c.optim.weight_decay = 0.0
    c.optim.lr = 5e-3
    c.train.sample_tokens = 0
    for name, ffn in c.model.ffns.items():
        if phase == "expert" and ffn.kind == kind:
            require(not ffn.bias, f"{key}: ffns.{name}.bias", ffn.bias, "False")
            c.model.ffns[name] = layer(
                new_kind,
                hidden=ffn.hidden,
                activation=ffn.activation,
                num_experts=1,
                rank=16,
                # Of one expert it is 1.
                gate="xlora",
            )
        elif phase == "gate" and ffn.kind == new_kind:
            c.model.ffns[name].gate = "sigmoid"
    if phase == "expert":
        parts = ("gate", "up", "down")
        c.train.init_rename = tuple(f"*.ffn.{p}.kernel -> *.ffn.{p}.frozen" for p in parts)
        c.train.init_fresh = ("*.ffn.*.lora_a", "*.ffn.*.lora_b", "*.ffn.classifier")
        c.optim.trainable = ("*.lora_a", "*.lora_b")
        c.train.steps = 500
    else:
        c.train.init_fresh = ("*.ffn.*.gates",)
        c.optim.trainable = ("*.ffn.*.gates",)
        c.train.steps = 100
    return c
