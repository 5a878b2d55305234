"""The cases in which every kernel is compared with float64, as data. Imports no jax."""

from typing import Any, NamedTuple

# The largest relative error of a result (RMS of the difference over RMS of the truth), for each
# type of the operands.
TOLERANCES = {
    "float32": 2e-5,
    "float16": 2e-3,
    "bfloat16": 6e-3,
}

SCAN = "scan"
SCAN_STEP = "scan_step"
DELTA = "delta"
ATTENTION = "attention"
ATTENTION_STEP = "attention_step"
GROUPED = "grouped"
EXPERT = "expert"
# By the implementation that dispatch chooses, with which they cannot be interpreted.
AS_DISPATCHED = (SCAN_STEP,)
# An option of a case: the implementation, where it is not the op's GPU kernel.
BY = "by"


class NumericCase(NamedTuple):
    """A call of an op.

    Attributes:
      op: one of the constants above.
      dtype: of the operands; log decays and states are float32.
      sizes: as the op's function in numeric_inputs.py takes them apart.
      options: what else the call has.
    """

    op: str
    dtype: str
    sizes: tuple[int, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        sizes = ",".join(str(size) for size in self.sizes)
        options = " ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.op} {self.dtype} {sizes} {options}".strip()

    def tolerance(self, axes: int) -> float:
        """Of a result with so many axes.

        An expert rounds its hidden activations too, and so does the delta rule what it finds under
        a key. The gradient of a number a head is a sum of many terms that cancel.
        """
        roundings = 2 if self.op in (EXPERT, DELTA) else 1
        return TOLERANCES[self.dtype] * roundings * (5 if axes == 1 else 1)


class Shapes(NamedTuple):
    """Lengths that no block divides, sizes below and above a block, grouped heads."""

    scan: list[tuple[int, ...]]  # B, T, H, K, V
    attention: list[tuple[int, ...]]  # B, T, H, Hk, D
    grouped: list[tuple[int, ...]]  # M, K, N, G
    step: tuple[int, ...]  # B, S, H, Hk, D


SHAPES = Shapes(
    scan=[(2, 100, 2, 64, 64), (1, 1000, 4, 128, 128), (2, 333, 2, 96, 256)],
    attention=[(2, 300, 4, 2, 64), (1, 1024, 4, 4, 128), (2, 700, 4, 1, 96)],
    grouped=[(300, 64, 128, 5), (1000, 256, 192, 8), (2048, 512, 256, 16)],
    step=(2, 3000, 8, 2, 128),
)
DRY_SHAPES = Shapes(
    scan=[(1, 48, 2, 16, 16)],
    attention=[(1, 40, 2, 1, 16)],
    grouped=[(40, 16, 24, 3)],
    step=(2, 200, 8, 2, 16),
)

SCAN_OPTIONS = {
    "rank": 4,
    "inclusive": False,
    "bonus": True,
    "reverse": True,
    "segments": True,
}
ATTENTION_OPTIONS = {
    "gate": "head",
    "window": 30,
    "segments": True,
    "logits_soft_cap": 20.0,
    "sinks": True,
    "slopes": True,
}
# Those of one pass over the keys, beside softmax.
NORMALIZERS = (
    "sigmoid",
    "relu",
    "relu_squared",
    "softpick",
    "self_adjust",
    "stablemax",
    "softplus",
    "reluformer",
    "exp",
    "exp_mean",
    "plain_self_adjust",
)
DELTA_OPTIONS = {
    "rank": 4,
    "segments": True,
    "Hk": 1,
    "beta": 2.0,
}
# The largest heads, and a sequence of many chunks.
LARGE = [
    NumericCase(ATTENTION, "bfloat16", (1, 1000, 4, 2, 256), {"gate": "element"}),
    NumericCase(SCAN, "bfloat16", (1, 4096, 1, 128, 128), {"rank": 4}),
    *[
        NumericCase(ATTENTION, "bfloat16", (1, 300, 4, 2, 64), {"normalizer": name})
        for name in NORMALIZERS
    ],
    NumericCase(DELTA, "bfloat16", (1, 4096, 1, 128, 128), {"rank": 4}),
]
# attention's other kernel, which takes softmax in 16 bits.
MOSAIC_GPU = [
    NumericCase(ATTENTION, "bfloat16", sizes, {BY: "mosaic_gpu"} | options)
    for sizes in SHAPES.attention
    for options in ({}, {"gate": "element", "window": 30})
]


def numeric_cases(dry: bool) -> list[NumericCase]:
    """All of them."""
    shapes = DRY_SHAPES if dry else SHAPES
    dtypes = ["bfloat16"] if dry else list(TOLERANCES)
    found = []
    for dtype in dtypes:
        found += _cases_of(dtype, shapes)
    if not dry:
        found += LARGE + MOSAIC_GPU
    return found


def _cases_of(dtype: str, shapes: Shapes) -> list[NumericCase]:
    """Every op at every shape, and once with all its options."""
    found = []
    # Rank of the log decays: 4 [B, T, H, K], 3 [B, T, H], 0 none.
    for rank in (4, 3, 0):
        for sizes in shapes.scan:
            found.append(NumericCase(SCAN, dtype, sizes, {"rank": rank}))
            found.append(NumericCase(DELTA, dtype, sizes, {"rank": rank}))
    for gate in (None, "element"):
        for sizes in shapes.attention:
            found.append(NumericCase(ATTENTION, dtype, sizes, {"gate": gate}))
    for sizes in shapes.grouped:
        found.append(NumericCase(GROUPED, dtype, sizes, {}))
    found.append(NumericCase(SCAN, dtype, shapes.scan[0], SCAN_OPTIONS))
    found.append(NumericCase(DELTA, dtype, shapes.scan[0], DELTA_OPTIONS))
    found.append(NumericCase(ATTENTION, dtype, shapes.attention[0], ATTENTION_OPTIONS))
    found.append(NumericCase(EXPERT, dtype, shapes.grouped[0], {}))
    found.append(NumericCase(ATTENTION_STEP, dtype, shapes.step, {}))
    B, _, H, K, V = shapes.scan[0]
    found.append(NumericCase(SCAN_STEP, dtype, (B, H, K, V), {}))
    return found
