"""The marks of tests that compile for an NVIDIA GPU that is not here."""

import pytest

from gatedjax.aot.gpu import devices, find_ptxas
from gatedjax.aot.targets import GPUS


def plugin_missing() -> bool:
    try:
        return not devices(GPUS["h200"])
    except RuntimeError:
        return True


needs_cuda_plugin = pytest.mark.skipif(
    plugin_missing(), reason="jax's CUDA plugin is not installed (make test-cuda-aot)"
)
needs_ptxas = pytest.mark.skipif(
    not find_ptxas(), reason="there is no ptxas (pip install nvidia-cuda-nvcc)"
)
