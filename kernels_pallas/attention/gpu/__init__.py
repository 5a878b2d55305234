"""The GPU kernels of `attention`: what `api.py` calls. It imports them when it is called."""

from jax import Array

from kernels_pallas.attention.inputs import (
    AttentionInputs,
    AttentionOptions,
    Outputs,
    StepInputs,
    StepOptions,
)
from kernels_pallas.common.gpu import missing_triton


def unsupported(inputs: AttentionInputs, options: AttentionOptions) -> str | None:
    """Why this backend cannot take a call of `attention`, or None when it can."""
    missing = missing_triton()
    if missing is not None:
        return missing
    from kernels_pallas.attention.gpu import op

    return op.unsupported(inputs, options)


def attention(
    inputs: AttentionInputs,
    options: AttentionOptions,
    *,
    interpret: bool = False,
) -> Outputs:
    """As `op.attention`."""
    from kernels_pallas.attention.gpu import op

    return op.attention(inputs, options, interpret=interpret)


def unsupported_step(inputs: StepInputs, options: StepOptions) -> str | None:
    """Why this backend cannot take a call of `attention_step`, or None when it can."""
    missing = missing_triton()
    if missing is not None:
        return missing
    from kernels_pallas.attention.gpu import step

    return step.unsupported(inputs, options)


def attention_step(
    inputs: StepInputs,
    options: StepOptions,
    *,
    interpret: bool = False,
) -> Array:
    """As `step.attention_step`."""
    from kernels_pallas.attention.gpu import step

    return step.attention_step(inputs, options, interpret=interpret)
