"""Every op, forward and backward, compiles for an H200 that is not here; a Triton kernel's
registers are reported.
"""

import jax
import jax.numpy as jnp
import pytest
from cuda_plugin import needs_cuda_plugin
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from test_aot import SHAPES

from gatedjax.aot import compile_for
from gatedjax.aot.cases import CASES, make_case
from gatedjax.aot.gpu import find_ptxas

pytestmark = needs_cuda_plugin


@pytest.mark.parametrize("op", CASES)
def test_every_op_compiles_for_h200(op):
    case = make_case(op, SHAPES[op], "bfloat16", {})
    _, report = compile_for("cuda:h200", case.backward(), *case.backward_args())
    assert report.peak_bytes > 0 and report.kernels


@pytest.mark.parametrize("target", ["cuda:a100", "cuda:h100", "cuda:h200"])
def test_a_triton_kernel(target):
    def kernel(x_ref, y_ref, out_ref):
        out_ref[...] = pltriton.dot(x_ref[...], y_ref[...]).astype(out_ref.dtype)

    def product(x, y):
        return pl.pallas_call(
            kernel,
            grid=(2, 2),
            in_specs=[
                pl.BlockSpec((128, 64), lambda i, j: (i, 0)),
                pl.BlockSpec((64, 128), lambda i, j: (0, j)),
            ],
            out_specs=pl.BlockSpec((128, 128), lambda i, j: (i, j)),
            out_shape=jax.ShapeDtypeStruct((256, 256), jnp.bfloat16),
            compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=2),
            name="product",
        )(x, y)

    shapes = (
        jax.ShapeDtypeStruct((256, 64), jnp.bfloat16),
        jax.ShapeDtypeStruct((64, 256), jnp.bfloat16),
    )
    _, report = compile_for(target, product, *shapes)
    [found] = [k for k in report.kernels if k.name == "product"]
    assert found.threads == 128 and found.shared_memory_bytes >= 2 * 128 * 64 * 2
    assert (found.mma if target == "cuda:a100" else found.wgmma) > 0
    if find_ptxas():
        assert 32 < found.registers <= 255 and found.spill_bytes == 0 and 0 < found.occupancy <= 1
    else:
        assert found.registers is None
