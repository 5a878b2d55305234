"""What gates do inside a trained model: the measurements of the papers, over a batch of text.

    python eval.py --checkpoint=runs/tiny --probes     JSON and pictures, in runs/tiny/probes

  first_token_fraction  of the attention of later tokens, what goes to their document's first one
                        (F-Attn, the attention sink; arXiv 2505.06708, table 4: 0.467 without a
                        gate, 0.048 with it)
  attention_entropy     nats, by position in the document; log(position + 1) would be an even look
                        at everything
  gate_mean             of attention gates and of linear layers' output gates, after the activation
  gate_histogram        the fraction of gates between each two of gate_edges
  max_activation        largest magnitude in the residual stream after a layer (massive activations,
                        M-Act)
  kurtosis              of the residual stream's entries after a layer; 3 for a normal distribution
  effective_rank        of a head's value-output map W_V W_O: exp(entropy of its singular values)
                        (Roy and Vetterli 2007)
  half_life             tokens after which a channel of a linear layer has lost half of its state,
                        by its mean log decay
  expert_load           fraction of the assignments times the number of experts; 1 at balance

Layers `sow` what is measured here into the collection "probes", which costs nothing unless asked
for. No array of T x T exists: queries are taken in blocks.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array
from jaxtyping import Bool, Float, Int, PyTree, Shaped

from gatedjax.compiler_options import careful_jit
from gatedjax.config import GatedAttentionConfig, MixerConfig, ModelConfig
from gatedjax.data import Batch
from gatedjax.layers.attention import normalizer_of
from gatedjax.layers.logit_scale import alibi_slopes, logit_scale
from gatedjax.model import LanguageModel
from gatedjax.sharding import RULES
from kernels_pallas.attention import NORMALIZERS, Normalizer
from kernels_pallas.attention.normalizers.reference import weights

# Probe -> layer -> its values; the shapes stand at each function.
Probes = dict[str, dict[int, np.ndarray]]
# Of histograms of gates.
BINS = 40
# Queries whose logits exist at once.
QUERY_BLOCK = 128


def measure(config: ModelConfig, params: PyTree, batch: Batch) -> Probes:
    """All probes that the model's layers have something for.

    Call it inside `jax.set_mesh` where there is a mesh.
    """
    found = jax.device_get(_measure(config, params, batch))
    result: Probes = {}
    for layer in range(config.num_layers):
        period, index = divmod(layer, config.period)
        for name, stacked in found[index].items():
            by_layer = result.setdefault(name, {})
            by_layer[layer] = np.asarray(stacked[period], np.float64)
    return result


@functools.partial(careful_jit, static_argnums=0)
def _measure(config: ModelConfig, params: PyTree, batch: Batch) -> dict[int, dict[str, Array]]:
    """For each layer of the period its probes, stacked over periods."""
    with nn.logical_axis_rules(RULES):
        outputs: Any = LanguageModel(config).apply(
            {"params": params},
            batch.tokens,
            batch.positions,
            batch.segment_ids,
            mutable=["probes"],
        )
    (_, _, statistics), variables = outputs
    sown = variables["probes"]["periods"]
    result = {}
    for index, name in enumerate(config.block_names):
        mixer, _ = config.layer(index)
        stacked = _LayerValues(
            sown=sown[name],
            mixer_params=params["periods"][name]["mixer"],
            statistics=statistics[name],
        )
        # One period after the other: the blocks of all of them at once would be larger.
        layer = functools.partial(_layer, mixer, batch)
        result[index] = jax.lax.map(layer, stacked)
    return result


class _LayerValues(NamedTuple):
    """What the probes of a layer are computed from.

    sown: what the layer sowed.
    statistics: of its feed-forward.
    """

    sown: Mapping[str, Any]
    mixer_params: Mapping[str, Any]
    statistics: Mapping[str, Array]


def _layer(mixer: MixerConfig, batch: Batch, values: _LayerValues) -> dict[str, Array]:
    """The probes of one layer."""
    residual = _sown(values.sown, "residual")
    of_mixer = values.sown.get("mixer", {})
    is_real = jnp.asarray(batch.segment_ids > 0)
    result = {
        "max_activation": max_activation(residual, is_real),
        "kurtosis": kurtosis(residual, is_real),
    }
    if isinstance(mixer, GatedAttentionConfig):
        result |= _attention(mixer, of_mixer, values.mixer_params, batch)
    gates = _sown(of_mixer, "gates")
    if gates is not None:
        counts, edges = jnp.histogram(gates, BINS)
        result |= {
            "gate_mean": jnp.mean(gates),
            "gate_histogram": counts / gates.size,
            "gate_edges": edges,
        }
    log_decay = _sown(of_mixer, "log_decay")
    if log_decay is not None:
        result["half_life"] = half_life(log_decay)
    if "counts" in values.statistics:
        counts = values.statistics["counts"]
        result["expert_load"] = counts / jnp.sum(counts) * counts.shape[-1]
    return result


def _sown(collection: Mapping[str, Any], name: str) -> Any:
    """What a module, or one inside it, sowed under this name; None if none did."""
    flat: Mapping[tuple[str, ...], Any] = flatten_dict(collection)
    for path, values in flat.items():
        if path[-1] == name:
            # Flax keeps a tuple, with an entry for each call.
            return values[0]
    return None


def _attention(
    config: GatedAttentionConfig,
    sown: Mapping[str, Any],
    params: Mapping[str, Any],
    batch: Batch,
) -> dict[str, Array]:
    """The probes of an attention layer."""
    slopes = params.get("alibi_slopes")
    if slopes is None and config.alibi != "none":
        slopes = jnp.asarray(alibi_slopes(config))
    fraction, entropy = attention_rows(
        _sown(sown, "q"),
        _sown(sown, "k"),
        batch.segment_ids,
        batch.positions,
        normalizer=normalizer_of(config),
        window=config.window,
        logits_soft_cap=config.logits_soft_cap,
        scale=logit_scale(config),
        sink_logits=params.get("sink_logits"),
        alibi_slopes=slopes,
    )
    return {
        "first_token_fraction": fraction,
        "attention_entropy": entropy,
        "effective_rank": effective_rank(params["value"]["kernel"], params["out"]["kernel"]),
    }


class _QueryBlock(NamedTuple):
    """Queries whose logits are computed together: blocks of their rows of a batch."""

    q: Float[Array, "B block H D"]
    segment_ids: Int[Array, "B block"]
    times: Int[Array, "B block"]
    is_first: Bool[Array, "B block"]


class _KeysAndOptions(NamedTuple):
    """What all blocks of queries share."""

    k: Float[Array, "B T Hk D"]
    segment_ids: Int[Array, "B T"]
    is_first: Bool[Array, "B T"]
    sink_logits: Float[Array, " H"] | None
    alibi_slopes: Float[Array, " H"] | None
    normalizer: Normalizer
    window: int | None
    logits_soft_cap: float | None
    scale: float


def attention_rows(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T Hk D"],
    segment_ids: Int[Array | np.ndarray, "B T"],
    positions: Int[Array | np.ndarray, "B T"],
    *,
    normalizer: Normalizer = NORMALIZERS["softmax"],
    window: int | None = None,
    logits_soft_cap: float | None = None,
    scale: float | None = None,
    sink_logits: Float[Array, " H"] | None = None,
    alibi_slopes: Float[Array, " H"] | None = None,
) -> tuple[Float[Array, " H"], Float[Array, " T"]]:
    """Where attention goes: to the first token of the document, and over how many tokens.

    Of the weights on tokens, over their sum: a sink's part counts for nothing, and normalizers that
    do not sum to 1 can be compared.

    Args:
      q, k: as the op gets them, after norm and rotation.
      segment_ids: 0 is padding, which is left out.
      positions: in the document.
      normalizer, window, logits_soft_cap, scale, sink_logits, alibi_slopes: as of
        `kernels_pallas.attention`.

    Returns:
      For each head the fraction of attention that goes to the first token, a mean over all tokens
      that are not first themselves; and by position the entropy in nats, a mean over rows and
      heads, NaN at positions that no token has.
    """
    B, T = segment_ids.shape
    segment_ids = jnp.asarray(segment_ids)
    # A document begins where the id differs from the one before.
    changes = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1)
    is_first = changes != 0
    shared = _KeysAndOptions(
        k=k.astype(jnp.float32),
        segment_ids=segment_ids,
        is_first=is_first,
        sink_logits=sink_logits,
        alibi_slopes=alibi_slopes,
        normalizer=normalizer.for_length(T),
        window=window,
        logits_soft_cap=logits_soft_cap,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )
    times = jnp.broadcast_to(jnp.arange(T), (B, T))
    queries = _QueryBlock(
        q=_in_blocks(q),
        segment_ids=_in_blocks(segment_ids),
        times=_in_blocks(times),
        is_first=_in_blocks(is_first),
    )
    block_rows = functools.partial(_block_rows, shared)
    fractions, entropies = jax.lax.map(block_rows, queries)
    # [blocks, B, block] -> [B, T]
    entropy = jnp.moveaxis(entropies, 0, 1).reshape(B, -1)[:, :T]
    is_real = (segment_ids > 0).astype(jnp.float32)
    followers = jnp.maximum(jnp.sum(is_real * ~is_first), 1.0)
    fraction = jnp.sum(fractions, axis=0) / followers
    return fraction, _mean_by_position(entropy, is_real, jnp.asarray(positions))


def _in_blocks(x: Shaped[Array, "B T *channels"]) -> Shaped[Array, "blocks B block *channels"]:
    """Blocks of QUERY_BLOCK along T as the first axis; zeros, which are padding, fill the last."""
    B, T = x.shape[:2]
    blocks = -(-T // QUERY_BLOCK)
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, blocks * QUERY_BLOCK - T)
    padded = jnp.pad(x, widths)
    cut = padded.reshape(B, blocks, QUERY_BLOCK, *x.shape[2:])
    return jnp.moveaxis(cut, 1, 0)


def _block_rows(
    shared: _KeysAndOptions,
    queries: _QueryBlock,
) -> tuple[Float[Array, " H"], Float[Array, "B block"]]:
    """For the queries of a block: weights on first tokens, summed; mean entropies over heads."""
    logits, is_seen = _block_logits(shared, queries)
    sinks = _by_head(shared.sink_logits)
    p = weights(shared.normalizer, logits, is_seen, sinks)  # [B, H, block, T]
    total = jnp.sum(p, axis=-1, keepdims=True)
    p = p / jnp.maximum(total, 1e-30)
    # Of all first tokens of the row, a query sees that of its own document only.
    is_first_key = shared.is_first[:, None, None, :]
    p_of_first = jnp.where(is_first_key, p, 0.0)
    on_first = jnp.sum(p_of_first, axis=-1)  # [B, H, block]
    is_counted = (queries.segment_ids > 0) & ~queries.is_first
    counted = on_first * is_counted[:, None, :]
    entropy = jnp.mean(_entropy(p), axis=1)
    return jnp.sum(counted, axis=(0, 2)), entropy


def _block_logits(
    shared: _KeysAndOptions,
    queries: _QueryBlock,
) -> tuple[Float[Array, "B H block T"], Bool[Array, "B 1 block T"]]:
    """The logits of a block's queries with all keys, and the mask of what each query sees."""
    B, T, key_heads, _ = shared.k.shape
    block, heads, channels = queries.q.shape[1:]
    # Query heads h and their key head h // (H / Hk), as two axes.
    q = queries.q.astype(jnp.float32)
    q = q.reshape(B, block, key_heads, -1, channels)
    products = jnp.einsum(
        "bqhgd,bkhd->bhgqk",
        q,
        shared.k,
        precision="highest",
    )
    logits = shared.scale * products
    logits = logits.reshape(B, heads, block, T)
    cap = shared.logits_soft_cap
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    # How many tokens a key lies before the query; below 0 it lies after it.
    distance = queries.times[:, None, :, None] - jnp.arange(T)
    slopes = _by_head(shared.alibi_slopes)
    if slopes is not None:
        logits = logits - slopes * jnp.abs(distance)
    query_ids = queries.segment_ids[:, None, :, None]
    key_ids = shared.segment_ids[:, None, None, :]
    is_seen = (distance >= 0) & (query_ids == key_ids)
    if shared.window is not None:
        is_seen = is_seen & (distance < shared.window)
    return logits, is_seen


