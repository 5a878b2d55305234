"""The links of layers that families share, in the names of Llama and its descendants."""

from collections.abc import Iterator

import numpy as np

from gatedjax.config import (
    DeltaAttentionConfig,
    GatedAttentionConfig,
    MLAConfig,
    ModelConfig,
    SparseMoEConfig,
)
from gatedjax.interop.links import Link, at, convolution, matrix, rows, vector
from gatedjax.layers.tree import Path

SCALE = "scale"
KERNEL = "kernel"
BIAS = "bias"


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
    for name, path, outputs in (
        ("q_proj", "query", of_query),
        ("k_proj", "key", of_key),
        ("v_proj", "value", of_key),
    ):
        yield matrix(f"{tensor}{name}.weight", ("mixer", path, KERNEL), (width,), outputs)
        if c.bias != "none":
            yield vector(f"{tensor}{name}.bias", ("mixer", path, BIAS), outputs)
    heads = (c.num_heads, c.head_dim)
    yield matrix(f"{tensor}o_proj.weight", ("mixer", "out", KERNEL), heads, (width,))
    if c.bias == "all":
        yield vector(f"{tensor}o_proj.bias", ("mixer", "out", BIAS), (width,))
    if c.qk_norm:
        together = c.qk_norm_kind == "rms_all_heads"
        of_heads = heads if together else (c.head_dim,)
        of_kv_heads = of_key if together else (c.head_dim,)
        yield vector(f"{tensor}q_norm.weight", ("mixer", "query_norm", SCALE), of_heads)
        yield vector(f"{tensor}k_norm.weight", ("mixer", "key_norm", SCALE), of_kv_heads)
    if c.sinks:
        yield vector(f"{tensor}sinks", ("mixer", "sink_logits"), (c.num_heads,))


def latent_attention(
    c: MLAConfig,
    width: int,
    tensor: str = "self_attn.",
) -> Iterator[Link]:
    """MLA, in DeepSeek's names: keys and values of a head side by side in one matrix."""
    of_query = (c.num_heads, c.key_dim)
    if c.q_rank is None:
        yield matrix(f"{tensor}q_proj.weight", ("mixer", "query", KERNEL), (width,), of_query)
    else:
        low = (c.q_rank,)
        down = ("mixer", "query_down", KERNEL)
        yield matrix(f"{tensor}q_a_proj.weight", down, (width,), low)
        yield vector(f"{tensor}q_a_layernorm.weight", ("mixer", "query_norm", SCALE), low)
        yield matrix(f"{tensor}q_b_proj.weight", ("mixer", "query_up", KERNEL), low, of_query)
    down = ("mixer", "kv_down", KERNEL)
    yield matrix(f"{tensor}kv_a_proj_with_mqa.weight", down, (width,), (c.cached_dim,))
    yield vector(f"{tensor}kv_a_layernorm.weight", ("mixer", "kv_norm", SCALE), (c.kv_rank,))
    of_head = (c.num_heads, c.nope_dim + c.value_dim)
    yield matrix(f"{tensor}kv_b_proj.weight", ("mixer", "kv_up", KERNEL), (c.kv_rank,), of_head)
    heads = (c.num_heads, c.value_dim)
    yield matrix(f"{tensor}o_proj.weight", ("mixer", "out", KERNEL), heads, (width,))


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
    """The experts, each with matrices of its own on disk, in stacks here.

    Args:
      c: of the layer.
      width: of the model.
      tensor: what stands before the number of an expert.
      names: of gate, up and down.
    """
    # On latents, if there are any, all experts work.
    outer = c.latent or width
    stacks = (("gate", outer, c.hidden), ("up", outer, c.hidden), ("down", c.hidden, outer))
    for expert in range(c.num_experts):
        for name, (stack, inputs, outputs) in zip(names, stacks):
            if stack == "gate" and not c.gated:
                continue
            one = matrix(f"{tensor}{expert}.{name}.weight", ("ffn", stack), (inputs,), (outputs,))
            yield at(one, 0, expert)


def router(
    c: SparseMoEConfig,
    width: int,
    tensor: str = "mlp.gate.weight",
) -> Iterator[Link]:
    """The router's matrix."""
    yield matrix(tensor, ("ffn", "router", KERNEL), (width,), (c.num_experts,))


def convolution_with_bias(
    width: int,
    channels: int,
    tensor: str,
    has_bias: bool,
) -> Iterator[Link]:
    """One convolution of all that a linear mixer mixes.

    Args:
      width: taps.
      channels: of all.
      tensor: what stands before the names.
      has_bias: whether there is a bias.
    """
    yield convolution(f"{tensor}weight", ("mixer", "conv"), width, channels)
    if has_bias:
        yield vector(f"{tensor}bias", ("mixer", "conv_bias"), (channels,))


def biased_router(
    c: SparseMoEConfig,
    width: int,
    tensor: str = "mlp.gate.",
) -> Iterator[Link]:
    """The router's matrix, and the bias that only choosing sees: state of ours."""
    yield from router(c, width, f"{tensor}weight")
    state = ("ffn", "router_state", "bias")
    yield vector(f"{tensor}e_score_correction_bias", state, (c.num_experts,))


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


def delta_projections(
    c: DeltaAttentionConfig,
    width: int,
    tensor: str,
    conv_channels: tuple[int, int, int] | None = None,
) -> Iterator[Link]:
    """Queries, keys, values and betas in matrices of their own, in the names of fla.

    Args:
      c: of the layer.
      width: of the model.
      tensor: what stands before the names.
      conv_channels: of the three convolutions, where the files cut them elsewhere.
    """
    keys = (c.key_heads, c.key_dim)
    values = (c.num_heads, c.value_dim)
    for name, path, heads in (("q", "query", keys), ("k", "key", keys), ("v", "value", values)):
        yield matrix(f"{tensor}{name}_proj.weight", ("mixer", path, KERNEL), (width,), heads)
    yield matrix(f"{tensor}b_proj.weight", ("mixer", "beta", KERNEL), (width,), (c.num_heads,))
    of_keys = c.key_heads * c.key_dim
    channels = conv_channels or (of_keys, of_keys, c.num_heads * c.value_dim)
    path = ("mixer", "conv")
    first = 0
    for name, count in zip("qkv", channels):
        weight = f"{tensor}{name}_conv1d.weight"
        yield convolution(weight, path, c.conv_width, count, first)
        first += count


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
