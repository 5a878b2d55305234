"""Sparse mixtures of experts.

Routers, experts, their exchange between devices, losses and state.
"""
