"""What gates do inside a trained model: the measurements of the papers, over a batch of text.

    python eval.py --checkpoint=runs/tiny --probes            JSON and a picture of each, in runs/tiny/probes

  first_token_fraction   of the attention of later tokens, what goes to their document's first one (F-Attn, the attention
                      sink; arXiv 2505.06708, table 4: 0.467 without a gate, 0.048 with it)
  attention_entropy   nats, by position in the document; log(position + 1) would be an even look at everything
  gate_mean           of the scores of attention gates and linear layers' output gates; gate_histogram: the share of
                      scores between each two of gate_edges
  max_activation      largest magnitude in the residual stream after a layer (massive activations, M-Act)
  kurtosis            of the residual stream's entries after a layer; 3 for a normal distribution
  effective_rank      of a head's value-output map W_V W_O: exp(entropy of its singular values) (Roy and Vetterli 2007)
  half_life           tokens after which a channel of a linear layer has lost half of its state, by its mean log decay
  expert_load         share of the assignments times the number of experts; 1 at balance

Layers hand out what is measured here by `sow`ing it into the collection "probes", which costs nothing unless asked
for. No array of T x T exists: queries are taken in blocks.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from gatedjax.compiler_options import careful_jit
from gatedjax.config import GatedAttentionConfig, ModelConfig
from gatedjax.data import Batch
from gatedjax.layers.attention import normalizer_of
from gatedjax.layers.logit_scale import alibi_slopes, logit_scale
from gatedjax.model import LanguageModel
from gatedjax.sharding import RULES
from kernels_pallas.attention import NORMALIZERS, Normalizer
from kernels_pallas.attention.normalizers.reference import weights

Probes = dict[str, dict[int, np.ndarray]]  # probe -> layer -> its values; shapes at each function
BINS = 40  # of histograms of gate scores
QUERY_BLOCK = 128


def measure(config: ModelConfig, params, batch: Batch) -> Probes:
    """All probes that the model's layers have something for. Call it inside `jax.set_mesh` where there is a mesh."""
    found = jax.device_get(_measure(config, params, batch))
    result: Probes = {}
    for i, probes in found.items():
        for name, stacked in probes.items():
            for period, values in enumerate(stacked):
                result.setdefault(name, {})[period * config.period + i] = np.asarray(
                    values, np.float64
                )
    return {name: dict(sorted(layers.items())) for name, layers in result.items()}


@functools.partial(careful_jit, static_argnums=0)
def _measure(config: ModelConfig, params, batch: Batch) -> dict[int, dict[str, Array]]:
    """For each layer of the period its probes, stacked over periods."""
    with nn.logical_axis_rules(RULES):
        (_, _, statistics), sown = LanguageModel(config).apply(
            {"params": params}, batch.tokens, batch.positions, batch.segment_ids, mutable=["probes"]
        )
    result = {}
    for i in range(config.period):
        name = f"layer_{i}"
        probes, of_layer = sown["probes"]["periods"][name], params["periods"][name]
        # One period after the other: the blocks of all of them at once would be larger.
        layer = functools.partial(_layer, config.layer(i)[0], batch)
        result[i] = jax.lax.map(layer, (probes, of_layer["mixer"], statistics[name]))
    return result


def _layer(mixer, batch: Batch, of_layer: tuple[dict, dict, dict]) -> dict[str, Array]:
    """The probes of one layer, from what it sowed, its mixer's parameters and its feed-forward's statistics."""
    sown, params, statistics = of_layer
    (residual,), inside = sown["residual"], sown.get("mixer", {})
    real = batch.segment_ids > 0
    result = {
        "max_activation": max_activation(residual, real),
        "kurtosis": kurtosis(residual, real),
    }
    if isinstance(mixer, GatedAttentionConfig):
        share, entropy = _attention(mixer, inside, params, batch)
        result |= {"first_token_fraction": share, "attention_entropy": entropy}
        result["effective_rank"] = effective_rank(
            params["value"]["kernel"], params["out"]["kernel"]
        )
    scores = inside.get("gates")
    if scores:
        counts, edges = jnp.histogram(scores[0], BINS)
        result |= {
            "gate_mean": jnp.mean(scores[0]),
            "gate_histogram": counts / scores[0].size,
            "gate_edges": edges,
        }
    if "log_decay" in inside:
        result["half_life"] = half_life(*inside["log_decay"])
    if "counts" in statistics:
        counts = statistics["counts"]
        result["expert_load"] = counts / jnp.sum(counts) * counts.shape[-1]
    return result


def _attention(c: GatedAttentionConfig, inside: dict, params: dict, batch: Batch):
    """`attention_rows` of a layer."""
    slopes = params.get("alibi_slopes", None if c.alibi == "none" else jnp.asarray(alibi_slopes(c)))
    by_head = dict(sink_logits=params.get("sink_logits"), alibi_slopes=slopes)
    options = dict(
        normalizer=normalizer_of(c),
        window=c.window,
        logits_soft_cap=c.logits_soft_cap,
        scale=logit_scale(c),
    )
    return attention_rows(
        *inside["q"], *inside["k"], batch.segment_ids, batch.positions, **by_head, **options
    )


