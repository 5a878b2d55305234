"""How logits become weights: every causal normalizer at a size for 2 cores, without a gate.

    python -m gatedjax.study configs/studies/normalizers.py [--small]

What the papers say is of models that are orders of magnitude larger: softmax sends much of its
attention to a document's first token, and its residual stream has massive activations; weights that
need not sum to 1 (sigmoid, softpick, exp with a norm) do without that sink; sparse ones (entmax)
reach exact zeros. Trained on windows of 256, each is also evaluated on longer ones. `step_ms` is
the mean time of a training step, compilation left out: compare it only between runs that had the
machine alone.
"""

from typing import Any

from gatedjax.config import from_config_dict
from gatedjax.study import Cell, Picture, Study
from gatedjax.study.base import LENGTH, attention, text_config

_OF_LENGTH = dict(normalizer_length=LENGTH)

# Options of the attention layer.
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
WINDOWS = (LENGTH, 512, 1024)
WINDOWS_SMALL = (LENGTH, 512)


def get_study(small: bool) -> Study:
    """A cell for each variant."""
    steps = 100 if small else 400
    lengths = WINDOWS_SMALL if small else WINDOWS
    cells = []
    for name in IN_SMALL if small else VARIANTS:
        options = {"gate_position": "none", **VARIANTS[name]}
        config = from_config_dict(text_config({"attention": attention(**options)}, steps))
        cells.append(Cell({"normalizer": name}, config, lengths=lengths))
    return Study(
        title="How logits become weights",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1),
        measures=("validation", "probes", "lengths", "speed"),
        columns=(
            "bits_per_byte",
            "first_token_fraction",
            "max_activation",
            *(f"loss@{length}" for length in lengths),
            "step_ms",
        ),
        pictures=(
            Picture("normalizer", "bits_per_byte"),
            Picture("normalizer", "first_token_fraction"),
        ),
    )
