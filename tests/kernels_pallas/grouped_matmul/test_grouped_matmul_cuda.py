"""The GPU kernels of grouped_matmul and expert_mlp compiled for GPUs that are not here: no register
spills, no matrix instructions that ptxas serializes.
"""

import pytest
from cuda_plugin import needs_cuda_plugin, needs_ptxas

from gatedjax.aot import compile_for
from gatedjax.aot.cases import make_case
from gatedjax.aot.targets import GPUS
from kernels_pallas import dispatch

pytestmark = [needs_cuda_plugin, needs_ptxas]
SHAPES = {
    "grouped_matmul": "M16384,K2048,N1024,G16",
    "expert_mlp": "R16384,M2048,F1024,G16",
}


@pytest.mark.parametrize("target", ["cuda:h100", "cuda:a100"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("op", SHAPES)
def test_no_kernel_spills(op, dtype, target):
    """Forward and backward; chosen by dispatch, not by name."""
    case = make_case(op, SHAPES[op], dtype, {})
    _, report = compile_for(target, case.backward(), *case.backward_args())
    assert dispatch.last_choice(op).implementation == "gpu"
    kernels = [k for k in report.kernels if k.name.startswith("grouped_matmul")]
    assert {k.name: k.spill_bytes for k in kernels if k.spill_bytes} == {}
    assert {k.name: k.warnings for k in kernels if k.warnings} == {}
    limit = GPUS[target.removeprefix("cuda:")].shared_memory_per_block
    assert all(k.shared_memory_bytes <= limit for k in kernels)
    # The table of tiles multiplies nothing.
    multiplying = [k for k in kernels if "tiles" not in k.name]
    assert all(k.wgmma + k.mma > 0 for k in multiplying)
    stages = {k.name.removeprefix("grouped_matmul_").partition("__")[0] for k in multiplying}
    assert stages == {"forward", "dlhs", "drhs"}
