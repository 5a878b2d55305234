"""The TPU model beside published measurements: bfloat16 matmuls on one v5e chip, and another
project's delta rule kernels on one v6e. Needs no TPU; takes a few minutes.

    python benchmarks/tpu_model.py [--json=benchmarks/results/tpu_model.json]

The measured times are the stored outputs of jax's own tutorial, docs/pallas/tpu/matmul.ipynb. They
include the host's dispatch, about 0.11 ms, which is inferred from the 1024 rows (so these two are
no evidence of their own); the latency of HBM was fitted on the 4096 row with blocks of 128. The
other rows are independent of the model.

The v6e times are those of deltanet-tpu 0.3.0's README ("Public Model Layer Shapes", 2026-10-16: one
row of 8,192 tokens, float32 inputs, jax 0.11.2, libtpu 0.0.48.1), and include the host's dispatch.
Its kernels are compiled for 512 tokens, and their model time is taken 16 times. They are made where
deltanet-tpu is installed (`pip install --no-deps deltanet-tpu==0.3.0`: it asks for jax below 0.12),
else what the file of --json has is kept.
"""

import dataclasses
import importlib.util
import json
import os
from importlib import metadata
from pathlib import Path

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


# Of the published calls, and of those that are compiled in their place.
DELTA_TOKENS = 8192
COMPILED_TOKENS = 512
DELTA_HEADER = ("deltanet-tpu, v6e", "heads", "pass", "measured ms", "model ms", "model / measured")


@dataclasses.dataclass(frozen=True)
class MeasuredDelta:
    """A call of deltanet-tpu: its function, heads of keys and of values, forward pass only or both
    passes.
    """

    function: str
    key_heads: int
    value_heads: int
    passes: str
    milliseconds: float


MEASURED_DELTA = (
    MeasuredDelta("chunk_kda", 32, 32, "fwd", 11.67),
    MeasuredDelta("chunk_gdn", 16, 32, "fwd", 11.37),
    MeasuredDelta("chunk_gdn", 16, 16, "fwd", 5.63),
    MeasuredDelta("chunk_gdn2", 12, 24, "fwd", 4.85),
    MeasuredDelta("chunk_gdn2", 12, 24, "bwd", 9.34),
)


def delta_model_milliseconds(case: MeasuredDelta) -> float:
    """The replay's time of the whole program."""
    import deltanet_tpu

    # It would interpret its kernels here.
    jax.default_backend = lambda: "tpu"
    function = getattr(deltanet_tpu, case.function)
    keys = _tokens(case.key_heads, 128)
    values = _tokens(case.value_heads, 128)
    of_value_heads = _tokens(case.value_heads)
    gates = {
        "chunk_kda": (keys, of_value_heads),
        "chunk_gdn": (of_value_heads, of_value_heads),
        "chunk_gdn2": (keys, keys, values),
    }
    args = (keys, keys, values, *gates[case.function])

    def forward(*args: jax.Array) -> jax.Array:
        return function(*args, qk_l2norm=True)

    def both(dy: jax.Array, *args: jax.Array):
        y, vjp = jax.vjp(forward, *args)
        return y, vjp(dy)

    if case.passes == "fwd":
        _, report = compile_for("tpu:v6e", forward, *args)
    else:
        _, report = compile_for("tpu:v6e", both, values, *args)
    return 1e3 * report.program_seconds * DELTA_TOKENS / COMPILED_TOKENS


def _tokens(*axes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, COMPILED_TOKENS, *axes), jnp.float32)


def delta_rows(path: str | None) -> list[dict]:
    """Made anew, or from the file of an earlier run."""
    if importlib.util.find_spec("deltanet_tpu") is None:
        if not path or not Path(path).exists():
            return []
        return json.loads(Path(path).read_text()).get("delta_rows", [])
    rows = []
    for case in MEASURED_DELTA:
        model = delta_model_milliseconds(case)
        rows.append(
            {
                **dataclasses.asdict(case),
                "model_milliseconds": model,
                "ratio": model / case.milliseconds,
            }
        )
    return rows


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
    of_delta = delta_rows(args.json)
    lines = []
    for row in of_delta:
        heads = f"{row['key_heads']}/{row['value_heads']}"
        times = [f"{row[key]:.2f}" for key in ("milliseconds", "model_milliseconds", "ratio")]
        lines.append([row["function"], heads, row["passes"], *times])
    if lines:
        print(table(DELTA_HEADER, lines))
    else:
        print("deltanet-tpu on v6e: not installed")
    if args.json:
        record = {
            "target": "tpu:v5e (model)",
            "rows": figures,
            "delta_target": "tpu:v6e (model)",
            "delta_rows": of_delta,
        }
        write_json(args.json, record, {"libtpu": metadata.version("libtpu")})


if __name__ == "__main__":
    main()
