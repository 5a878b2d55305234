"""Rotary positions of queries and keys, after the norm of every head if there is one: one op."""

from kernels_pallas.rotary.api import rotary

__all__ = ["rotary"]