def _by_head(x: Float[Array, " H"] | None) -> Float[Array, "H 1 1"] | None:
    """One number a head, beside logits [B, H, block, T]."""
    return None if x is None else x.astype(jnp.float32)[:, None, None]


def _entropy(p: Float[Array, "*rows n"]) -> Float[Array, "*rows"]:
    """-sum p log p in nats, where 0 log 0 is 0."""
    is_positive = p > 0
    # A zero inside the log would make the gradient, and the product, NaN.
    log_p = jnp.log(jnp.where(is_positive, p, 1.0))
    terms = jnp.where(is_positive, p * log_p, 0.0)
    return -jnp.sum(terms, axis=-1)


def _mean_by_position(
    x: Float[Array, "B T"],
    is_real: Float[Array, "B T"],
    positions: Int[Array, "B T"],
) -> Float[Array, " T"]:
    """The mean of x over tokens at the same position; NaN where there is none."""

    def sum_by_position(y: Float[Array, "B T"]) -> Float[Array, " T"]:
        zeros = jnp.zeros(y.shape[1], jnp.float32)
        at = zeros.at[positions.reshape(-1)]
        return at.add(y.reshape(-1))

    count = sum_by_position(is_real)
    total = sum_by_position(x * is_real)
    mean = total / jnp.maximum(count, 1.0)
    return jnp.where(count > 0, mean, jnp.nan)


