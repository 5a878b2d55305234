"""One chunk of one head inside the TPU kernels: what is read from and written to VMEM."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Bool, Float, Int

from kernels_pallas.common.finite import cleaned, poisoned
from kernels_pallas.common.tpu import Ref
from kernels_pallas.linear_scan import nonfinite
from kernels_pallas.linear_scan.tile import LOG_ZERO
from kernels_pallas.linear_scan.tpu import scalar_decay
from kernels_pallas.linear_scan.tpu.plan import EVENT_BAD, EVENT_BAD_START, EVENT_START, Grid
from kernels_pallas.linear_scan.tpu.tile import TileOptions, column, row


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

    def __init__(
        self,
        grid: Grid,
        refs: dict[str, Ref],
        step: Array,
        chunk: int | Array,
        head: int | Array,
        clean: bool = False,
    ):
        """`refs` are the kernel's blocks by name, `step` that of the grid along T.

        chunk and head count from the block's first.
        With `clean` NaN and Inf are read as 0, a log decay of NaN as one of 0.
        """
        self.clean = clean
        self.grid = grid
        self.step = step
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

    # --- blocks [1, tokens, heads * D]

    def _index(self, num_heads: int, D: int) -> tuple:
        """Where this chunk of this head lies in a block of an array with `num_heads` heads."""
        C = self.plan.chunk
        # Query heads of a group use the same slot.
        slot = self.grid.slot(self.head, num_heads)
        return 0, _block(self.chunk, C), _block(slot, D)

    def _load(
        self,
        name: str,
        num_heads: int,
        D: int,
        keep_dtype: bool = False,
    ) -> Array:
        x = self._load_as_it_is(name, num_heads, D, keep_dtype)
        return cleaned(x) if self.clean else x

    def _load_as_it_is(
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
        block = self.grid.token_block(self.step)
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
        if self.clean:
            self._store_sum_of_loop(name, num_heads, D, x)
            return
        # Kept as values, not in the block: it may hold fewer bits than float32.
        parts = sums.setdefault((name, slot), [])
        parts.append(x)
        num_sharing = slots.count(slot)
        if len(parts) == num_sharing:
            first, *others = parts
            total = sum(others, first)
            self.store(name, num_heads, D, total)

    def _store_sum_of_loop(
        self,
        name: str,
        num_heads: int,
        D: int,
        x: Array,
    ) -> None:
        """`store_sum` where the heads are those of a loop: the sum so far is in scratch memory."""
        total_ref = self.refs[f"sum_of_{name}"]
        heads = self.grid.schedule.heads
        num_sharing = min(self.grid.group_size(num_heads), heads)
        place = jax.lax.rem(self.head, jnp.int32(num_sharing))
        total = jnp.where(place == 0, x, total_ref[...] + x)
        total_ref[...] = total

        @pl.when(place == num_sharing - 1)
        def _():
            self.store(name, num_heads, D, total)

    def store_scalar_dlog_decay(self, row: Float[Array, "1 C"]) -> None:
        """Writes the cotangents of one log per token."""
        self.refs["ddecay"][0, self.head, self.chunk] = row

    # --- the diagonal of the scores: what a token's read has of its own write

    def _bonus_lanes(self):
        return _block(self.head, self.plan.K)

    def _bonus(self) -> Float[Array, "1 K"] | None:
        if "bonus" not in self.refs:
            return None
        bonus = self.refs["bonus"][0, :, self._bonus_lanes()].astype(jnp.float32)
        return cleaned(bonus) if self.clean else bonus

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
        return column(self.refs["starts"][0, self.chunk]) > 0

    def vector_decays(self) -> VectorDecays:
        """The decays of the chunk, one per key channel."""
        starts = self._starts()
        log_decay = self._load_as_it_is("decay", self.plan.H, self.plan.K)
        if self.clean:
            log_decay = jnp.where(nonfinite.is_good_log(log_decay), log_decay, 0.0)
        if starts is not None:
            # The lesser of the two, so that a log that is NaN remains one.
            log_decay = jnp.where(starts, jnp.minimum(log_decay, LOG_ZERO), log_decay)
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

    # --- what is not finite: only asked for where something is not

    def segments(self) -> nonfinite.Segments:
        """The segments of the chunk."""
        C = self.plan.chunk
        starts = jnp.zeros((1, C), jnp.float32)
        if "starts" in self.refs:
            starts = self.refs["starts"][0, self.chunk]
        elif self.plan.decay == "scalar":
            event = self._events()
            is_start = (event == EVENT_START) | (event == EVENT_BAD_START)
            starts = jnp.where(is_start, 1.0, 0.0)
        return nonfinite.segments(column(starts), starts, self.plan.reverse)

    def _events(self) -> Float[Array, "1 C"]:
        """The last row of a scalar decay's: see `plan.KernelInputs`."""
        num_rows = self.refs["decay"].shape[3]
        return self.refs["decay"][0, self.head, self.chunk][num_rows - 1 :]

    def bad(self, state: Float[Array, "V K"]) -> nonfinite.Bad:
        """What of the chunk and of the state before it is not finite."""
        plan = self.plan
        C = plan.chunk
        if plan.decay == "vector":
            log_decay = self._load_as_it_is("decay", plan.H, plan.K)
            is_bad_log = jnp.where(nonfinite.is_good_log(log_decay), 0.0, 1.0)
            decay = jnp.max(is_bad_log, axis=1, keepdims=True)
        elif plan.decay == "scalar":
            event = self._events()
            is_bad_event = (event == EVENT_BAD) | (event == EVENT_BAD_START)
            decay = column(jnp.where(is_bad_event, 1.0, 0.0))
        else:
            decay = jnp.zeros((C, 1), jnp.float32)
        bonus = None
        if "bonus" in self.refs:
            channels = self.refs["bonus"][0, :, self._bonus_lanes()].astype(jnp.float32)
            bonus = nonfinite.bad_rows(channels)
        return nonfinite.Bad(
            query=nonfinite.bad_rows(self._load_as_it_is("q", plan.H, plan.K)),
            key=nonfinite.bad_rows(self._load_as_it_is("k", plan.Hk, plan.K)),
            value=nonfinite.bad_elements(self._load_as_it_is("v", plan.Hv, plan.V)),
            decay=decay,
            bonus=bonus,
            state=bad_values(state),
        )

    def poison_dbonus(self, is_bad: Bool[Array, "1 1"]) -> None:
        """NaN in the bonus's gradient, which sees all tokens of the row."""
        lanes = self._bonus_lanes()
        self.refs["dbonus"][0, :, lanes] = poisoned(is_bad, self.refs["dbonus"][0, :, lanes])

    def bad_with_cotangents(
        self,
        state: Float[Array, "V K"],
        dstate: Float[Array, "V K"],
    ) -> nonfinite.Bad:
        """As `bad`, with the cotangents of o and of the state after the chunk."""
        do = self._load_as_it_is("do", self.plan.H, self.plan.V)
        return self.bad(state)._replace(
            cotangent=nonfinite.bad_elements(do),
            dstate=bad_values(dstate),
        )


def _block(index: int | Array, size: int) -> pl.Slice:
    """Block number `index` of blocks of `size`: the compiler must know that it begins at one."""
    if isinstance(index, int):
        return pl.ds(index * size, size)
    return pl.ds(pl.multiple_of(index * size, size), size)


def bad_values(state: Float[Array, "V K"]) -> Float[Array, "1 V"]:
    """1 for values of a state with an element that is NaN or infinite."""
    bad = nonfinite.bad_rows(state.astype(jnp.float32))
    return row(bad)
