"""delta_scan's decoding step in Triton's own interpreter, on CPU and without torch: a program of
its own.

    export TRITON_INTERPRET=1 JAX_PLATFORMS=cpu
    python tests/kernels_pallas/delta_scan/delta_triton_interpreter.py [--plant]

Prints {case: [rel. RMS of o, of the state]} as JSON, against the float64 recurrence. --plant: with
a wrong scale.
"""

import json
import sys

import jax
import ml_dtypes
import numpy as np
from delta_cases import make
from helpers import rel_rms
from triton_stand_in import Tensor

from kernels_pallas.delta_scan import reference
from kernels_pallas.delta_scan.gpu import step as gpu_step
from kernels_pallas.delta_scan.gpu.step_kernel import step_kernel
from kernels_pallas.delta_scan.inputs import DeltaStepInputs, DeltaStepOptions

CASES = {
    "DeltaNet": dict(rank=0),
    "Gated DeltaNet, grouped heads": dict(rank=3, H=4, Hq=2, Hk=1, K=24, V=20),
    "KDA, mixture of decays": dict(rank=4, decay="mixture", K=16, V=40),
    "Gated DeltaNet-2": dict(rank=4, rule="channels", K=24, V=20),
    "Comba": dict(rank=3, rule="comba"),
    "negative eigenvalues": dict(rank=3, beta=2.0),
}


def token(dtype, **case) -> DeltaStepInputs:
    """The first token of a case, its operands in `dtype`, the rest in float32."""
    drawn = {name: x[:, 0] for name, x in make(T=1, **case).items() if name != "initial_state"}
    drawn["state"] = make(T=1, **case)["initial_state"]
    arrays = {name: x.astype(dtype if name in "qkv" else np.float32) for name, x in drawn.items()}
    missing = dict.fromkeys(DeltaStepInputs._fields)
    return DeltaStepInputs(**missing | arrays)


def errors(inputs: DeltaStepInputs, l2_norm: bool, plant: bool) -> list[float]:
    options = DeltaStepOptions(scale=0.3, l2_norm=l2_norm)
    launched = gpu_step.launch(inputs, options._replace(scale=0.3 * (1 + 1e-4 * plant)))
    grid = launched.pop("grid")
    o = np.zeros(inputs.v.shape, inputs.v.dtype)
    arrays = (inputs.state, *gpu_step.rows_of(inputs), o)
    tensors = [Tensor(x.copy()) for x in arrays]
    step_kernel[grid](*tensors, **launched)
    got = tensors[-1].a, tensors[0].a
    with jax.enable_x64(True):
        high = [None if x is None else jax.numpy.asarray(np.asarray(x, np.float64)) for x in inputs]
        want = reference.delta_scan_step(DeltaStepInputs(*high), options)
    return [rel_rms(a, b) for a, b in zip(got, want)]


def main() -> None:
    plant = "--plant" in sys.argv
    found = {}
    for number, (name, case) in enumerate(CASES.items()):
        found[f"{name}, float32"] = errors(token(np.float32, **case), bool(number % 2), plant)
    inputs = token(ml_dtypes.bfloat16, rank=4)
    found["KDA, bfloat16"] = errors(inputs, True, plant)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
