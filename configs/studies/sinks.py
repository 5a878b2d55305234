"""An attention sink that forms in minutes, and what keeps it away: gates, learned sinks, weights
that need not sum to 1.

    python -m gatedjax.study configs/studies/sinks.py [--small]

Bigram-Backcopy (arXiv 2410.13835): at a few trigger tokens the token before them is copied, all
others follow a table of bigrams, which the embedding and the head know without attention. The
copying head is dormant there. With softmax it has to look somewhere, and comes to look at the first
token, whose value it drains. There is no MLP, which could take back what a dormant head adds.
"""

from typing import Any

from gatedjax.config import config_dict, from_config_dict, layer
from gatedjax.data.recall import RecallConfig
from gatedjax.study import Cell, Picture, Study

WIDTH = 64
TASK = RecallConfig(
    task="bigram_backcopy",
    seq_len=32,
    vocab_size=64,
    num_pairs=3,
    train_examples=1_000_000,
    validation_examples=64,
)
# Options of the attention layer.
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": dict(gate_position="none"),
    "softmax, gate by head": dict(gate_granularity="headwise"),
    "softmax, gate by channel": dict(),
    "softmax, learned sink": dict(gate_position="none", sinks=True),
    "softpick": dict(gate_position="none", normalizer="softpick"),
    "relu": dict(gate_position="none", normalizer="relu", normalizer_length=32),
}
IN_SMALL = ("softmax", "softmax, gate by head", "softmax, gate by channel")
LR = 3e-3
# At this one, only what IN_SMALL names.
HIGH_LR = 1e-2


def get_study(small: bool) -> Study:
    """A cell for each variant, and some at a higher rate."""
    plan = [(name, LR) for name in (IN_SMALL if small else VARIANTS)]
    if not small:
        plan += [(name, HIGH_LR) for name in IN_SMALL]
    cells = [cell({"attention": name, "lr": lr}, VARIANTS[name], lr) for name, lr in plan]
    return Study(
        title="Attention sinks on Bigram-Backcopy, one layer",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1, 2),
        measures=("sinks",),
        columns=(
            "dormant_on_first",
            "active_on_first",
            "value_norm",
            "residual_norm",
            "max_activation",
            "massive",
            "gate_dormant",
            "gate_active",
            "copy_accuracy",
            "excess_loss",
        ),
        pictures=(
            Picture("attention", "dormant_on_first", line="lr"),
            Picture("attention", "value_norm", line="lr"),
        ),
    )


def cell(labels: dict[str, str | float], options: dict[str, Any], lr: float) -> Cell:
    """A model of one layer and one head on the task.

    Args:
      labels: of the cell.
      options: of the attention layer.
      lr: the learning rate.
    """
    c = config_dict()
    c.model.vocab_size = TASK.vocab_size
    c.model.width = WIDTH
    c.model.num_layers = 1
    attention = layer(
        "gated_attention",
        num_heads=1,
        num_kv_heads=1,
        head_dim=WIDTH,
        qk_norm=False,
        **options,
    )
    c.model.mixers = {"attention": attention}
    c.model.pattern = ("attention",)
    c.model.ffns = {"none": layer("none")}
    c.model.ffn_pattern = ("none",)
    c.model.tie_embeddings = False
    c.model.init_std = 0.05
    c.model.dtype = "float32"
    c.model.scan_layers = False
    c.data.seq_len = TASK.seq_len
    c.optim.lr = lr
    c.optim.warmup_steps = 50
    c.train.batch_size = 32
    c.train.steps = 1000
    return Cell(labels, from_config_dict(c), recall=TASK)
