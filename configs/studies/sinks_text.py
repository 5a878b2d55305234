"""Attention sinks of a language model on text: with softmax alone, with gates, with a learned sink.

    python -m gatedjax.study configs/studies/sinks_text.py [--small]

`sinks.py` makes a sink in a minute, on a task made for it. This is the case the papers are about: a
model that reads text, large enough and trained for long enough that heads which have nothing to
do look at the first token of a row (arXiv 2410.10781 sees it after a thousand steps or two, with
high learning rates sooner). Windows of 512 bytes of the standard library's source, in bfloat16: a
GPU takes a minute or two for each run. `--small` is a size for two cores, at which no sink forms.
"""

from typing import Any

from gatedjax.config import config_dict, from_config_dict, layer
from gatedjax.study import Cell, Picture, Study

# Options of the attention layers.
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": dict(gate_position="none"),
    "softmax, gate by channel": dict(),
    "softmax, gate by head": dict(gate_granularity="headwise"),
    "softmax, learned sink": dict(gate_position="none", sinks=True),
}
LR = 2e-3
HEAD_DIM = 64


def get_study(small: bool) -> Study:
    """A cell for each variant."""
    cells = []
    for name, options in VARIANTS.items():
        config = text_model(options, small)
        cells.append(Cell({"attention": name}, from_config_dict(config)))
    return Study(
        title="Attention sinks of a language model on text",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1),
        measures=("validation", "probes"),
        columns=(
            "first_token_fraction",
            "max_activation",
            "kurtosis",
            "bits_per_byte",
        ),
        pictures=(
            Picture("attention", "first_token_fraction"),
            Picture("attention", "max_activation"),
        ),
    )


def text_model(options: dict[str, Any], small: bool):
    """Eight layers of width 384; small, two of width 64."""
    heads = 1 if small else 6
    c = config_dict()
    c.model.width = heads * HEAD_DIM
    c.model.num_layers = 2 if small else 8
    attention = layer(
        "gated_attention",
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=HEAD_DIM,
        qk_norm=False,
        **options,
    )
    c.model.mixers = {"attention": attention}
    c.model.pattern = ("attention",)
    c.model.ffns = {"mlp": layer("gated_mlp", hidden=64 if small else 1024)}
    c.model.ffn_pattern = ("mlp",)
    c.model.dtype = "float32" if small else "bfloat16"
    c.model.scan_layers = not small
    c.data.seq_len = 128 if small else 512
    c.optim.lr = LR
    c.optim.warmup_steps = 20 if small else 200
    c.train.steps = 100 if small else 1500
    c.train.batch_size = 4 if small else 32
    c.train.eval_batches = 8
    return c
