"""Sparse mixtures of experts: routers, experts, their exchange between devices, losses and state."""
