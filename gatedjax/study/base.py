"""The small text model that the studies of `configs/studies/` change in one thing at a time."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from gatedjax.config import config_dict, layer

# Of the model, and LENGTH of its windows: a run takes a few minutes on a CPU.
WIDTH = 96
NUM_LAYERS = 4
HEADS = 4
HEAD_DIM = 24
LENGTH = 256


def text_config(
    mixers: Mapping[str, ConfigDict], steps: int, pattern: tuple[str, ...] | None = None
) -> ConfigDict:
    """Four layers of width 96 on the standard library's source: bytes, in windows of 256.

    Args:
      mixers: as `model.mixers`.
      steps: of training, 2,048 tokens each.
      pattern: as `model.pattern`; all mixers in turn unless given.

    Returns:
      The configuration, to be changed further.
    """
    c = config_dict()
    c.model.width = WIDTH
    c.model.num_layers = NUM_LAYERS
    c.model.mixers = dict(mixers)
    c.model.pattern = pattern or tuple(mixers)
    c.model.ffns.mlp.hidden = 256
    c.model.init_std = 0.05
    c.model.dtype = "float32"
    c.model.scan_layers = False
    c.data.seq_len = LENGTH
    c.optim.lr = 3e-3
    c.optim.warmup_steps = 30
    c.train.steps = steps
    c.train.batch_size = 8
    c.train.eval_batches = 32
    return c


def short_config(steps: int) -> ConfigDict:
    """Two layers of gated attention, of width 48, on windows of 128: a run takes seconds on a CPU.

    Args:
      steps: of training, 1,024 tokens each.

    Returns:
      The configuration, to be changed further.
    """
    c = text_config({"attention": attention(num_heads=2, num_kv_heads=2)}, steps)
    c.model.width = WIDTH // 2
    c.model.num_layers = 2
    c.model.ffns.mlp.hidden = 128
    c.data.seq_len = LENGTH // 2
    return c


def attention(**changes: Any) -> ConfigDict:
    """Softmax attention of the base model; gated at its best place unless `changes` differ."""
    values = {"num_heads": HEADS, "num_kv_heads": HEADS, "head_dim": HEAD_DIM}
    return layer("gated_attention", **{**values, **changes})


def linear(**changes: Any) -> ConfigDict:
    """Gated linear attention of the base model, with a short convolution.

    It has half as many key channels as value channels.
    """
    values = {
        "num_heads": HEADS,
        "num_kv_heads": HEADS,
        "key_dim": HEAD_DIM // 2,
        "value_dim": HEAD_DIM,
        "conv_width": 4,
    }
    return layer("gated_linear_attention", **{**values, **changes})


def delta(**changes: Any) -> ConfigDict:
    """The delta rule of the base model, at the sizes of `linear`."""
    values = {
        "num_heads": HEADS,
        "key_dim": HEAD_DIM // 2,
        "value_dim": HEAD_DIM,
        "conv_width": 4,
    }
    return layer("delta_attention", **{**values, **changes})
