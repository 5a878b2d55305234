"""What gates do inside a trained model: the measurements of the papers, over a batch of text.

    python eval.py --checkpoint=runs/tiny --probes     JSON and pictures, in runs/tiny/probes

  first_token_fraction  of the attention of later tokens, what goes to their document's first one:
                        the end-of-document token that stands before it, or what comes first of a
                        document that began before the row
                        (F-Attn, the attention sink; arXiv 2505.06708, table 4: 0.467 without a
                        gate, 0.048 with it)
  first_value_norm      of the values of first tokens, their mean norm over that of all others, by
                        key head; near 0 at a sink (value-state drain, arXiv 2410.13835)
  first_residual_norm   the same of the residual stream after a layer; large at a sink
                        (residual-state peak)
  attention_entropy     nats, by position in the document; log(position + 1) would be an even look
                        at everything
  gate_mean             of attention gates and of linear layers' output gates, after the activation
  gate_histogram        the fraction of gates between each two of gate_edges
  max_activation        largest magnitude in the residual stream after a layer (massive activations,
                        M-Act)
  massive_channels      the largest magnitudes of the three channels that have them, after a layer;
                        massive_channel_ids says which channels these are, and median_activation
                        what is usual there (arXiv 2402.17762)
  kurtosis              of the residual stream's entries after a layer; 3 for a normal distribution
  mixer_max_activation, mixer_kurtosis
                        the same of what a mixer adds to the stream: the infinity norm and the
                        kurtosis of attention's output (arXiv 2306.12929, table 1)
  effective_rank        of a head's value-output map W_V W_O: exp(entropy of its singular values)
                        (Roy and Vetterli 2007); with latent attention W_V begins at the latent
  half_life             tokens after which a channel of a linear layer has lost half of its state,
                        by its mean log decay
  expert_load           fraction of the assignments times the number of experts; 1 at balance

Layers `sow` what is measured here into the collection "probes", which costs nothing unless asked
for. `attention_rows.py` computes the first two.
"""

import dataclasses
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
from jaxtyping import Bool, PyTree

from gatedjax.compiler_options import careful_jit
from gatedjax.config import GatedAttentionConfig, MixerConfig, MLAConfig, ModelConfig
from gatedjax.data import Batch
from gatedjax.evaluation.attention_rows import attention_rows
from gatedjax.evaluation.layer_statistics import (
    effective_rank,
    first_norm,
    gate_statistics,
    half_life,
    kurtosis,
    massive_channels,
    max_activation,
)
from gatedjax.layers import mla
from gatedjax.layers.gaussian import distances_as_channels
from gatedjax.layers.logit_scale import alibi_slopes, logit_scale
from gatedjax.layers.normalizer import normalizer_of, numbers_of
from gatedjax.layers.token_info import document_numbers
from gatedjax.model import LanguageModel
from gatedjax.sharding import RULES

# Probe -> layer -> its values; the shapes stand at each function.
Probes = dict[str, dict[int, np.ndarray]]


def measure(
    config: ModelConfig,
    params: PyTree,
    batch: Batch,
    counted: Bool[Array | np.ndarray, "B T"] | None = None,
) -> Probes:
    """All probes that the model's layers have something for.

    Call it inside `jax.set_mesh` where there is a mesh.

    Args:
      config: of the model.
      params: its parameters.
      batch: what it reads.
      counted: the tokens that first_token_fraction is a mean over; None for all.
    """
    found = jax.device_get(_measure(config, params, batch, counted))
    result: Probes = {}
    for block in config.blocks:
        for probe, of_layers in found[block.name].items():
            by_layer = result.setdefault(probe, {})
            for layer, values in zip(block.layers, of_layers):
                by_layer[layer] = np.asarray(values, np.float64)
    return {probe: dict(sorted(by_layer.items())) for probe, by_layer in result.items()}


@functools.partial(careful_jit, static_argnums=0)
def _measure(
    config: ModelConfig,
    params: PyTree,
    batch: Batch,
    counted: Bool[Array | np.ndarray, "B T"] | None = None,
) -> dict[str, dict[str, Array]]:
    """For each block its probes, stacked over the block's layers."""
    with nn.logical_axis_rules(RULES):
        outputs: Any = LanguageModel(config).apply(
            {"params": params},
            batch.tokens,
            batch.positions,
            batch.segment_ids,
            patches=batch.patches,
            mutable=["probes"],
        )
    (_, _, statistics), variables = outputs
    # As the layers see them: an id that comes back is another document.
    numbers = document_numbers(jnp.asarray(batch.segment_ids))
    batch = dataclasses.replace(batch, segment_ids=numbers)
    is_counted = None if counted is None else jnp.asarray(counted)
    result = {}
    for block in config.blocks:
        values = _LayerValues(
            sown=_inside(variables["probes"], block.path),
            mixer_params=_inside(params, block.path).get("mixer", {}),
            statistics=statistics[block.name],
        )
        if not block.is_repeated:
            # Statistics have an axis of layers in any block.
            sown, mixer_params = jax.tree.map(lambda x: x[None], values[:2])
            values = _LayerValues(sown, mixer_params, values.statistics)
        # One layer after the other: the blocks of all of them at once would be larger.
        layer = functools.partial(_layer, block.mixer, batch, is_counted)
        result[block.name] = jax.lax.map(layer, values)
    return result


