"""The gated MLPs of a sparse mixture's experts, on rows sorted by expert: one op."""

from kernels_pallas.expert_mlp.api import expert_mlp

__all__ = ["expert_mlp"]