def attention_rows(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T Hk D"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    *,
    normalizer: Normalizer = NORMALIZERS["softmax"],
    window: int | None = None,
    logits_soft_cap: float | None = None,
    scale: float | None = None,
    sink_logits: Float[Array, "H"] | None = None,
    alibi_slopes: Float[Array, "H"] | None = None,
) -> tuple[Float[Array, "H"], Float[Array, "T"]]:
    """Share of each head's attention that goes to the first token of the document, and entropy (nats) by position.

    Of the weights on tokens, over their sum: a sink's part counts for nothing, and normalizers that do not sum to 1 compare.
    The share is a mean over all tokens that are not first themselves; the entropy one over rows and heads (NaN at
    positions that no token has). Padding (segment 0) is left out. Arguments as `kernels_pallas.attention`.
    """
    B, T = q.shape[:2]
    blocks = -(-T // QUERY_BLOCK)
    pad = lambda x: jnp.pad(x, [(0, 0), (0, blocks * QUERY_BLOCK - T)] + [(0, 0)] * (x.ndim - 2))
    cut = lambda x: jnp.moveaxis(pad(x).reshape(B, blocks, QUERY_BLOCK, *x.shape[2:]), 1, 0)
    times = jnp.broadcast_to(jnp.arange(T), (B, T))
    starts = (
        jnp.concatenate([jnp.ones_like(segment_ids[:, :1]), jnp.diff(segment_ids, axis=1)], 1) != 0
    )
    normalizer, scale = normalizer.for_length(T), q.shape[-1] ** -0.5 if scale is None else scale
    by_head = lambda x: None if x is None else x.astype(jnp.float32)[:, None, None]

    def block(x):
        q, segments, rows, first = x  # [B, b, ...]
        groups = q.astype(jnp.float32).reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
        s = scale * jnp.einsum(
            "bqhgd,bkhd->bhgqk", groups, k.astype(jnp.float32), precision="highest"
        )
        s = s.reshape(B, q.shape[2], QUERY_BLOCK, T)
        s = s if logits_soft_cap is None else logits_soft_cap * jnp.tanh(s / logits_soft_cap)
        lag = (rows[:, :, None] - jnp.arange(T))[:, None]
        s = s if alibi_slopes is None else s - by_head(alibi_slopes) * jnp.abs(lag)
        seen = (lag >= 0) & (segments[:, None, :, None] == segment_ids[:, None, None])
        seen = seen if window is None else seen & (lag < window)
        p = weights(normalizer, s, seen, by_head(sink_logits))
        p = p / jnp.maximum(jnp.sum(p, -1, keepdims=True), 1e-30)
        share = jnp.sum(jnp.where(starts[:, None, None], p, 0.0), -1)  # [B, H, b]
        entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), -1)
        counted = (segments > 0) & ~first
        return jnp.sum(share * counted[:, None], (0, 2)), entropy.mean(1)

    shares, entropies = jax.lax.map(block, (cut(q), cut(segment_ids), cut(times), cut(starts)))
    entropy = jnp.moveaxis(entropies, 0, 1).reshape(B, -1)[:, :T]
    real = (segment_ids > 0).astype(jnp.float32)
    at = lambda x: jnp.zeros(T, jnp.float32).at[positions.reshape(-1)].add(x.reshape(-1))
    count = at(real)
    by_position = jnp.where(count > 0, at(entropy * real) / jnp.maximum(count, 1.0), jnp.nan)
    return shares.sum(0) / jnp.maximum(jnp.sum(real * ~starts), 1.0), by_position


def max_activation(x: Float[Array, "B T M"], real: Array) -> Float[Array, ""]:
    """The largest magnitude at real tokens."""
    return jnp.max(jnp.where(real[..., None], jnp.abs(x.astype(jnp.float32)), 0.0))


def kurtosis(x: Float[Array, "B T M"], real: Array) -> Float[Array, ""]:
    """Fourth central moment over the squared second, over all entries at real tokens (Pearson's: 3 if normal)."""
    x, count = x.astype(jnp.float32), jnp.sum(real) * x.shape[-1]
    mean = lambda y: jnp.sum(jnp.where(real[..., None], y, 0.0)) / count
    centered = x - mean(x)
    return mean(centered**4) / mean(centered**2) ** 2


def effective_rank(value: Float[Array, "M Hk D"], out: Float[Array, "H D M"]) -> Float[Array, "H"]:
    """exp(entropy of normalized singular values) of W_V W_O, head by head; at most D."""
    groups = out.shape[0] // value.shape[1]
    values = jnp.repeat(jnp.moveaxis(value, 1, 0), groups, axis=0)  # [H, M, D]
    # W_V = Q R: singular values of W_V W_O are those of a small D x D product.
    small = jnp.linalg.qr(values, mode="r") @ jnp.swapaxes(
        jnp.linalg.qr(jnp.swapaxes(out, 1, 2), mode="r"), 1, 2
    )
    s = jnp.linalg.svd(small, compute_uv=False)
    p = s / jnp.sum(s, -1, keepdims=True)
    return jnp.exp(-jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), -1))


def half_life(
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | Float[Array, "H"],
) -> Float[Array, "H*K"]:
    """log 2 over the mean of -log_decay, in tokens, for every channel that decays by itself."""
    g = log_decay.astype(jnp.float32)
    return math.log(2.0) / jnp.maximum(
        -(g if g.ndim == 1 else jnp.mean(g, (0, 1)).reshape(-1)), 1e-12
    )


def to_json(probes: Probes) -> dict:
    """Plain lists by probe and layer; NaN is null."""
    plain = lambda x: [plain(y) for y in x] if isinstance(x, list) else None if math.isnan(x) else x
    return {
        name: {str(i): plain(x.tolist()) for i, x in layers.items()}
        for name, layers in probes.items()
    }
