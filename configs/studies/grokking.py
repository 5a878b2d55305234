"""What lets a model grok modular addition without weight decay.

    python -m gatedjax.study grokking [--small]

arXiv 2501.04697: cross-entropy over softmax stops teaching once logits are so large that the others
round to nothing, and before that gradients only scale the weights up. StableMax and perpGrad each
take one of the causes away. One layer of attention; a run ends when 0.95 of the held-out pairs are
right, so "steps" says how long that took.

What differs: the paper trains on 40 % of 113 x 113 pairs in full batches, in float32 and float16;
here batches are of 512.
"""

from gatedjax.config import config_dict, from_config_dict, layer
from gatedjax.data.recall import RecallConfig
from gatedjax.study import Cell, Picture, Study

# Name: the kind of output, perpGrad, weight decay.
WAYS = {
    "softmax": ("softmax", False, 0.0),
    "softmax, weight decay 1": ("softmax", False, 1.0),
    "StableMax": ("stablemax", False, 0.0),
    "perpGrad": ("softmax", True, 0.0),
    "StableMax and perpGrad": ("stablemax", True, 0.0),
}
MODULUS = 113
MODULUS_SMALL = 47


def get_study(small: bool) -> Study:
    """A cell for each way."""
    modulus = MODULUS_SMALL if small else MODULUS
    pairs = modulus**2
    train = pairs * (6 if small else 4) // 10
    task = RecallConfig(
        task="modular_addition",
        seq_len=3,
        vocab_size=modulus + 1,
        train_examples=train,
        validation_examples=min(pairs - train, 2000),
    )
    cells = []
    for name, (kind, perpendicular, decay) in WAYS.items():
        c = config_dict()
        c.model.width = 128
        c.model.num_layers = 1
        c.model.mixers.attention = layer(
            "gated_attention",
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            gate_position="none",
        )
        c.model.ffns.mlp.hidden = 256
        c.model.dtype = "float32"
        c.model.scan_layers = False
        c.model.output.kind = kind
        c.data.seq_len = task.seq_len
        c.optim.lr = 1e-3
        c.optim.schedule = "constant"
        c.optim.warmup_steps = 10
        c.optim.beta2 = 0.98
        c.optim.weight_decay = decay
        c.optim.perpendicular = perpendicular
        c.optim.clip_norm = 0.0
        c.train.steps = 2_000
        c.train.batch_size = 512
        c.train.eval_every = 50
        cells.append(Cell({"way": name}, from_config_dict(c), recall=task))
    return Study(
        title="Grokking modular addition",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1, 2),
        measures=("recall",),
        columns=("accuracy", "steps"),
        pictures=(Picture("way", "steps"),),
        stop_at=0.95,
    )
