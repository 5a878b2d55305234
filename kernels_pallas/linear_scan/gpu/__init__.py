"""The GPU kernels of `linear_scan`: what `api.py` calls. It imports them when it is called."""

from jax import Array

from kernels_pallas.common.gpu import missing_triton
from kernels_pallas.linear_scan.inputs import ScanInputs, ScanOptions


def unsupported(inputs: ScanInputs, options: ScanOptions) -> str | None:
    """Why this backend cannot take a call of `linear_scan`, or None when it can."""
    missing = missing_triton()
    if missing is not None:
        return missing
    from kernels_pallas.linear_scan.gpu import op

    return op.unsupported(inputs, options)


def linear_scan(
    inputs: ScanInputs,
    options: ScanOptions,
    *,
    interpret: bool = False,
) -> tuple[Array, Array | None]:
    """As `op.linear_scan`."""
    from kernels_pallas.linear_scan.gpu import op

    return op.linear_scan(inputs, options, interpret=interpret)
