"""Softmax attention with a sigmoid gate as its epilogue: grouped heads, windows, packed documents, sinks, soft caps."""

from kernels_pallas.attention.api import attention, attention_step

__all__ = ["attention", "attention_step"]
