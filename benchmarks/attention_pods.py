"""Decoding and sequence parallel attention on TPUs, in the model of `gatedjax.aot`: times that the
compiler's schedule gives, none that was measured. Needs no TPU; takes about ten minutes of a core.

    python benchmarks/attention_pods.py [--chip=v5p] [--only=decode] \
        [--json=benchmarks/results/attention_pods.json]

decode: `attention_step` against a full cache: the time in which its bytes can be read, the kernel,
the whole program, and the same call by XLA.

ring: what one of eight devices computes of 131,072 tokens, causal, step by step, beside the same
kernel on one chip. What travels between devices has no time in the model: bytes are counted, and
sent at the links' speed beside the kernels' time.
"""

import os
from collections.abc import Callable
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is loaded to compile, not to run

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from report import parser, table, write_json

from gatedjax.aot import compile_for
from gatedjax.aot.targets import target
from kernels_pallas.attention import attention_step
from kernels_pallas.attention.inputs import AttentionInputs, AttentionOptions
from kernels_pallas.attention.kernels import Residuals
from kernels_pallas.attention.normalizers.base import Softmax
from kernels_pallas.attention.tpu import ring
from kernels_pallas.attention.tpu.backward import backward
from kernels_pallas.attention.tpu.forward import Before, forward
from kernels_pallas.attention.tpu.plan import KernelInputs

# B, S, H, Hk, D of a decoding step in bfloat16.
DECODE = (
    (32, 8192, 32, 8, 128),
    (32, 8192, 16, 2, 256),
    (32, 8192, 32, 8, 64),
    (1, 131072, 32, 8, 128),
)
DECODE_HEADER = ("B S H/Hk D", "bytes us", "kernel us", "program us", "XLA us", "bytes / program")
DEVICES = 8
TOKENS = 131072
# Query heads, key heads and channels of the ring, a device's.
RING = (8, 2, 128)
RING_HEADER = (
    "ring of 8",
    "own ms",
    "earlier ms",
    "later ms",
    "one chip / 8 ms",
    "rate",
    "sent ms",
)