def _inside(tree: Any, path: tuple[str, ...]) -> Any:
    """What lies there in nested mappings."""
    for name in path:
        tree = tree[name]
    return tree


class _LayerValues(NamedTuple):
    """What the probes of a layer are computed from.

    sown: what the layer sowed.
    statistics: of its feed-forward.
    """

    sown: Mapping[str, Any]
    mixer_params: Mapping[str, Any]
    statistics: Mapping[str, Array]


def _layer(
    mixer: MixerConfig,
    batch: Batch,
    counted: Bool[Array, "B T"] | None,
    values: _LayerValues,
) -> dict[str, Array]:
    """The probes of one layer.

    Args:
      mixer: its configuration.
      batch: what the model read.
      counted: as of `measure`.
      values: what the layer sowed, and its parameters.
    """
    residual = _sown(values.sown, "residual")
    of_mixer = values.sown.get("mixer", {})
    is_real = jnp.asarray(batch.segment_ids > 0)
    result = {
        "max_activation": max_activation(residual, is_real),
        "kurtosis": kurtosis(residual, is_real),
        "first_residual_norm": first_norm(residual[:, :, None], batch.segment_ids)[0],
        **massive_channels(residual, is_real),
    }
    mixer_output = _sown(values.sown, "mixer_output")
    if mixer_output is not None:
        result["mixer_max_activation"] = max_activation(mixer_output, is_real)
        result["mixer_kurtosis"] = kurtosis(mixer_output, is_real)
    # A converted layer (`config/converted.py`) is none of these: its rows are no softmax.
    if type(mixer) is GatedAttentionConfig:
        result |= _attention(mixer, of_mixer, values.mixer_params, batch, counted)
    if isinstance(mixer, MLAConfig):
        result |= _latent_attention(mixer, of_mixer, values.mixer_params, batch, counted)
    gates = _sown(of_mixer, "gates")
    if gates is not None:
        result |= gate_statistics(gates, is_real)
    log_decay = _sown(of_mixer, "log_decay")
    if log_decay is not None:
        result["half_life"] = half_life(log_decay, is_real)
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
    counted: Bool[Array, "B T"] | None,
) -> dict[str, Array]:
    """The probes of an attention layer.

    Args:
      config: of the layer.
      sown: what it sowed.
      params: its parameters.
      batch: what the model read.
      counted: as of `measure`.
    """
    rank = effective_rank(params["value"]["kernel"], params["out"]["kernel"])
    if config.is_doubly_stochastic:
        # Its weights are of whole rows, which exist in no block of queries.
        return {"effective_rank": rank}
    slopes = params.get("alibi_slopes")
    if slopes is None and config.alibi != "none":
        slopes = jnp.asarray(alibi_slopes(config))
    q = _sown(sown, "q")
    k = _sown(sown, "k")
    if config.similarity == "gaussian":
        q, k = distances_as_channels(q, k, logit_scale(config))
    fraction, entropy = attention_rows(
        q,
        k,
        batch.segment_ids,
        batch.positions,
        normalizer=normalizer_of(config),
        normalizer_parameters=numbers_of(params, config),
        window=config.window,
        logits_soft_cap=config.logits_soft_cap,
        scale=logit_scale(config),
        sink_logits=params.get("sink_logits"),
        alibi_slopes=slopes,
        counted=counted,
    )
    return {
        "first_token_fraction": fraction,
        "first_value_norm": first_norm(_sown(sown, "v"), batch.segment_ids),
        "attention_entropy": entropy,
        "effective_rank": rank,
    }


def _latent_attention(
    config: MLAConfig,
    sown: Mapping[str, Any],
    params: Mapping[str, Any],
    batch: Batch,
    counted: Bool[Array, "B T"] | None,
) -> dict[str, Array]:
    """The probes of a layer of latent attention; its value-output maps begin at the latent.

    Args:
      config: of the layer.
      sown: what it sowed.
      params: its parameters.
      batch: what the model read.
      counted: as of `measure`.
    """
    fraction, entropy = attention_rows(
        _sown(sown, "q"),
        _sown(sown, "k"),
        batch.segment_ids,
        batch.positions,
        window=config.window,
        sink_logits=params.get("sink_logits"),
        counted=counted,
        **mla.op_options(config),
    )
    value = params["kv_up"]["kernel"][..., config.nope_dim :]
    return {
        "first_token_fraction": fraction,
        "attention_entropy": entropy,
        "effective_rank": effective_rank(value, params["out"]["kernel"]),
    }


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
