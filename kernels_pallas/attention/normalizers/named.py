"""The normalizers by name, with their papers' parameters."""

from kernels_pallas.attention.normalizers.base import Normalizer, Softmax
from kernels_pallas.attention.normalizers.by_head import CenteredSoftmax, NormalizedPooling
from kernels_pallas.attention.normalizers.entmax import Entmax, LearnedEntmax
from kernels_pallas.attention.normalizers.multipass import (
    AdaptiveTemperature,
    ClippedSoftmax,
    ReweightedSoftplus,
)
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
    ReluFormer,
)

NORMALIZERS: dict[str, Normalizer] = {
    "softmax": Softmax(),
    "sigmoid": Sigmoid(),
    "relu": Relu(),
    "relu_squared": Relu(power=2),
    "softpick": Softpick(),
    "self_adjust": SelfAdjust(),
    "stablemax": StableMax(),
    "softplus": Softplus(),
    "clipped_softmax": ClippedSoftmax(),
    "reweighted_softplus": ReweightedSoftplus(),
    "adaptive_temperature": AdaptiveTemperature(),
    "sparsemax": Entmax(alpha=2.0),
    "entmax": Entmax(alpha=1.5),
    "learned_entmax": LearnedEntmax(),
    "reluformer": ReluFormer(),
    "exp": Exp(),
    "exp_mean": MeanExp(),
    "plain_self_adjust": PlainSelfAdjust(),
    "normalized_pooling": NormalizedPooling(),
    "centered_softmax": CenteredSoftmax(),
}
