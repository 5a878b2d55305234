"""linear_scan's decoding step in Triton's own interpreter, on CPU and without torch: a program of
its own.

    export TRITON_INTERPRET=1 JAX_PLATFORMS=cpu
    python tests/kernels_pallas/linear_scan/triton_interpreter.py [--plant]

Prints {case: [rel. RMS of o, of the state]} as JSON, against the float64 recurrence. --plant: with
a wrong scale.
"""

import itertools
import json
import sys

import jax
import ml_dtypes
import numpy as np
from helpers import rel_rms
from triton_stand_in import Tensor

from kernels_pallas.linear_scan import reference
from kernels_pallas.linear_scan.gpu import step as gpu_step
from kernels_pallas.linear_scan.gpu.step_kernel import step_kernel
from kernels_pallas.linear_scan.inputs import StepInputs, StepOptions


def run(
    q, k, v, log_decay, bonus, state, inclusive: bool, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """(o, new state): the kernel as `step` launches it."""
    inputs = StepInputs(q, k, v, log_decay, bonus, state)
    options = gpu_step.launch(inputs, StepOptions(inclusive, scale, normalize=False))
    grid = options.pop("grid")
    rows = (q, k, v, q if log_decay is None else log_decay, q if bonus is None else bonus)
    state, *_, o = tensors = [
        Tensor(x.copy()) for x in (state, *rows, np.zeros((*q.shape[:2], v.shape[-1]), v.dtype))
    ]
    step_kernel[grid](*tensors, **options)
    return o.a, state.a


def errors(rank: int, mode: str, dtype, shape, seed: int, plant: bool) -> list[float]:
    r = np.random.default_rng(seed)
    B, H, Hk, Hv, K, V = shape
    q, k, v = (r.normal(size=s).astype(dtype) for s in ((B, H, K), (B, Hk, K), (B, Hv, V)))
    decay = {0: None, 1: (1, H), 3: (B, H), 4: (B, H, K)}[rank]
    decay = None if decay is None else -np.abs(r.standard_cauchy(size=decay)).astype(np.float32)
    bonus = r.normal(size=(H, K)).astype(np.float32) if mode == "bonus" else None
    state = r.normal(size=(B, H, K, V)).astype(np.float32)
    inclusive, scale = mode == "inclusive", 0.3
    got = run(q, k, v, decay, bonus, state, inclusive, scale * (1 + 1e-4 * plant))
    with jax.enable_x64(True):
        high = [
            None if x is None else jax.numpy.asarray(np.asarray(x, np.float64))
            for x in (q, k, v, decay, bonus, state)
        ]
        step_options = StepOptions(inclusive=inclusive, scale=scale, normalize=False)
        want = reference.linear_scan_step(StepInputs(*high), step_options)
    return [rel_rms(a, b) for a, b in zip(got, want)]


def main() -> None:
    plant = "--plant" in sys.argv
    found = {}
    shapes = [(2, 4, 2, 1, 24, 20), (1, 2, 2, 2, 16, 32)]
    for seed, (rank, mode) in enumerate(
        itertools.product((0, 1, 3, 4), ("inclusive", "exclusive", "bonus"))
    ):
        shape = shapes[seed % 2]
        found[f"rank {rank}, {mode}, float32"] = errors(rank, mode, np.float32, shape, seed, plant)
    found["rank 4, inclusive, bfloat16"] = errors(
        4, "inclusive", ml_dtypes.bfloat16, shapes[0], 99, plant
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
