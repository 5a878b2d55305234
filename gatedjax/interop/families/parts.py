"""The links of layers that families share, in the names of Llama and its descendants."""

from collections.abc import Iterator

import numpy as np

from gatedjax.config import (
    DeltaAttentionConfig,
    GatedAttentionConfig,
    ModelConfig,
    SparseMoEConfig,
)
from gatedjax.interop.links import Link, at, convolution, matrix, rows, vector
from gatedjax.layers.tree import Path

SCALE = "scale"
KERNEL = "kernel"


def ends(
    model: ModelConfig,
    embedding: str = "model.embed_tokens.weight",
    norm: str = "model.norm.weight",
) -> Iterator[Link]:
    """Embedding, last norm and head."""
    shape = (model.vocab_size, model.width)
    yield vector(embedding, ("embedding",), shape, shape)
    yield vector(norm, ("final_norm", SCALE), (model.width,))
    if not model.tie_embeddings:
        yield vector("lm_head.weight", ("head",), shape, shape)


def norms(
    width: int,
    mixer: str = "input_layernorm.weight",
    ffn: str = "post_attention_layernorm.weight",
) -> Iterator[Link]:
    """The norms before the two halves of a block."""
    yield vector(mixer, ("mixer_norm", SCALE), (width,))
    yield vector(ffn, ("ffn_norm", SCALE), (width,))


def attention(
    c: GatedAttentionConfig,
    width: int,
    tensor: str = "self_attn.",
) -> Iterator[Link]:
    """Softmax attention; a gate that comes with the queries is in their matrix, head by head."""
    channels = 2 * c.head_dim if c.fused_gate else c.head_dim
    of_query = (c.num_heads, channels)
    of_key = (c.kv_heads, c.head_dim)
    yield matrix(f"{tensor}q_proj.weight", ("mixer", "query", KERNEL), (width,), of_query)
    yield matrix(f"{tensor}k_proj.weight", ("mixer", "key", KERNEL), (width,), of_key)
    yield matrix(f"{tensor}v_proj.weight", ("mixer", "value", KERNEL), (width,), of_key)
    heads = (c.num_heads, c.head_dim)
    yield matrix(f"{tensor}o_proj.weight", ("mixer", "out", KERNEL), heads, (width,))
    if c.qk_norm:
        yield vector(f"{tensor}q_norm.weight", ("mixer", "query_norm", SCALE), (c.head_dim,))
        yield vector(f"{tensor}k_norm.weight", ("mixer", "key_norm", SCALE), (c.head_dim,))


