"""Gates of neurons on frozen weights: a threshold and a gain each (arXiv 2602.11726).

a' = gain a sigmoid((a - threshold) / temperature)      soft: both learn
a' = gain a [a > threshold]                             hard: for inference
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.config import MLPConfig
from gatedjax.layers.gate_values import record
from gatedjax.layers.parameters import parameter


def neuron_gates(
    a: Float[Array, "... F"],
    threshold: Float[Array, " F"],
    temperature: float,
    form: Literal["soft", "hard"],
) -> Float[Array, "... F"]:
    """Which neurons take part, from 0 to 1, float32.

    Args:
      a: activations.
      threshold: of every neuron.
      temperature: how soft a soft gate is.
      form: soft or hard.
    """
    above = a.astype(jnp.float32) - threshold
    if form == "hard":
        return (above > 0).astype(jnp.float32)
    return jax.nn.sigmoid(above / temperature)


class NeuronGate(nn.Module):
    """The gates, times the gains. Thresholds start at 0, gains at 1."""

    config: MLPConfig

    @nn.compact
    def __call__(self, a: Float[Array, "... F"]) -> Float[Array, "... F"]:
        c = self.config
        axes, shape = ["mlp_bias"], [a.shape[-1]]
        threshold = parameter(self, "threshold", axes, shape, nn.initializers.zeros)
        gain = parameter(self, "gain", axes, shape, nn.initializers.ones)
        form = "hard" if c.neuron_gate == "hard" else "soft"
        gates = neuron_gates(a, threshold, c.neuron_temperature, form)
        record(self, "gates", gates)
        return (gain * gates * a.astype(jnp.float32)).astype(a.dtype)
