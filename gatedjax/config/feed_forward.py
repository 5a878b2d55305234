"""The configuration of dense feed-forwards."""

from dataclasses import dataclass, field
from typing import Literal

from gatedjax.config.checks import (
    Checked,
    Positive,
    Size,
)
from gatedjax.config.soft_adapters import SoftAdaptersConfig


@dataclass(frozen=True)
class GatedMLPConfig(Checked):
    """Two factors, one behind an activation (arXiv 2002.05202).

    SwiGLU (silu), GEGLU (gelu), ReGLU (relu), GLU (sigmoid), bilinear (identity).
    """

    kind: Literal["gated_mlp"] = "gated_mlp"
    hidden: Size = 256
    # clamped_swiglu: gpt-oss's (u + 1) g sigmoid(1.702 g), where the gate g is at most swiglu_limit
    # and u within +- swiglu_limit
    activation: Literal["silu", "gelu", "relu", "sigmoid", "identity", "clamped_swiglu"] = "silu"
    swiglu_limit: Positive = 7.0
    # of all three matrices
    bias: bool = False
    # one LayerNorm on both factors of the product (Activator, arXiv 2405.15953)
    norm: bool = False
    # small experts beside it, of encoders
    adapters: SoftAdaptersConfig = field(default_factory=SoftAdaptersConfig)
    only_causal = None

    @property
    def not_causal(self) -> str | None:
        """Why a causal model cannot have this feed-forward, or None."""
        return self.adapters.not_causal


@dataclass(frozen=True)
class MLPConfig(Checked):
    """Two matrices and no gate: `activation(x W_up) W_down`. Nemotron-H has the squared ReLU."""

    kind: Literal["mlp"] = "mlp"
    hidden: Size = 512
    # relu_squared: arXiv 2109.08668
    activation: Literal["relu_squared", "gelu", "silu"] = "relu_squared"
    # of both matrices
    bias: bool = False
    # Activations a become gain a sigmoid((a - threshold) / temperature), with a learned gain and
    # threshold of every neuron; hard: gain a where a > threshold, 0 elsewhere (arXiv 2602.11726)
    neuron_gate: Literal["none", "soft", "hard"] = "none"
    neuron_temperature: Positive = 0.1
    # small experts beside it, of encoders
    adapters: SoftAdaptersConfig = field(default_factory=SoftAdaptersConfig)
    only_causal = None

    @property
    def not_causal(self) -> str | None:
        """Why a causal model cannot have this feed-forward, or None."""
        return self.adapters.not_causal


@dataclass(frozen=True)
class NoFeedForwardConfig(Checked):
    """A block that is a mixer alone, as Mamba-2's."""

    kind: Literal["none"] = "none"
    not_causal = None  # no token sees a later one
    only_causal = None
