"""What is timed: shapes of each op, their FLOPs and bytes, and the implementations. Imports no jax.

A shape has one name in programs of jax and of torch, so that their lines can be compared.
"""

from typing import Any, NamedTuple

# Bytes of a number: inputs and outputs are bfloat16, log decays float32.
BF16 = 2
F32 = 4

OURS = "gatedjax"
OUR_XLA = "gatedjax xla"
OUR_MOSAIC_GPU = "gatedjax mosaic_gpu"
CUDNN = "cudnn (jax.nn)"
RAGGED_DOT = "lax.ragged_dot"
DENSE = "dense matmul"
JLA = "jax-linear-attention"

# Those of ours: what fails of them is a failure of the run.
OWN = (OURS, OUR_XLA, OUR_MOSAIC_GPU)

FLA = "fla"
FLA_ATTENTION = "fla parallel_attn"
TORCH_FLASH = "torch sdpa flash"
TORCH_CUDNN = "torch sdpa cudnn"
TORCH_GROUPED = "torch._grouped_mm"


class Cost(NamedTuple):
    """Of one call: FLOPs, and bytes if every input and output moves once. 0 leaves a rate out."""

    flops: int
    bytes: int


class ScanShape(NamedTuple):
    """linear_scan: q, k [B, T, H, K], v [B, T, H, V].

    Log decays are [B, T, H, K] (vector) or [B, T, H] (scalar).
    """

    B: int
    T: int
    H: int
    K: int
    V: int
    decay: str = "vector"

    @property
    def case(self) -> str:
        return f"scan_{self.decay} B{self.B},T{self.T},H{self.H},K{self.K},V{self.V}"

    def costs(self) -> dict[str, Cost]:
        """No FLOPs: memory bounds these kernels."""
        log_decays = self.K if self.decay == "vector" else 1
        # q, k; v, o; log decays.
        forward = BF16 * (2 * self.K + 2 * self.V) + F32 * log_decays
        # q, k twice and dq, dk once; v twice, o, do and dv once; log decays twice and their
        # gradient once.
        both = BF16 * (6 * self.K + 5 * self.V) + F32 * 3 * log_decays
        tokens = self.B * self.T * self.H
        return {"fwd": Cost(0, tokens * forward), "both": Cost(0, tokens * both)}


class DeltaShape(NamedTuple):
    """delta_scan: as a scan, with a beta [B, T, H] and keys divided by their length."""

    B: int
    T: int
    H: int
    K: int
    V: int
    decay: str = "vector"

    @property
    def case(self) -> str:
        return f"delta_{self.decay} B{self.B},T{self.T},H{self.H},K{self.K},V{self.V}"

    def costs(self) -> dict[str, Cost]:
        """A scan's, and beta, which moves as often as the log decays."""
        tokens = self.B * self.T * self.H
        scan = ScanShape(*self).costs()
        forward = scan["fwd"].bytes + F32 * tokens
        both = scan["both"].bytes + 3 * F32 * tokens
        return {"fwd": Cost(0, forward), "both": Cost(0, both)}


