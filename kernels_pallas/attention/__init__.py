"""Attention with a sigmoid gate on its output, and a choice of normalizers."""

from kernels_pallas.attention.api import attention, attention_step
from kernels_pallas.attention.merge import merge_attention
from kernels_pallas.attention.normalizers.base import Normalizer, Softmax
from kernels_pallas.attention.normalizers.by_head import CenteredSoftmax, NormalizedPooling
from kernels_pallas.attention.normalizers.entmax import Entmax, LearnedEntmax
from kernels_pallas.attention.normalizers.multipass import (
    AdaptiveTemperature,
    ClippedSoftmax,
    ReweightedSoftplus,
)
from kernels_pallas.attention.normalizers.named import NORMALIZERS
from kernels_pallas.attention.normalizers.singlepass import (
    Relu,
    SelfAdjust,
    Sigmoid,
    Softpick,
    Softplus,
    StableMax,
)
from kernels_pallas.attention.normalizers.unnormalized import (
    Exp,
    MeanExp,
    PlainSelfAdjust,
    ReluEntropy,
    ReluFormer,
)
from kernels_pallas.attention.sharded import attention_sharded

__all__ = [
    "NORMALIZERS",
    "AdaptiveTemperature",
    "CenteredSoftmax",
    "ClippedSoftmax",
    "Entmax",
    "Exp",
    "LearnedEntmax",
    "MeanExp",
    "NormalizedPooling",
    "Normalizer",
    "PlainSelfAdjust",
    "Relu",
    "ReluEntropy",
    "ReluFormer",
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
    "merge_attention",
]