def gated_mlp(
    hidden: int,
    width: int,
    tensor: str = "mlp.",
    path: Path = ("ffn",),
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Iterator[Link]:
    """SwiGLU: three matrices.

    Args:
      hidden: channels between them.
      width: of the model.
      tensor: what stands before their names.
      path: of the layer.
      names: of gate, up and down.
    """
    gate, up, down = names
    yield matrix(f"{tensor}{gate}.weight", (*path, "gate", KERNEL), (width,), (hidden,))
    yield matrix(f"{tensor}{up}.weight", (*path, "up", KERNEL), (width,), (hidden,))
    yield matrix(f"{tensor}{down}.weight", (*path, "down", KERNEL), (hidden,), (width,))


def experts(
    c: SparseMoEConfig,
    width: int,
    tensor: str = "mlp.experts.",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Iterator[Link]:
    """The experts, each with matrices of its own on disk, in stacks here."""
    stacks = (("gate", width, c.hidden), ("up", width, c.hidden), ("down", c.hidden, width))
    for expert in range(c.num_experts):
        for name, (stack, inputs, outputs) in zip(names, stacks):
            one = matrix(f"{tensor}{expert}.{name}.weight", ("ffn", stack), (inputs,), (outputs,))
            yield at(one, 0, expert)


def router(
    c: SparseMoEConfig,
    width: int,
    tensor: str = "mlp.gate.weight",
) -> Iterator[Link]:
    """The router's matrix."""
    yield matrix(tensor, ("ffn", "router", KERNEL), (width,), (c.num_experts,))


def delta_ends(
    c: DeltaAttentionConfig,
    width: int,
    tensor: str,
    norm: str = "norm",
    out: str = "out_proj",
) -> Iterator[Link]:
    """What all Gated DeltaNets have in the same shapes: decay, norm and output.

    Args:
      c: of the layer.
      width: of the model.
      tensor: what stands before the names.
      norm: name of the norm.
      out: name of the output projection.
    """
    heads = (c.num_heads, c.value_dim)
    yield vector(f"{tensor}A_log", ("mixer", "a_log"), (c.num_heads,))
    yield vector(f"{tensor}dt_bias", ("mixer", "dt_bias"), (c.num_heads,))
    yield vector(f"{tensor}{norm}.weight", ("mixer", "norm", SCALE), (c.value_dim,))
    yield matrix(f"{tensor}{out}.weight", ("mixer", "out", KERNEL), heads, (width,))


def delta_joint(c: DeltaAttentionConfig, width: int, tensor: str) -> Iterator[Link]:
    """Queries, keys and values in one matrix, one after the other, and in one convolution."""
    keys = (c.key_heads, c.key_dim)
    values = (c.num_heads, c.value_dim)
    key_rows = c.key_heads * c.key_dim
    total = 2 * key_rows + c.num_heads * c.value_dim
    name = f"{tensor}in_proj_qkv.weight"
    yield rows(name, ("mixer", "query", KERNEL), (width,), keys, 0, total)
    yield rows(name, ("mixer", "key", KERNEL), (width,), keys, key_rows, total)
    yield rows(name, ("mixer", "value", KERNEL), (width,), values, 2 * key_rows, total)
    yield convolution(f"{tensor}conv1d.weight", ("mixer", "conv"), c.conv_width, total)


def delta_by_key_head(c: DeltaAttentionConfig, width: int, tensor: str) -> Iterator[Link]:
    """Qwen3-Next's matrices: for each key head its query, key, values and gates in turn.

    A value head reads the key head of its group, so the rows of a key head are [q | k | v of r
    value heads | gates of r], and those of the other matrix [betas of r | decays of r].
    """
    group = c.num_heads // c.key_heads
    of_group = group * c.value_dim
    of_head = 2 * c.key_dim + 2 * of_group
    joint = f"{tensor}in_proj_qkvz.weight"
    shape = (c.key_heads * of_head, width)
    # part: its first row within a key head, and the heads and channels that follow.
    parts = (
        ("query", 0, 1, c.key_dim),
        ("key", c.key_dim, 1, c.key_dim),
        ("value", 2 * c.key_dim, group, c.value_dim),
        ("output_gate", 2 * c.key_dim + of_group, group, c.value_dim),
    )
    for name, first, heads, channels in parts:
        for head in range(c.key_heads):
            begin = head * of_head + first
            view = _heads_of_rows(begin, heads, channels)
            place = (slice(None), slice(head * heads, (head + 1) * heads))
            yield Link(joint, shape, ("mixer", name, KERNEL), view, place)
    small = f"{tensor}in_proj_ba.weight"
    for name, first in (("beta", 0), ("decay", group)):
        for head in range(c.key_heads):
            view = _heads_of_rows(2 * group * head + first, group, 0)
            place = (slice(None), slice(head * group, (head + 1) * group))
            shape = (2 * c.num_heads, width)
            yield Link(small, shape, ("mixer", name, KERNEL), view, place)
    total = 2 * c.key_heads * c.key_dim + c.num_heads * c.value_dim
    yield convolution(f"{tensor}conv1d.weight", ("mixer", "conv"), c.conv_width, total)


def _heads_of_rows(begin: int, heads: int, channels: int):
    """The view of rows from `begin` on, as [M, heads, channels]; as [M, heads] for 0 channels."""

    def view(x: np.ndarray) -> np.ndarray:
        if not channels:
            return x[begin : begin + heads].T
        part = x[begin : begin + heads * channels]
        return part.reshape(heads, channels, -1).transpose(2, 0, 1)

    return view
