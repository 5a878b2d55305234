"""The normalizer of an attention layer: how its logits become weights, and what it learns of that.

Learned numbers are one a head. Those of a normalizer's formula go to the op; ReLUFormer's gamma,
which divides all weights of a head, is put on the queries: relu(s / gamma) is relu(s) / gamma.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.config import GatedAttentionConfig
from gatedjax.layers.parameters import parameter
from kernels_pallas.attention import NORMALIZERS, Normalizer

# By normalizer: the parameters of a layer and where they start.
# learned_entmax: alpha = 1 + sigmoid(a). normalized_pooling: gain and bias. centered_softmax: what
# the softmax and the mean are multiplied by.
_OF_OP: dict[str, dict[str, float]] = {
    "learned_entmax": {"entmax_logits": 0.0},
    "normalized_pooling": {"pooling_gain": 1.0, "pooling_bias": 0.0},
    "centered_softmax": {"softmax_weight": 1.0, "center_weight": 1.0},
}


def normalizer_of(c: GatedAttentionConfig) -> Normalizer:
    """The normalizer of `config.normalizer`, with the configuration's parameters."""
    parameters: dict[str, dict[str, Any]] = {
        "sigmoid": {"length": c.normalizer_length},
        "relu": {"length": c.normalizer_length},
        "relu_squared": {"length": c.normalizer_length},
        "clipped_softmax": {"alpha": c.clip_alpha, "length": c.normalizer_length},
        "reweighted_softplus": {"power": c.reweight_power},
        "entmax": {"alpha": c.entmax_alpha},
        "exp": {"cap": c.exp_cap},
        "exp_mean": {"cap": c.exp_cap},
    }
    return dataclasses.replace(NORMALIZERS[c.normalizer], **parameters.get(c.normalizer, {}))


def learned_numbers(module: nn.Module, c: GatedAttentionConfig) -> Float[Array, "P H"] | None:
    """What the op takes as `normalizer_parameters`, from parameters of `module`."""
    starts = _OF_OP.get(c.normalizer, {})
    return numbers_of({name: _by_head(module, c, name, start) for name, start in starts.items()}, c)


def numbers_of(
    params: Mapping[str, Float[Array, " H"]],
    c: GatedAttentionConfig,
) -> Float[Array, "P H"] | None:
    """`learned_numbers` of a layer's parameters; None where the normalizer has none."""
    names = _OF_OP.get(c.normalizer)
    if names is None:
        return None
    numbers = jnp.stack([params[name] for name in names])
    return 1 + jax.nn.sigmoid(numbers) if c.normalizer == "learned_entmax" else numbers


def over_gamma(
    module: nn.Module,
    c: GatedAttentionConfig,
    q: Float[Array, "B T H D"],
) -> Float[Array, "B T H D"]:
    """Queries over ReLUFormer's gamma = exp(g), g = 0 at the start, a parameter of `module`."""
    log_gamma = _by_head(module, c, "log_gamma", 0.0)
    return (q.astype(jnp.float32) * jnp.exp(-log_gamma)[:, None]).astype(q.dtype)


def _by_head(
    module: nn.Module,
    c: GatedAttentionConfig,
    name: str,
    start: float,
) -> Float[Array, " H"]:
    return parameter(
        module,
        name,
        axes=["heads"],
        shape=[c.num_heads],
        init=nn.initializers.constant(start),
    )