def decode_row(chip: str, shape: tuple[int, ...]) -> dict:
    """One decoding step, by the kernel and by XLA."""
    B, S, H, Hk, D = shape
    q = jax.ShapeDtypeStruct((B, H, D), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((B, S, Hk, D), jnp.bfloat16)
    valid = np.ones((B, S), bool)

    def times(implementation: str) -> tuple[float, float]:
        def decode(q, k, v, valid):
            return attention_step(q, k, v, valid=valid, implementation=implementation)

        _, report = compile_for(
            f"tpu:{chip}",
            decode,
            q,
            cache,
            cache,
            jax.ShapeDtypeStruct(valid.shape, valid.dtype),
            # The table of blocks follows from it.
            concrete={3: valid},
        )
        of_kernels = sum(kernel.seconds for kernel in report.kernels)
        return of_kernels, report.program_seconds

    kernel, program = times("tpu")
    _, by_xla = times("xla")
    floor = 2 * cache.size * cache.dtype.itemsize / target(f"tpu:{chip}").hbm_bytes_per_second
    return {
        "shape": list(shape),
        "bytes_us": 1e6 * floor,
        "kernel_us": 1e6 * kernel,
        "program_us": 1e6 * program,
        "xla_us": 1e6 * by_xla,
        "fraction": floor / program,
    }


class Step:
    """One step of the ring as a program of its own: some queries against some keys."""

    def __init__(self, T: int, first_query: int, num_keys: int, causal: bool):
        self.T = T
        self.first = first_query
        self.num_keys = num_keys
        self.causal = causal

    def plan_and_inputs(self, q, k, v):
        """As `ring` makes them, of columns."""
        H, Hk, D = RING
        part = KernelInputs(
            q=q[:, self.first :],
            k=k[:, : self.num_keys],
            v=v[:, : self.num_keys],
            gate_logits=None,
            sink_logits=None,
            alibi_slopes=None,
            segment_ids=None,
        )
        heads = [x.reshape(*x.shape[:2], n, D) for x, n in zip(part[:3], (H, Hk, Hk))]
        options = AttentionOptions(Softmax(), self.causal, None, None, D**-0.5)
        return ring.step_plan(AttentionInputs(*heads), options, False), part

    def forward(self, q, k, v, output, lse):
        """Rows that are continued; of the device's own keys, new ones."""
        plan, inputs = self.plan_and_inputs(q, k, v)
        before = None if self.causal else Before(output[:, self.first :], lse[..., self.first :])
        result = forward(plan, inputs, save=False, before=before)
        (statistic,) = result.statistics
        if not self.first:
            return result.y, statistic
        return (
            lax.dynamic_update_slice_in_dim(output, result.y, self.first, axis=1),
            lax.dynamic_update_slice_in_dim(lse, statistic, self.first, axis=3),
        )

    def backward(self, q, k, v, output, lse, do, *sums):
        """Gradients, added to those of the steps before."""
        plan, inputs = self.plan_and_inputs(q, k, v)
        saved = Residuals(inputs, {0: output[:, self.first :]}, [lse[..., self.first :]])
        gradients = backward(plan, saved, do[:, self.first :])
        added = [x.astype(jnp.float32) for x in (gradients.q, gradients.k, gradients.v)]
        if self.causal:
            return added
        dq, dk, dv = sums
        return (
            dq.at[:, self.first :].add(added[0]),
            dk.at[:, : self.num_keys].add(added[1]),
            dv.at[:, : self.num_keys].add(added[2]),
        )

    def milliseconds(self, chip: str, way: str) -> float:
        """The replay's time of the program."""
        H, Hk, D = RING

        def of(heads: int, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((1, self.T, heads * D), dtype)

        q, k = of(H, jnp.bfloat16), of(Hk, jnp.bfloat16)
        output, dkeys = of(H, jnp.float32), of(Hk, jnp.float32)
        lse = jax.ShapeDtypeStruct((1, H, 1, self.T), jnp.float32)
        args = (q, k, k, output, lse)
        fn: Callable = self.forward
        if way == "backward":
            args = (*args, output, output, dkeys, dkeys)
            fn = self.backward
        _, report = compile_for(f"tpu:{chip}", fn, *args)
        return 1e3 * report.program_seconds


def ring_row(chip: str, way: str) -> dict:
    """The steps of a device, and the whole sequence on one chip."""
    T = TOKENS // DEVICES
    own = Step(T, 0, T, causal=True).milliseconds(chip, way)
    earlier = Step(T, 0, T // 2, causal=False).milliseconds(chip, way)
    later = Step(T, T // 2, T, causal=False).milliseconds(chip, way)
    one_chip = Step(TOKENS, 0, TOKENS, causal=True).milliseconds(chip, way) / DEVICES
    # A step ends when the slowest device has ended it.
    steps = own + (DEVICES - 1) * max(earlier, later)
    _, Hk, D = RING
    # Keys and values in bfloat16; backward also their gradients in float32.
    bytes_of_step = 2 * T * Hk * D * (2 if way == "forward" else 2 + 4)
    # Round a ring, one link of a chip's six (v5p) or four carries it.
    links = {"v5p": 6}.get(chip, 4)
    sent = DEVICES * bytes_of_step / (target(f"tpu:{chip}").ici_bytes_per_second / links)
    return {
        "pass": way,
        "own_ms": own,
        "earlier_ms": earlier,
        "later_ms": later,
        "one_chip_ms": one_chip,
        "rate": one_chip / steps,
        "sent_ms": 1e3 * sent,
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--chip", default="v5p", choices=("v5e", "v5p", "v6e"))
    made.add_argument("--only", choices=("decode", "ring"))
    args = made.parse_args()
    record: dict = {"target": f"tpu:{args.chip} (model)"}
    if args.only != "ring":
        record["decode"] = [decode_row(args.chip, shape) for shape in DECODE]
        rows = []
        for row in record["decode"]:
            B, S, H, Hk, D = row["shape"]
            times = [f"{row[key]:.0f}" for key in ("bytes_us", "kernel_us", "program_us", "xla_us")]
            rows.append([f"{B} {S} {H}/{Hk} {D}", *times, f"{row['fraction']:.2f}"])
        print(table(DECODE_HEADER, rows))
    if args.only != "decode":
        record["ring"] = [ring_row(args.chip, way) for way in ("forward", "backward")]
        rows = []
        for row in record["ring"]:
            keys = ("own_ms", "earlier_ms", "later_ms", "one_chip_ms")
            times = [f"{row[key]:.2f}" for key in keys]
            rows.append([row["pass"], *times, f"{row['rate']:.2f}", f"{row['sent_ms']:.2f}"])
        print(table(RING_HEADER, rows))
    if args.json:
        write_json(args.json, record, {"libtpu": metadata.version("libtpu")})


if __name__ == "__main__":
    main()
