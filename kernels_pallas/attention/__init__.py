"""Attention with a sigmoid gate as its epilogue and a choice of scores: grouped heads, windows, packed documents."""

from kernels_pallas.attention.api import attention, attention_step
from kernels_pallas.attention.normalizers.base import (
    Relu,
    Score,
    SelfAdjust,
    Sigmoid,
    Softmax,
    Softpick,
    Softplus,
    StableMax,
)
from kernels_pallas.attention.normalizers.multipass import (
    AdaptiveTemperature,
    ClippedSoftmax,
    Entmax,
    ReweightedSoftplus,
)
from kernels_pallas.attention.normalizers.named import SCORES
from kernels_pallas.attention.sharded import attention_sharded

__all__ = [
    "SCORES",
    "AdaptiveTemperature",
    "ClippedSoftmax",
    "Entmax",
    "Relu",
    "ReweightedSoftplus",
    "Score",
    "SelfAdjust",
    "Sigmoid",
    "Softmax",
    "Softpick",
    "Softplus",
    "StableMax",
    "attention",
    "attention_sharded",
    "attention_step",
]
