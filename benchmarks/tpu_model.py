"""The TPU model beside published measurements: bfloat16 matmuls on one v5e chip. Needs no TPU;
takes a few minutes.

    python benchmarks/tpu_model.py [--json=benchmarks/results/tpu_model.json]

The measured times are the stored outputs of jax's own tutorial, docs/pallas/tpu/matmul.ipynb. They
include the host's dispatch, about 0.11 ms, which is inferred from the 1024 rows (so these two are
no evidence of their own); the latency of HBM was fitted on the 4096 row with blocks of 128. The
other rows are independent of the model.
"""

import dataclasses
import os
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is loaded to compile, not to run

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from report import parser, table, write_json

from gatedjax.aot import compile_for

DISPATCH_MS = 0.11
HEADER = ("size", "blocks", "measured ms", "less dispatch", "model ms", "model / measured")


@dataclasses.dataclass(frozen=True)
class Measured:
    """A [size, size] x [size, size] matmul. `blocks` (rows, inner, columns) of the kernel; None:
    XLA's own matmul.
    """

    size: int
    blocks: tuple[int, int, int] | None
    milliseconds: float


MEASURED = (
    Measured(1024, (128, 128, 128), 0.29767),
    Measured(4096, (128, 128, 128), 11.7715),
    Measured(8192, (128, 128, 128), 91.8358),
    Measured(1024, (512, 1024, 1024), 0.12709),
    Measured(4096, (512, 1024, 1024), 0.88909),
    Measured(8192, (512, 1024, 1024), 6.09943),
    Measured(4096, None, 0.82729),
    Measured(8192, None, 6.04715),
)


def matmul(x: jax.Array, y: jax.Array, blocks: tuple[int, int, int]) -> jax.Array:
    """The tutorial's kernel: a float32 accumulator in scratch, written out after the last inner
    block.
    """
    m, k = x.shape
    _, n = y.shape
    block_m, block_k, block_n = blocks

    def kernel(x_ref, y_ref, out_ref, accumulator_ref):
        @pl.when(pl.program_id(2) == 0)
        def _():
            accumulator_ref[...] = jnp.zeros_like(accumulator_ref)

        product = jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)
        accumulator_ref[...] += product

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            out_ref[...] = accumulator_ref[...].astype(out_ref.dtype)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        grid=(m // block_m, n // block_n, k // block_k),
        in_specs=[
            pl.BlockSpec((block_m, block_k), lambda i, j, l: (i, l)),
            pl.BlockSpec((block_k, block_n), lambda i, j, l: (l, j)),
        ],
        out_specs=pl.BlockSpec((block_m, block_n), lambda i, j, l: (i, j)),
        scratch_shapes=[pltpu.VMEM((block_m, block_n), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
        ),
        name="matmul",
    )(x, y)


def model_milliseconds(case: Measured) -> float:
    """The replay's time: of the kernel, or of the whole program where XLA computes."""
    blocks = case.blocks
    x = jax.ShapeDtypeStruct((case.size, case.size), jnp.bfloat16)
    if blocks is None:
        _, report = compile_for("tpu:v5e", jnp.matmul, x, x)
        return 1e3 * report.program_seconds

    def product(x, y):
        return matmul(x, y, blocks)

    _, report = compile_for("tpu:v5e", product, x, x)
    return 1e3 * report.kernels[0].seconds


def main() -> None:
    args = parser(__doc__).parse_args()
    rows = []
    figures = []
    for case in MEASURED:
        model = model_milliseconds(case)
        net = case.milliseconds - DISPATCH_MS
        blocks = "XLA" if case.blocks is None else "/".join(str(size) for size in case.blocks)
        times = [f"{ms:.3f}" for ms in (case.milliseconds, net, model)]
        rows.append([case.size, blocks, *times, f"{model / net:.3f}"])
        figures.append(
            {
                **dataclasses.asdict(case),
                "model_milliseconds": model,
                "ratio": model / net,
            }
        )
    print(table(HEADER, rows))
    if args.json:
        record = {"target": "tpu:v5e (model)", "rows": figures}
        write_json(args.json, record, {"libtpu": metadata.version("libtpu")})


if __name__ == "__main__":
    main()
