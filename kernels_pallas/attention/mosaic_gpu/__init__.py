"""The Hopper kernel of `attention` in Pallas's Mosaic GPU: what `api.py` calls.

It imports Mosaic GPU when it is called: that takes half a second, and jax calls the module
experimental, so it may go.
"""

import importlib.util

import jax

from kernels_pallas.attention.inputs import AttentionInputs, AttentionOptions, Outputs
from kernels_pallas.attention.mosaic_gpu.coverage import unsupported_call

_MODULE = "jax.experimental.pallas.mosaic_gpu"


def unsupported(inputs: AttentionInputs, options: AttentionOptions) -> str | None:
    """Why this backend cannot take a call of `attention`, or None when it can."""
    # Looks for the module without importing it.
    if importlib.util.find_spec(_MODULE) is None:
        return f"needs {_MODULE}, which jax {jax.__version__} does not have"
    return unsupported_call(inputs, options)


def attention(
    inputs: AttentionInputs,
    options: AttentionOptions,
    *,
    interpret: bool = False,
) -> Outputs:
    """As `op.attention`."""
    from kernels_pallas.attention.mosaic_gpu import op

    return op.attention(inputs, options, interpret=interpret)
