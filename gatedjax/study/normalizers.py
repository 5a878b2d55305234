"""The ways from logits to weights that two studies compare: what they learn, and what they cost."""

from typing import Any

from gatedjax.study.base import LENGTH

_OF_LENGTH = dict(normalizer_length=LENGTH)

# Options of the attention layer, which has no gate unless they say so.
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax, sinks": dict(sinks=True),
    "softmax, gaussian": dict(similarity="gaussian", qk_norm=False),
    "sigmoid": dict(normalizer="sigmoid", **_OF_LENGTH),
    "relu": dict(normalizer="relu", **_OF_LENGTH),
    "relu, layer norm": dict(normalizer="relu", normalizer_length=1, after_sdpa="layer_norm"),
    "relu squared": dict(normalizer="relu_squared", **_OF_LENGTH),
    "ReLUFormer": dict(normalizer="reluformer"),
    "ReLUFormer, loss": dict(normalizer="reluformer", reluformer_loss=0.01),
    "softpick": dict(normalizer="softpick"),
    "self-adjust": dict(normalizer="self_adjust"),
    "self-adjust, plain": dict(normalizer="plain_self_adjust"),
    "StableMax": dict(normalizer="stablemax"),
    "softplus": dict(normalizer="softplus"),
    "softplus, reweighted": dict(normalizer="reweighted_softplus", reweight_power=3),
    "clipped softmax": dict(normalizer="clipped_softmax", **_OF_LENGTH),
    "adaptive temperature": dict(normalizer="adaptive_temperature"),
    "sparsemax": dict(normalizer="sparsemax"),
    "entmax 1.5": dict(normalizer="entmax"),
    "entmax, learned": dict(normalizer="learned_entmax"),
    "exp / n": dict(normalizer="exp_mean"),
    "exp, RMSNorm": dict(normalizer="exp", after_sdpa="rms_norm"),
    "exp / n, gate": dict(normalizer="exp_mean", gate_position="sdpa", gate_granularity="headwise"),
    "softmax, RMSNorm": dict(after_sdpa="rms_norm"),
    "softmax, SiLU": dict(after_sdpa="silu"),
    "NAP": dict(normalizer="normalized_pooling", after_sdpa="rms_norm"),
    "shaped": dict(normalizer="centered_softmax", value_skip=True),
}
IN_SMALL = (
    "softmax",
    "softpick",
    "ReLUFormer",
    "entmax, learned",
    "exp, RMSNorm",
    "NAP",
    "shaped",
)
