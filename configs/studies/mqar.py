"""How much a mixer of bounded state can recall, by the size of its state.

    python -m gatedjax.study configs/studies/mqar.py [--small]

Multi-query associative recall: two layers of one mixer each (hybrid: a linear one, then gated
attention), as in arXiv 2312.04927, with a smaller vocabulary and fewer examples; linear mixers have
the short convolution of that study's later version. Linear mixers, and those with the delta rule,
are trained at several key widths: K x V numbers of state in each of the heads of a layer.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from gatedjax.config import config_dict, from_config_dict, layer
from gatedjax.data.recall import RecallConfig
from gatedjax.study import Cell, Picture, Study

WIDTH = 64
HEADS = 2
HEAD_DIM = WIDTH // HEADS

# Attention has solved this one after 600 steps; with 512 tokens and 8 pairs it knew 17 % after 800.
TASK = RecallConfig(
    seq_len=64, vocab_size=128, num_pairs=4, train_examples=64_000, validation_examples=500
)
TRAIN_EXAMPLES_SMALL = 20_000

KEY_DIMS = (4, 16, 64)
KEY_DIMS_SMALL = (4, 16)

ATTENTION_GATES = {"attention": "none", "gated attention": "sdpa"}
DECAYS = {"linear attention": "none", "scalar decay": "scalar", "vector decay (GLA)": "vector"}
# The same decays with the delta rule: a token erases what its key finds before it writes.
DELTA_DECAYS = {"DeltaNet": "none", "Gated DeltaNet": "scalar", "Kimi Delta Attention": "vector"}
DELTA_SMALL = ("Gated DeltaNet",)


def get_study(small: bool) -> Study:
    """Cells of attention, and of each other mixer and the hybrid at several sizes of state."""
    task = TASK
    if small:
        task = dataclasses.replace(TASK, train_examples=TRAIN_EXAMPLES_SMALL)
    steps = 800 if small else 1000
    cells = []
    for name, gate in ATTENTION_GATES.items():
        labels = {"mixer": name, "state": 2 * task.seq_len * WIDTH}
        cells.append(
            cell(
                labels,
                task,
                {"a": attention(gate)},
                ("a", "a"),
                steps,
            )
        )
    for key_dim in KEY_DIMS_SMALL if small else KEY_DIMS:
        # Of the linear layer, for the hybrid.
        state = HEADS * key_dim * HEAD_DIM
        for name, decay in DECAYS.items():
            labels = {"mixer": name, "state": state}
            cells.append(
                cell(
                    labels,
                    task,
                    {"l": linear(key_dim, decay)},
                    ("l", "l"),
                    steps,
                )
            )
        labels = {"mixer": "hybrid", "state": state}
        hybrid = {"l": linear(key_dim, "vector"), "a": attention("sdpa")}
        cells.append(cell(labels, task, hybrid, ("l", "a"), steps))
        for name in DELTA_SMALL if small else DELTA_DECAYS:
            labels = {"mixer": name, "state": state}
            mixers = {"d": delta(key_dim, DELTA_DECAYS[name])}
            cells.append(cell(labels, task, mixers, ("d", "d"), steps))
    return Study(
        title=f"Multi-query associative recall, {task.num_pairs} pairs in {task.seq_len} tokens",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1),
        measures=("recall",),
        columns=("accuracy", "steps"),
        pictures=(Picture("state", "accuracy", line="mixer", log_x=True),),
        stop_at=0.99,
    )


def attention(gate_position: str) -> ConfigDict:
    """Softmax attention."""
    return layer(
        "gated_attention",
        num_heads=HEADS,
        num_kv_heads=HEADS,
        head_dim=HEAD_DIM,
        gate_position=gate_position,
    )


def linear(key_dim: int, decay: str) -> ConfigDict:
    """Linear attention with `key_dim` key channels a head."""
    return layer(
        "gated_linear_attention",
        feature_map="silu",
        num_heads=HEADS,
        num_kv_heads=HEADS,
        key_dim=key_dim,
        value_dim=HEAD_DIM,
        conv_width=4,
        decay=decay,
    )


def delta(key_dim: int, decay: str) -> ConfigDict:
    """The delta rule with `key_dim` key channels a head."""
    return layer(
        "delta_attention",
        num_heads=HEADS,
        key_dim=key_dim,
        value_dim=HEAD_DIM,
        conv_width=4,
        decay=decay,
    )


def cell(
    labels: Mapping[str, str | int],
    task: RecallConfig,
    mixers: dict[str, Any],
    pattern: tuple[str, ...],
    steps: int,
) -> Cell:
    """A model of one layer for each entry of `pattern`.

    Args:
      labels: "mixer", and "state": numbers that a layer keeps of the past.
      task: what it is trained on.
      mixers: as `model.mixers`.
      pattern: as `model.pattern`.
      steps: of training, at most.

    Returns:
      The cell.
    """
    c = config_dict()
    c.model.vocab_size = task.vocab_size
    c.model.width = WIDTH
    c.model.num_layers = len(pattern)
    c.model.mixers = mixers
    c.model.pattern = pattern
    c.model.ffns.mlp.hidden = 2 * WIDTH
    c.model.init_std = 0.05
    c.model.dtype = "float32"
    c.model.scan_layers = False
    c.data.seq_len = task.seq_len
    c.optim.lr = 3e-3
    c.optim.warmup_steps = 50
    c.train.batch_size = 64
    c.train.steps = steps
    c.train.eval_every = 100
    return Cell(labels, from_config_dict(c), recall=task)
