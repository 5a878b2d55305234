"""How much a mixer of bounded state can recall: multi-query associative recall over the size of the
state.

    python -m gatedjax.study configs/studies/mqar.py [--small]

Two layers of one mixer each (hybrid: a linear one, then gated attention), as in arXiv 2312.04927,
with a smaller vocabulary and fewer examples; linear mixers have the short convolution of that
study's later version. Linear mixers are trained at several key widths: K x V numbers of state in
each of the heads of a layer.
"""

import dataclasses

from gatedjax.config import config_dict, from_config_dict, layer
from gatedjax.data.recall import RecallConfig
from gatedjax.study import Cell, Picture, Study

WIDTH, HEADS = 64, 2
LINEAR = {
    "linear attention": dict(decay="none"),
    "scalar decay": dict(decay="scalar"),
    "vector decay (GLA)": dict(decay="vector"),
}


def get_study(small: bool) -> Study:
    # Attention has solved this one after 600 steps; with 512 tokens and 8 pairs it knew 17 % after
    # 800.
    task = RecallConfig(
        seq_len=64, vocab_size=128, num_pairs=4, train_examples=20_000, validation_examples=500
    )
    task = task if small else dataclasses.replace(task, train_examples=64_000)
    key_dims = (4, 16) if small else (4, 16, 64)
    cells = []
    for name, gate in (("attention", "none"), ("gated attention", "sdpa")):
        cells.append(
            cell(name, 2 * task.seq_len * WIDTH, task, {"a": attention(gate)}, ("a", "a"), small)
        )
    for K in key_dims:
        state = HEADS * K * WIDTH // HEADS
        for name, options in LINEAR.items():
            cells.append(cell(name, state, task, {"l": linear(K, options)}, ("l", "l"), small))
        hybrid = {"l": linear(K, LINEAR["vector decay (GLA)"]), "a": attention("sdpa")}
        cells.append(cell("hybrid", state, task, hybrid, ("l", "a"), small))
    return Study(
        title=f"Multi-query associative recall, {task.num_pairs} pairs in {task.seq_len} tokens",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1),
        measures=("recall",),
        columns=("accuracy", "steps"),
        pictures=(Picture("state", "accuracy", line="mixer", log_x=True),),
        stop_at=0.99,
    )


def attention(gate: str):
    head_dim = WIDTH // HEADS
    return layer(
        "gated_attention",
        num_heads=HEADS,
        num_kv_heads=HEADS,
        head_dim=head_dim,
        gate_position=gate,
    )


def linear(key_dim: int, options: dict):
    dims = dict(
        num_heads=HEADS, num_kv_heads=HEADS, key_dim=key_dim, value_dim=WIDTH // HEADS, conv_width=4
    )
    return layer("gated_linear_attention", feature_map="silu", **dims, **options)


def cell(
    name: str, state: int, task: RecallConfig, mixers: dict, pattern: tuple, small: bool
) -> Cell:
    """`state`: numbers that a layer keeps of the past (of the linear layer, for the hybrid)."""
    c = config_dict()
    c.model.vocab_size, c.model.width, c.model.num_layers = task.vocab_size, WIDTH, len(pattern)
    c.model.mixers, c.model.pattern = mixers, pattern
    c.model.ffns.mlp.hidden = 2 * WIDTH
    c.model.init_std, c.model.dtype, c.model.scan_layers = 0.05, "float32", False
    c.data.seq_len = task.seq_len
    c.optim.lr, c.optim.warmup_steps = 3e-3, 50
    c.train.batch_size, c.train.steps, c.train.eval_every = 64, 800 if small else 1000, 100
    return Cell({"mixer": name, "state": state}, from_config_dict(c), recall=task)
