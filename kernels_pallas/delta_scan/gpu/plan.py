"""What the GPU kernels of `delta_scan` share: the plan of a call, and its arrays.

Where a program finds its own tile, and how it loads and counts, is that of `linear_scan`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float

from kernels_pallas.delta_scan.gpu.tuning import Schedule
from kernels_pallas.linear_scan.gpu import plan as scan_plan
from kernels_pallas.linear_scan.gpu.decays import Decays
from kernels_pallas.linear_scan.gpu.plan import load
from kernels_pallas.linear_scan.gpu.tile import Tile
from kernels_pallas.linear_scan.gpu.tuning import Schedule as ScanSchedule
from kernels_pallas.linear_scan.inputs import DecayKind


class Plan(NamedTuple):
    """The static arguments of a call. T, K and V are padded to whole chunks and blocks.

    Attributes:
      chunk: tokens in a chunk.
      segments: parts of the sequence that are scanned side by side.
      operand: the dtype of what is multiplied, and of what kernels pass to each other.
      precision: of products of float32 operands.
      fast_exp: whether exponentials are one instruction, with a relative error of 2^-22.
    """

    T: int
    H: int
    Hq: int
    Hk: int
    K: int
    V: int
    decay: DecayKind
    scale: float
    l2_norm: bool
    chunk: int
    segments: int
    operand: Any
    precision: Any
    fast_exp: bool
    out_dtype: Any
    schedule: Schedule
    return_final_state: bool
    interpret: bool

    @property
    def chunks(self) -> int:
        return self.T // self.chunk

    @property
    def tile(self) -> Tile:
        return Tile(self.operand, self.precision, inclusive=True, fast_exp=self.fast_exp)

    @property
    def precision_of_inverse(self) -> Any:
        """All bits of float32, whatever the inputs: see `tile.merged_inverse`."""
        if self.interpret:
            return lax.Precision.HIGHEST
        return lax.DotAlgorithmPreset.TF32_TF32_F32_X3

    @property
    def of_decays(self) -> scan_plan.Plan:
        """The plan by which `linear_scan` treats the same decays."""
        return scan_plan.Plan(
            T=self.T,
            H=self.H,
            Hk=self.Hk,
            Hv=self.H,
            K=self.K,
            V=self.V,
            decay=self.decay,
            inclusive=True,
            reverse=False,
            scale=self.scale,
            chunk=self.chunk,
            segments=self.segments,
            operand=self.operand,
            precision=self.precision,
            fast_exp=self.fast_exp,
            out_dtype=self.out_dtype,
            # Not what the decays depend on.
            schedule=ScanSchedule(),
            return_final_state=False,
            interpret=self.interpret,
        )

    def group(self, heads: int) -> int:
        """How many states share one of `heads` heads."""
        return self.H // heads


class Inputs(NamedTuple):
    """The arrays of a call, padded.

    Attributes:
      beta: as the other numbers of which a token has one: the head first.
      logs: vector logs [B, T, H, K] as the caller gave them, scalar ones [B, H, T] with the resets
        of segments in them, and no less than LOG_ZERO.
      starts: 1 where the state is reset before the token.
    """

    q: Float[Array, "B T Hq K"]
    k: Float[Array, "B T Hk K"]
    v: Float[Array, "B T H V"]
    beta: Float[Array, "B H T"] | None
    logs: Float[Array, "B T H K"] | Float[Array, "B H T"] | None
    erase: Float[Array, "B T H K"] | None
    write: Float[Array, "B T H V"] | None
    starts: Float[Array, "B T"] | None
    state: Float[Array, "B H K V"] | None


class Rows(NamedTuple):
    """Numbers of which a token has one, chunk by chunk.

    Attributes:
      q_factor, k_factor: what q and k are multiplied by: 1 over their lengths, and the scale of q.
        None for k where it is 1.
      beta: as in `Inputs`.
      decays: as `linear_scan` has them.
    """

    q_factor: Float[Array, "B Hq N C"]
    k_factor: Float[Array, "B Hk N C"] | None
    beta: Float[Array, "B H N C"] | None
    decays: Decays


def chunk_spec(p: Plan, array: Array, axes) -> pl.BlockSpec:
    """All of one chunk and head, from an array [B, heads, N, ...].

    Args:
      axes: grid indices -> (chunk, head of the state, row of the batch).
    """
    group = p.group(array.shape[1])
    trailing = array.shape[3:]

    def index(*grid):
        n, h, b = axes(*grid)
        return b, h // group, n, *[0] * len(trailing)

    return pl.BlockSpec((None, None, None, *trailing), index)


def scaled_rows(x: Array, factor) -> Array:
    """Rows times the numbers of their tokens, which lie behind the reference `factor`."""
    if factor is None:
        return x
    row = lax.iota(jnp.int32, x.shape[0])
    return x.astype(jnp.float32) * load(factor, row)[:, None]
