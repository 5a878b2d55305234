"""Attention with a sigmoid gate as its epilogue and a choice of normalizers: grouped heads, windows, packed documents."""

from kernels_pallas.attention.api import attention, attention_step
from kernels_pallas.attention.normalizers.base import (
    Normalizer,
    Relu,
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
from kernels_pallas.attention.normalizers.named import NORMALIZERS
from kernels_pallas.attention.sharded import attention_sharded

__all__ = [
    "NORMALIZERS",
    "AdaptiveTemperature",
    "ClippedSoftmax",
    "Entmax",
    "Normalizer",
    "Relu",
    "ReweightedSoftplus",
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