class AttentionShape(NamedTuple):
    """attention: q [B, T, H, D], k, v [B, T, Hk, D], causal; the gate has q's shape.

    Options are pairs of a name and a value: window, normalizer, logits_soft_cap; sinks, slopes;
    documents, the length of each.
    """

    B: int
    T: int
    H: int
    Hk: int
    D: int
    gated: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def case(self) -> str:
        suffix = " gate" if self.gated else ""
        for name, value in self.options:
            suffix += f" {name}" if value is True else f" {name}={value}"
        return f"attention B{self.B},T{self.T},H{self.H},Hk{self.Hk},D{self.D}{suffix}"

    def costs(self) -> dict[str, Cost]:
        """Two products forward, seven in both passes. No bytes: matrix units bound them."""
        options = dict(self.options)
        # Tokens that a query sees, itself included; of documents each is a sequence.
        length = min(options.get("documents", self.T), self.T)
        most = min(options.get("window", length), length)
        pairs = (most * (most + 1) // 2 + (length - most) * most) * (self.T // length)
        product = 2 * self.B * self.H * pairs * self.D
        return {"fwd": Cost(2 * product, 0), "both": Cost(7 * product, 0)}


class GroupedShape(NamedTuple):
    """grouped_matmul: rows [M, K], a matrix [K, N] for each of G groups."""

    M: int
    K: int
    N: int
    G: int

    @property
    def case(self) -> str:
        return f"grouped M{self.M},K{self.K},N{self.N},G{self.G}"

    def costs(self) -> dict[str, Cost]:
        """One product forward, three in both passes; each moves all of the three arrays."""
        flops = 2 * self.M * self.K * self.N
        moved = BF16 * (self.M * self.K + self.G * self.K * self.N + self.M * self.N)
        return {"fwd": Cost(flops, moved), "both": Cost(3 * flops, 3 * moved)}


class StepShape(NamedTuple):
    """attention_step: one query of each row, a cache of S slots."""

    B: int
    S: int
    H: int
    Hk: int
    D: int

    @property
    def case(self) -> str:
        return f"attention_step B{self.B},S{self.S},H{self.H},Hk{self.Hk},D{self.D}"

    def cost(self) -> Cost:
        """The cache is read once."""
        return Cost(0, 2 * BF16 * self.B * self.S * self.Hk * self.D)


class ExpertShape(NamedTuple):
    """expert_mlp: rows [R, M], three matrices [M, F] or [F, M] for each of G groups."""

    R: int
    M: int
    F: int
    G: int

    @property
    def case(self) -> str:
        return f"expert_mlp R{self.R},M{self.M},F{self.F},G{self.G}"

    def costs(self) -> dict[str, Cost]:
        """Three products forward, nine in both passes; pre-activations are written and read."""
        flops = 3 * 2 * self.R * self.M * self.F
        rows = 2 * self.R * self.M + 3 * self.R * self.F
        moved = BF16 * (rows + 3 * self.G * self.M * self.F)
        return {"fwd": Cost(flops, moved), "both": Cost(3 * flops, 3 * moved)}


class ScanStepShape(NamedTuple):
    """linear_scan_step: a token of each row; steps in a loop, which updates states in place."""

    B: int
    H: int
    K: int
    V: int
    steps: int = 8

    @property
    def case(self) -> str:
        return f"linear_scan_step B{self.B},H{self.H},K{self.K},V{self.V} x{self.steps}"

    def cost(self) -> Cost:
        """Every state is read once and written once."""
        return Cost(0, 2 * F32 * self.steps * self.B * self.H * self.K * self.V)


type Shape = (
    ScanShape | AttentionShape | GroupedShape | StepShape | ExpertShape | DeltaShape | ScanStepShape
)


class Timed(NamedTuple):
    """A shape, and the implementations to time there, one after the other."""

    shape: Shape
    implementations: tuple[str, ...]


class Headline(NamedTuple):
    """The shapes whose block sizes are swept and whose kernels are profiled."""

    scan: ScanShape
    delta: DeltaShape
    attention: AttentionShape
    narrow_attention: AttentionShape
    gated_attention: AttentionShape
    grouped: GroupedShape


HEADLINE = Headline(
    scan=ScanShape(8, 4096, 16, 128, 128),
    delta=DeltaShape(8, 4096, 16, 128, 128),
    attention=AttentionShape(8, 4096, 16, 16, 128),
    narrow_attention=AttentionShape(8, 4096, 16, 16, 64),
    gated_attention=AttentionShape(8, 4096, 16, 16, 128, gated=True),
    grouped=GroupedShape(16384, 2048, 1024, 64),
)
SCALAR_SCAN = ScanShape(8, 4096, 16, 128, 128, "scalar")
GLA_340M_SCAN = ScanShape(16, 2048, 4, 128, 256)
LONG_SCAN = ScanShape(1, 32768, 16, 128, 128)
NARROW_SCAN = ScanShape(8, 4096, 16, 64, 64)
GATED_DELTANET = DeltaShape(8, 4096, 16, 128, 128, "scalar")
LONG_GROUPED_HEADS = AttentionShape(1, 32768, 16, 2, 256, gated=True)
MANY_EXPERTS = GroupedShape(131072, 2048, 768, 128)
LONG_CACHE = StepShape(32, 8192, 16, 2, 128)
MHA_CACHE = StepShape(32, 4096, 16, 16, 128)
STATES = ScanStepShape(128, 16, 128, 128)
EXPERTS = ExpertShape(65536, 2048, 1024, 64)
WINDOW = HEADLINE.attention._replace(options=(("window", 1024),))
# As gpt-oss has them.
WINDOW_AND_SINKS = AttentionShape(4, 4096, 64, 8, 64, options=(("window", 128), ("sinks", True)))
OTHER_OPTIONS = [
    HEADLINE.attention._replace(options=(option,))
    for option in (
        ("documents", 512),
        ("slopes", True),
        ("logits_soft_cap", 30.0),
        ("normalizer", "sigmoid"),
        ("normalizer", "softpick"),
    )
]

# In the order in which they run, most wanted first: the stage may end before the last.
TIMED = [
    Timed(HEADLINE.scan, (OURS, JLA)),
    Timed(HEADLINE.attention, (OURS, OUR_MOSAIC_GPU, CUDNN, JLA)),
    Timed(SCALAR_SCAN, (OURS, JLA)),
    Timed(HEADLINE.gated_attention, (OURS, CUDNN)),
    Timed(HEADLINE.grouped, (OURS, RAGGED_DOT, JLA, DENSE)),
    Timed(HEADLINE.delta, (OURS,)),
    Timed(GATED_DELTANET, (OURS,)),
    Timed(GLA_340M_SCAN, (OURS,)),
    Timed(LONG_SCAN, (OURS, JLA)),
    Timed(LONG_GROUPED_HEADS, (OURS, CUDNN)),
    Timed(MANY_EXPERTS, (OURS, RAGGED_DOT, JLA, DENSE)),
    Timed(HEADLINE.narrow_attention, (OURS, OUR_MOSAIC_GPU, CUDNN)),
    Timed(LONG_CACHE, (OURS, OUR_XLA)),
    Timed(STATES, (OURS, OUR_XLA)),
    Timed(EXPERTS, (OURS, OUR_XLA)),
    Timed(WINDOW, (OURS, CUDNN)),
    Timed(WINDOW_AND_SINKS, (OURS,)),
    *[Timed(shape, (OURS,)) for shape in OTHER_OPTIONS],
    Timed(NARROW_SCAN, (OURS, JLA)),
    Timed(MHA_CACHE, (OURS, OUR_XLA)),
    Timed(HEADLINE.scan, (OUR_XLA,)),
]
# torch's attention has no gate: it is timed at the shape without one.
TORCH_TIMED = [
    Timed(HEADLINE.scan, (FLA,)),
    Timed(SCALAR_SCAN, (FLA,)),
    Timed(HEADLINE.attention, (TORCH_FLASH, TORCH_CUDNN, FLA_ATTENTION)),
    Timed(HEADLINE.grouped, (TORCH_GROUPED,)),
    Timed(HEADLINE.delta, (FLA,)),
    Timed(GATED_DELTANET, (FLA,)),
    Timed(GLA_340M_SCAN, (FLA,)),
    Timed(LONG_SCAN, (FLA,)),
    Timed(LONG_GROUPED_HEADS._replace(gated=False), (TORCH_FLASH, TORCH_CUDNN)),
    Timed(HEADLINE.narrow_attention, (TORCH_FLASH, TORCH_CUDNN)),
    Timed(MANY_EXPERTS, (TORCH_GROUPED,)),
    Timed(NARROW_SCAN, (FLA,)),
]

DRY_HEADLINE = Headline(
    scan=ScanShape(1, 32, 1, 16, 16),
    delta=DeltaShape(1, 32, 1, 16, 16),
    attention=AttentionShape(1, 32, 2, 1, 16),
    narrow_attention=AttentionShape(1, 32, 2, 1, 16),
    gated_attention=AttentionShape(1, 32, 2, 1, 16, gated=True),
    grouped=GroupedShape(64, 16, 16, 2),
)
DRY_TIMED = [
    Timed(DRY_HEADLINE.scan, (OURS, OUR_XLA)),
    Timed(DRY_HEADLINE.delta, (OURS,)),
    Timed(DeltaShape(1, 32, 1, 16, 16, "scalar"), (OURS,)),
    Timed(DRY_HEADLINE.attention, (OURS,)),
    Timed(DRY_HEADLINE.gated_attention, (OURS,)),
    Timed(
        DRY_HEADLINE.attention._replace(
            options=(("window", 8), ("sinks", True), ("slopes", True), ("documents", 16)),
        ),
        (OURS,),
    ),
    Timed(DRY_HEADLINE.grouped, (OURS, RAGGED_DOT, DENSE)),
    Timed(ExpertShape(64, 16, 16, 2), (OURS, OUR_XLA)),
    Timed(StepShape(1, 64, 2, 1, 16), (OURS, OUR_XLA)),
    Timed(ScanStepShape(1, 1, 16, 16), (OUR_XLA,)),
]
DRY_TORCH_TIMED = [
    Timed(ScanShape(1, 64, 2, 16, 16), (FLA,)),
    Timed(DeltaShape(1, 64, 2, 16, 16), (FLA,)),
    Timed(AttentionShape(1, 64, 2, 1, 16), (TORCH_FLASH, TORCH_CUDNN, FLA_ATTENTION)),
    Timed(DRY_HEADLINE.grouped, (TORCH_GROUPED,)),
]


def headline(dry: bool) -> Headline:
    return DRY_HEADLINE if dry else HEADLINE


def timed(dry: bool) -> list[Timed]:
    """By jax."""
    return DRY_TIMED if dry else TIMED


def torch_timed(dry: bool) -> list[Timed]:
    """By torch."""
    return DRY_TORCH_TIMED if dry else TORCH_TIMED