def max_activation(
    x: Float[Array, "B T M"],
    is_real: Bool[Array | np.ndarray, "B T"],
) -> Float[Array, ""]:
    """The largest magnitude at real tokens."""
    magnitudes = jnp.abs(x.astype(jnp.float32))
    return jnp.max(jnp.where(is_real[..., None], magnitudes, 0.0))


def kurtosis(
    x: Float[Array, "B T M"],
    is_real: Bool[Array | np.ndarray, "B T"],
) -> Float[Array, ""]:
    """Fourth central moment over the squared second, over all entries at real tokens.

    Pearson's: 3 for a normal distribution.
    """
    count = jnp.sum(is_real) * x.shape[-1]

    def mean(y: Float[Array, "B T M"]) -> Float[Array, ""]:
        real = jnp.where(is_real[..., None], y, 0.0)
        return jnp.sum(real) / count

    x = x.astype(jnp.float32)
    centered = x - mean(x)
    variance = mean(centered**2)
    return mean(centered**4) / variance**2


def effective_rank(
    value: Float[Array, "M Hk D"],
    out: Float[Array, "H D M"],
) -> Float[Array, " H"]:
    """exp(entropy of normalized singular values) of W_V W_O, head by head; at most D."""
    groups = out.shape[0] // value.shape[1]
    by_key_head = jnp.moveaxis(value, 1, 0)
    values = jnp.repeat(by_key_head, groups, axis=0)  # [H, M, D]
    out_transposed = jnp.swapaxes(out, 1, 2)  # [H, M, D]
    # With W_V = Q R and W_O^T = Q' R', the singular values of W_V W_O are those of R R'^T, D x D.
    r_value = jnp.linalg.qr(values, mode="r")
    r_out = jnp.linalg.qr(out_transposed, mode="r")
    small = r_value @ jnp.swapaxes(r_out, 1, 2)
    singular_values = jnp.linalg.svd(small, compute_uv=False)
    total = jnp.sum(singular_values, axis=-1, keepdims=True)
    return jnp.exp(_entropy(singular_values / total))


def half_life(
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | Float[Array, " H"],
) -> Float[Array, " channels"]:
    """log 2 over the mean of -log_decay, in tokens, for every channel that decays by itself."""
    mean = log_decay.astype(jnp.float32)
    if mean.ndim > 1:
        mean = jnp.mean(mean, axis=(0, 1)).reshape(-1)
    return math.log(2.0) / jnp.maximum(-mean, 1e-12)


def to_json(probes: Probes) -> dict[str, dict[str, Any]]:
    """Plain lists by probe and layer; NaN is null."""
    result = {}
    for name, by_layer in probes.items():
        result[name] = {str(layer): _plain(values.tolist()) for layer, values in by_layer.items()}
    return result


def _plain(x: Any) -> Any:
    if isinstance(x, list):
        return [_plain(item) for item in x]
    return None if math.isnan(x) else x
