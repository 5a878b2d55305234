"""One chunk of one head inside the TPU kernels: what is read from and written to VMEM."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Bool, Float, Int

from kernels_pallas.common.tpu import LANES, Ref
from kernels_pallas.delta_scan.normalize import L2_EPSILON
from kernels_pallas.delta_scan.tpu import scalar_decay
from kernels_pallas.delta_scan.tpu.plan import Grid, Plan
from kernels_pallas.linear_scan.tile import LOG_ZERO
from kernels_pallas.linear_scan.tpu.tile import ROWS


class VectorDecays(NamedTuple):
    """The decays of a chunk with one decay per key channel: of each token, and of every span."""

    decay: Float[Array, "C K"]
    totals: tuple[Float[Array, "1 K"], ...]


class Tokens:
    """One chunk of one head, as float32 [C, D] arrays that are 0 beyond T."""

    def __init__(
        self,
        plan: Plan,
        grid: Grid,
        refs: dict[str, Ref],
        chunk: int,
        head: int,
        num_spans: int = 1,
    ):
        """Columns are there after `transpose_rows` only.

        Args:
          plan, grid: the static arguments.
          refs: the kernel's blocks by name.
          chunk, head: counted from the block's first.
          num_spans: after how many equal parts of the chunk the state is updated.
        """
        self.plan = plan
        self.grid = grid
        self.refs = refs
        self.chunk = chunk
        self.head = head
        self._span = plan.chunk // num_spans
        self._spans = [slice(n * self._span, (n + 1) * self._span) for n in range(num_spans)]
        self._columns: dict[str, Float[Array, "C 1"]] = {}

    @cached_property
    def _normalized_q(self) -> tuple[Float[Array, "C K"], Float[Array, "C 1"] | None]:
        return self._normalized("q", self.plan.Hq)

    @cached_property
    def _normalized_k(self) -> tuple[Float[Array, "C K"], Float[Array, "C 1"] | None]:
        return self._normalized("k", self.plan.Hk)

    @cached_property
    def q(self) -> Float[Array, "C K"]:
        """Of length one with `l2_norm`, and scaled."""
        return self._normalized_q[0] * self.plan.scale

    @property
    def k(self) -> Float[Array, "C K"]:
        """Of length one with `l2_norm`."""
        return self._normalized_k[0]

    @cached_property
    def erase(self) -> Float[Array, "C K"]:
        """The negative of the key that reads the state and erases: what it finds is added."""
        if "erase" in self.refs:
            return -self.load("erase", self.plan.H, self.plan.K)
        return self.column("minus_beta") * self.k

    @property
    def v(self) -> Float[Array, "C V"]:
        return self.load("v", self.plan.H, self.plan.V)

    @property
    def do(self) -> Float[Array, "C V"]:
        return self.load("do", self.plan.H, self.plan.V)

    @property
    def write_weight(self) -> Float[Array, "C V"] | Float[Array, "C 1"]:
        """What v is multiplied by."""
        if "write" in self.refs:
            return self.load("write", self.plan.H, self.plan.V)
        return self.column("beta")

    @property
    def written(self) -> Float[Array, "C V"]:
        """u, what is written where nothing is erased."""
        return self.write_weight * self.v

    # --- blocks [1, tokens, heads * D]

    def _index(self, num_heads: int, D: int) -> tuple:
        """Where this chunk of this head lies in a block of an array with `num_heads` heads."""
        C = self.plan.chunk
        # States of a group use the same slot.
        slot = self.grid.slot(self.head, num_heads)
        rows = pl.ds(self.chunk * C, C)
        lanes = pl.ds(slot * D, D)
        return 0, rows, lanes

    def load(self, name: str, num_heads: int, D: int) -> Float[Array, "C D"]:
        """The block `name`, one chunk of one head."""
        x = self._loaded(name, num_heads, D)
        if self.plan.T % self.grid.step_length == 0:
            return x
        # A select, not a product: what lies beyond T may be anything, NaN too.
        return jnp.where(self._is_inside(), x, 0.0)

    def _loaded(self, name: str, num_heads: int, D: int) -> Float[Array, "C D"]:
        return self.refs[name][self._index(num_heads, D)].astype(jnp.float32)

    def _is_inside(self) -> Bool[Array, "C 1"]:
        """Which tokens of the chunk exist: those before T."""
        C = self.plan.chunk
        # The number in the array of the chunk's first token.
        block = self.grid.token_block(pl.program_id(2))
        first = block * self.grid.step_length + self.chunk * C
        return first + self._tokens_of_rows() < self.plan.T

    def _tokens_of_rows(self) -> Int[Array, "C 1"]:
        """Which token of the chunk each row is."""
        return jax.lax.broadcasted_iota(jnp.int32, (self.plan.chunk, 1), 0)

    def store(self, name: str, num_heads: int, D: int, x: Array) -> None:
        """Writes to the block of output `name`, in its dtype."""
        ref = self.refs[name]
        ref[self._index(num_heads, D)] = x.astype(ref.dtype)

    def store_sum(
        self,
        name: str,
        num_heads: int,
        x: Float[Array, "C K"],
        sums: dict,
    ) -> None:
        """Adds up the states that share one of `num_heads` heads of q or k, in float32.

        Writes after the last of them in this block of heads.

        Args:
          name: of the output.
          num_heads: heads of the output.
          x: this state's part.
          sums: the parts so far, the same dict for all heads of the chunk.
        """
        slot = self.grid.slot(self.head, num_heads)
        slots = [self.grid.slot(h, num_heads) for h in range(self.grid.schedule.heads)]
        # Kept as values, not in the block: it may hold fewer bits than float32.
        parts = sums.setdefault((name, slot), [])
        parts.append(x)
        if len(parts) == slots.count(slot):
            first, *others = parts
            self.store(name, num_heads, self.plan.K, sum(others, first))

    def store_row(self, name: str, row: Float[Array, "1 C"]) -> None:
        """Writes one number for each token."""
        self.refs[name][0, self.head, self.chunk] = row

    def store_column(self, name: str, column: Float[Array, "C 1"]) -> None:
        """As `store_row`; Mosaic transposes whole registers only."""
        lanes = jnp.broadcast_to(column, (column.shape[0], LANES))
        self.store_row(name, jnp.transpose(lanes)[:1])

    # --- lengths

    def _normalized(
        self,
        name: str,
        num_heads: int,
    ) -> tuple[Float[Array, "C K"], Float[Array, "C 1"] | None]:
        """q or k, and the inverse of its length before; None where the length stays."""
        x = self.load(name, num_heads, self.plan.K)
        if not self.plan.l2_norm:
            return x, None
        squares = jnp.sum(x * x, axis=1, keepdims=True)
        inverse_length = jax.lax.rsqrt(squares + L2_EPSILON)
        return x * inverse_length, inverse_length

    def unnormalized_dq(self, dq: Float[Array, "C K"]) -> Float[Array, "C K"]:
        """From the cotangent of `q` to that of the array q."""
        unit, inverse_length = self._normalized_q
        return _unnormalized(unit, dq * self.plan.scale, inverse_length)

    def unnormalized_dk(self, dk: Float[Array, "C K"]) -> Float[Array, "C K"]:
        """From the cotangent of `k` to that of the array k."""
        unit, inverse_length = self._normalized_k
        return _unnormalized(unit, dk, inverse_length)

    # --- rows: one number a token

    def row(self, name: str) -> Float[Array, "1 C"]:
        """A row of `Plan.rows`."""
        i = self.plan.rows.index(name)
        return self.refs["rows"][0, self.head, self.chunk, i : i + 1]

    def column(self, name: str) -> Float[Array, "C 1"]:
        """A row of `Plan.rows`, or one that `_rows_for_columns` adds, as a column."""
        return self._columns[name]

    def _rows_for_columns(self) -> dict[str, Float[Array, "1 C"]]:
        rows = {name: self.row(name) for name in self.plan.rows}
        if "beta" in rows:
            rows["minus_beta"] = -rows["beta"]
        if self.plan.decay == "scalar":
            # Exponentials of a row are cheaper than those of a column.
            coarse = rows["coarse"]
            fine = rows["fine"]
            rows["read"] = jnp.exp(self._since_start(coarse) + self._since_start(fine))
            rows["write"] = jnp.exp(self._until_end(coarse) + self._until_end(fine))
        return rows

    @classmethod
    def _in_order(cls, rows: Float[Array, "R C"]) -> Float[Array, "R C"]:
        """The lanes in the order of the rows of this class's arrays."""
        return rows

    @classmethod
    def transpose_rows(cls, heads: Sequence["Tokens"]) -> None:
        """Makes the columns of all heads of a chunk.

        By one transposition, as one of few rows takes as long as one of many.
        """
        rows = []
        places = []
        for head in heads:
            for name, row in head._rows_for_columns().items():
                places.append((head, name))
                rows.append(row)
        if not rows:
            return
        # Mosaic transposes whole registers only: fill up with zeros.
        padding = jnp.zeros((-len(rows) % ROWS, rows[0].shape[1]), jnp.float32)
        if padding.shape[0]:
            rows.append(padding)
        columns = jnp.transpose(cls._in_order(jnp.concatenate(rows)))
        for i, (head, name) in enumerate(places):
            head._columns[name] = columns[:, i : i + 1]

    def _since_start(self, sums: Float[Array, "1 C"]) -> Float[Array, "1 C"]:
        """Running sums that begin again with every span: by subtraction, so coarse or fine ones."""
        lane = jax.lax.broadcasted_iota(jnp.int32, sums.shape, 1)
        for span in self._spans[1:]:
            before = sums[:, span.start - 1 : span.start]
            sums = jnp.where(lane >= span.start, sums - before, sums)
        return sums

    def _until_end(self, sums: Float[Array, "1 C"]) -> Float[Array, "1 C"]:
        """What the running sums still grow by until their span ends."""
        lane = jax.lax.broadcasted_iota(jnp.int32, sums.shape, 1)
        last = sums[:, -1:]
        for span in self._spans[-2::-1]:
            last = jnp.where(lane < span.stop, sums[:, span.stop - 1 : span.stop], last)
        return last - sums

    # --- decays

    def vector_decays(self) -> VectorDecays:
        """The decays of the chunk, one per key channel."""
        log_decay = self.load("decay", self.plan.H, self.plan.K)
        if "start" in self.plan.rows:
            log_decay = jnp.where(self.column("start") > 0, LOG_ZERO, log_decay)
        # One exponential of the sum: a product of decays is rounded at every token.
        totals = [jnp.exp(log_total) for log_total in self._sums_of_spans(log_decay)]
        return VectorDecays(jnp.exp(log_decay), tuple(totals))

    def _sums_of_spans(self, x: Float[Array, "C K"]) -> list[Float[Array, "1 K"]]:
        return [jnp.sum(x[span], axis=0, keepdims=True) for span in self._spans]

    def diagonal(self) -> Float[Array, "C 1"]:
        """What each query reads of its own token's write."""
        return jnp.sum(self.q * self.k, axis=1, keepdims=True)

    def scalar_factors(self, levels: Int[Array, "C C"]) -> scalar_decay.Factors:
        """The decays of the chunk, one per token, or none."""
        if self.plan.decay == "none":
            return scalar_decay.undecayed(levels, len(self._spans))
        coarse = self.row("coarse")
        fine = self.row("fine")
        mask = scalar_decay.mask_of_sums(
            levels,
            coarse,
            fine,
            self.column("coarse"),
            self.column("fine"),
            len(self._spans),
        )
        return scalar_decay.Factors(
            mask=mask,
            read=self.column("read"),
            write=self.column("write"),
            totals=tuple(self._total(coarse, fine, span) for span in self._spans),
        )

    def _total(
        self,
        coarse: Float[Array, "1 C"],
        fine: Float[Array, "1 C"],
        span: slice,
    ) -> Float[Array, "1 1"]:
        """The decay of a span: its last token has the sum of all its logs."""
        parts = [self._since_start(sums)[:, span.stop - 1 : span.stop] for sums in (coarse, fine)]
        return jnp.exp(sum(parts[1:], parts[0]))


def _unnormalized(
    unit: Float[Array, "C K"],
    dunit: Float[Array, "C K"],
    inverse_length: Float[Array, "C 1"] | None,
) -> Float[Array, "C K"]:
    """The derivative of `unit = x * inverse_length`, whose length does not see x's."""
    if inverse_length is None:
        return dunit
    along = jnp.sum(unit * dunit, axis=1, keepdims=True)
    return inverse_length * (dunit - unit * along)
