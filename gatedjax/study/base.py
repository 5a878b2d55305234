"""The small text model that the studies of `configs/studies/` change in one thing at a time."""

from collections.abc import Mapping

from ml_collections import ConfigDict

from gatedjax.config import config_dict, layer

WIDTH, HEADS, HEAD_DIM, LENGTH = 96, 4, 24, 256


def text_config(
    mixers: Mapping[str, ConfigDict], steps: int, pattern: tuple[str, ...] | None = None
) -> ConfigDict:
    """Four layers of width 96 on the standard library's source, bytes, windows of 256; 2,048 tokens
    a step.

    Args:
      mixers: as `model.mixers`; the pattern is all of them in turn unless given.
    """
    c = config_dict()
    c.model.width, c.model.num_layers = WIDTH, 4
    c.model.mixers = dict(mixers)
    c.model.pattern = pattern or tuple(mixers)
    c.model.ffns.mlp.hidden = 256
    c.model.init_std, c.model.dtype, c.model.scan_layers = 0.05, "float32", False
    c.data.seq_len = LENGTH
    c.optim.lr, c.optim.warmup_steps = 3e-3, 30
    c.train.steps, c.train.batch_size, c.train.eval_batches = steps, 8, 32
    return c


def attention(**changes) -> ConfigDict:
    """Softmax attention of the base model; gated at its best place unless `changes` say
    otherwise.
    """
    return layer(
        "gated_attention", num_heads=HEADS, num_kv_heads=HEADS, head_dim=HEAD_DIM, **changes
    )


def linear(**changes) -> ConfigDict:
    """Gated linear attention of the base model: half as many key channels as values, short
    convolution.
    """
    dims = dict(
        num_heads=HEADS, num_kv_heads=HEADS, key_dim=HEAD_DIM // 2, value_dim=HEAD_DIM, conv_width=4
    )
    return layer("gated_linear_attention", **dims | changes)
