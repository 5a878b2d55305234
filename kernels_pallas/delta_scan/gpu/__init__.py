"""The GPU kernels of `delta_scan`: what `api.py` calls. It imports them when it is called."""

from jax import Array

from kernels_pallas.common.gpu import missing_triton
from kernels_pallas.delta_scan.inputs import DeltaInputs, DeltaOptions


def unsupported(inputs: DeltaInputs, options: DeltaOptions) -> str | None:
    """Why this backend cannot take a call of `delta_scan`, or None when it can."""
    missing = missing_triton()
    if missing is not None:
        return missing
    from kernels_pallas.delta_scan.gpu import op

    return op.unsupported(inputs, options)


def delta_scan(
    inputs: DeltaInputs,
    options: DeltaOptions,
    *,
    interpret: bool = False,
) -> tuple[Array, Array | None]:
    """As `op.delta_scan`."""
    from kernels_pallas.delta_scan.gpu import op

    return op.delta_scan(inputs, options, interpret=interpret)
