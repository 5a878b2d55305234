"""The small models that two studies train on multi-query associative recall."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from gatedjax.config import config_dict, from_config_dict, layer
from gatedjax.data.recall import RecallConfig
from gatedjax.study.grid import Cell

WIDTH = 64
HEADS = 2
HEAD_DIM = WIDTH // HEADS

# Attention has solved this one after 600 steps; with 512 tokens and 8 pairs it knew 17 % after 800.
TASK = RecallConfig(
    seq_len=64, vocab_size=128, num_pairs=4, train_examples=64_000, validation_examples=500
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
