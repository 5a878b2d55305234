"""Attention with a sigmoid gate as its epilogue and a choice of scores: grouped heads, windows, packed documents."""

from kernels_pallas.attention.api import attention, attention_step
from kernels_pallas.attention.context import attention_sharded
from kernels_pallas.attention.named_scores import SCORES
from kernels_pallas.attention.scores import Relu, Score, SelfAdjust, Sigmoid, Softmax, Softpick, Softplus, StableMax
from kernels_pallas.attention.scores_multipass import AdaptiveTemperature, ClippedSoftmax, Entmax, ReweightedSoftplus

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
