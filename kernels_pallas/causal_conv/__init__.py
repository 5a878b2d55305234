"""Short causal convolutions of single channels, and the SiLU that follows."""

from kernels_pallas.causal_conv.api import causal_conv

__all__ = ["causal_conv"]
