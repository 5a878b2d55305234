"""The normalizer of an attention layer: how its logits become weights."""

import dataclasses
from typing import Any

from gatedjax.config import GatedAttentionConfig
from kernels_pallas.attention import NORMALIZERS, Normalizer


def normalizer_of(c: GatedAttentionConfig) -> Normalizer:
    """The normalizer of `config.normalizer`, with the configuration's parameters."""
    parameters: dict[str, dict[str, Any]] = {
        "sigmoid": {"length": c.normalizer_length},
        "relu": {"length": c.normalizer_length},
        "relu_squared": {"length": c.normalizer_length},
        "clipped_softmax": {"alpha": c.clip_alpha, "length": c.normalizer_length},
        "reweighted_softplus": {"power": c.reweight_power},
        "entmax": {"alpha": c.entmax_alpha},
    }
    return dataclasses.replace(NORMALIZERS[c.normalizer], **parameters.get(c.normalizer, {}))
