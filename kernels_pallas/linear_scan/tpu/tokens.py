"""One chunk of one head inside the TPU kernels: what is read from and written to VMEM."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Bool, Float, Int

from kernels_pallas.common.tpu import Ref, as_column
from kernels_pallas.linear_scan import nonfinite
from kernels_pallas.linear_scan.tile import LOG_ZERO
from kernels_pallas.linear_scan.tpu import scalar_decay
from kernels_pallas.linear_scan.tpu.plan import Grid
from kernels_pallas.linear_scan.tpu.tile import TileOptions


class VectorDecays(NamedTuple):
    """The decays of a chunk with one decay per key channel.

    Attributes:
      decay: of the state, at each token.
      total: of the whole chunk.
      at_reads: what each token's own read sees; None where that is 1.
    """

    decay: Float[Array, "C K"]
    total: Float[Array, "1 K"]
    at_reads: Float[Array, "C K"] | Float[Array, "C 1"] | None

    def apply_at_reads(self, x: Float[Array, "C K"]) -> Float[Array, "C K"]:
        """q to reads before any merge, and their cotangents back: the same factor."""
        return x if self.at_reads is None else x * self.at_reads


class Tokens:
    """One chunk of one head, as float32 [C, D] arrays that are 0 beyond T.

    q and k are loaded at once, everything else when it is asked for: a load that comes early holds
    registers until it is used.
    """

    def __init__(self, grid: Grid, refs: dict[str, Ref], chunk: int, head: int):
        """`refs` are the kernel's blocks by name; chunk and head count from the block's first."""
        self.grid = grid
        self.plan = grid.plan
        self.refs = refs
        self.chunk = chunk
        self.head = head
        self.q = self._load("q", self.plan.H, self.plan.K) * self.plan.scale
        self.k = self._load("k", self.plan.Hk, self.plan.K)

    @property
    def v(self) -> Float[Array, "C V"]:
        return self._load("v", self.plan.Hv, self.plan.V, keep_dtype=True)

    @property
    def do(self) -> Float[Array, "C V"]:
        return self._load("do", self.plan.H, self.plan.V, keep_dtype=True)

    @property
    def saved_scores(self) -> Float[Array, "C C"] | None:
        """Of the forward kernel; None if it has not saved them."""
        if "scores" not in self.refs:
            return None
        return self.refs["scores"][0, self.head, self.chunk]

    # --- blocks [1, tokens, heads * D]

    def _index(self, num_heads: int, D: int) -> tuple:
        """Where this chunk of this head lies in a block of an array with `num_heads` heads."""
        C = self.plan.chunk
        # Query heads of a group use the same slot.
        slot = self.grid.slot(self.head, num_heads)
        rows = pl.ds(self.chunk * C, C)
        lanes = pl.ds(slot * D, D)
        return 0, rows, lanes

    def _load(
        self,
        name: str,
        num_heads: int,
        D: int,
        keep_dtype: bool = False,
    ) -> Array:
        # [C, D]: one chunk of one head.
        x = self.refs[name][self._index(num_heads, D)]
        dtype = x.dtype if keep_dtype else jnp.float32
        if self.plan.T % self.grid.step_length == 0:
            return x.astype(dtype)
        # A select, not a product: what lies beyond T may be anything, NaN too.
        return jnp.where(self._is_inside(), x.astype(jnp.float32), 0.0).astype(dtype)

    def _is_inside(self) -> Bool[Array, "C 1"]:
        """Which tokens of the chunk exist: those before T."""
        C = self.plan.chunk
        # The number in the array of the chunk's first token.
        block = self.grid.token_block(pl.program_id(2))
        first = block * self.grid.step_length + self.chunk * C
        token = first + jax.lax.broadcasted_iota(jnp.int32, (C, 1), 0)
        return token < self.plan.T

    def store(self, name: str, num_heads: int, D: int, x: Array) -> None:
        """Writes to the block of output `name`, in its dtype."""
        ref = self.refs[name]
        ref[self._index(num_heads, D)] = x.astype(ref.dtype)

    def store_sum(
        self,
        name: str,
        num_heads: int,
        D: int,
        x: Array,
        sums: dict,
    ) -> None:
        """Adds up the query heads that share one of `num_heads` heads, in float32.

        Writes after the last of them in this block of query heads.

        Args:
          name: of the output.
          num_heads: heads of the output.
          D: channels of a head.
          x: this query head's part.
          sums: the parts so far, the same dict for all query heads of the chunk.
        """
        slot = self.grid.slot(self.head, num_heads)
        slots = [self.grid.slot(h, num_heads) for h in range(self.grid.schedule.heads)]
        # Kept as values, not in the block: it may hold fewer bits than float32.
        parts = sums.setdefault((name, slot), [])
        parts.append(x)
        num_sharing = slots.count(slot)
        if len(parts) == num_sharing:
            first, *others = parts
            total = sum(others, first)
            self.store(name, num_heads, D, total)

    def store_scalar_dlog_decay(self, row: Float[Array, "1 C"]) -> None:
        """Writes the cotangents of one log per token."""
        self.refs["ddecay"][0, self.head, self.chunk] = row

    # --- the diagonal of the scores: what a token's read has of its own write

    def _bonus_lanes(self):
        return pl.ds(self.head * self.plan.K, self.plan.K)

    def _bonus(self) -> Float[Array, "1 K"] | None:
        if "bonus" not in self.refs:
            return None
        return self.refs["bonus"][0, :, self._bonus_lanes()].astype(jnp.float32)

    def diagonal(self) -> Float[Array, "C 1"] | None:
        """q_i k_i for inclusive reads, q_i (bonus k_i) for exclusive ones; None where that is 0."""
        bonus = self._bonus()
        if not self.plan.inclusive and bonus is None:
            return None
        # Element-wise: a matmul would compute C x C products for C of them.
        products = self.q * self.k if bonus is None else self.q * bonus * self.k
        return jnp.sum(products, axis=1, keepdims=True)

    def add_diagonal_backward(
        self,
        levels: Int[Array, "C C"],
        dscores: Float[Array, "C C"],
        dq: Float[Array, "C K"],
        dk: Float[Array, "C K"],
    ) -> tuple[Float[Array, "C K"], Float[Array, "C K"]]:
        """dq and dk with the diagonal's part; the bonus's gradient is accumulated in its block.

        Args:
          levels: of `merge_levels`.
          dscores: the scores' cotangent.
          dq, dk: what the rest of the scores and the state sent.

        Returns:
          dq and dk.
        """
        bonus = self._bonus()
        if bonus is None and not self.plan.inclusive:
            # There is no diagonal.
            return dq, dk
        if bonus is None and self.plan.decay != "vector":
            # The mask of a scalar decay has the diagonal already.
            return dq, dk
        # The diagonal as a column [C, 1].
        on_diagonal = jnp.where(levels == 0, dscores, 0.0)
        ddiagonal = jnp.sum(on_diagonal, axis=1, keepdims=True)
        if bonus is None:
            # The diagonal is q_i k_i.
            dq = dq + ddiagonal * self.k
            dk = dk + ddiagonal * self.q
            return dq, dk
        dbonus = jnp.sum(
            ddiagonal * self.q * self.k,
            axis=0,
            keepdims=True,
        )
        # The block stays in VMEM while all tokens of the row pass.
        self.refs["dbonus"][0, :, self._bonus_lanes()] += dbonus
        dq = dq + ddiagonal * bonus * self.k
        dk = dk + ddiagonal * bonus * self.q
        return dq, dk

    # --- decays

    def _starts(self) -> Bool[Array, "C 1"] | None:
        """Where the state is reset before the token."""
        if "starts" not in self.refs:
            return None
        # A row in memory, a column beside [C, K] arrays.
        return as_column(self.refs["starts"][0, self.chunk]) > 0

    def vector_decays(self) -> VectorDecays:
        """The decays of the chunk, one per key channel."""
        starts = self._starts()
        log_decay = self._load("decay", self.plan.H, self.plan.K)
        if starts is not None:
            # Logs that are NaN or +inf stay what they are: the state must show them.
            is_good = nonfinite.is_good_log(log_decay)
            log_decay = jnp.where(starts & is_good, LOG_ZERO, log_decay)
        decay = jnp.exp(log_decay)
        # One exponential of the sum: a product of decays is rounded at every token.
        total = jnp.exp(jnp.sum(log_decay, axis=0, keepdims=True))
        if self.plan.inclusive:
            at_reads = decay
        elif starts is None:
            at_reads = None
        else:
            # An exclusive read at a segment start sees nothing.
            at_reads = jnp.where(starts, 0.0, 1.0)
        return VectorDecays(decay, total, at_reads)

    def scalar_factors(
        self,
        options: TileOptions,
        levels: Int[Array, "C C"],
    ) -> scalar_decay.Factors:
        """The decays of the chunk, one per token, or none."""
        if self.plan.decay == "none":
            return scalar_decay.undecayed(options, levels)
        # [R, C] running sums, made outside of the kernel.
        rows = self.refs["decay"][0, self.head, self.chunk]
        return scalar_decay.decayed(options, levels, rows, self.plan.K)

    def scalar_diagonal(self) -> Float[Array, "C 1"] | None:
        """What replaces the diagonal of a scalar decay's mask: only a bonus does."""
        return self.diagonal() if "bonus" in self.refs else None
