"""One chunk of one head inside the TPU kernels: what is read from the blocks in VMEM, and what is written to them."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from kernels_pallas.linear_scan import tile as reference_tile
from kernels_pallas.linear_scan.tpu import tile as tpu_tile
from kernels_pallas.linear_scan.tpu.plan import Walk
from kernels_pallas.linear_scan.tpu.tile import Scored, Sums, Tile


class Tokens:
    """One chunk of one head: float32 [C, D] arrays, masked beyond T, read from the refs when they are asked for."""

    def __init__(self, walk: Walk, refs: dict, chunk: int, head: int):
        self.walk, self.plan, self.refs, self.chunk, self.head = walk, walk.plan, refs, chunk, head
        self.q = self._get("q", self.plan.H, self.plan.K) * self.plan.scale
        self.k = self._get("k", self.plan.Hk, self.plan.K)

    @property
    def v(self) -> Array:
        return self._get("v", self.plan.Hv, self.plan.V, keep_dtype=True)

    @property
    def do(self) -> Array:
        return self._get("do", self.plan.H, self.plan.V, keep_dtype=True)

    def _where(self, num_heads: int, D: int, head: int | None = None):
        C, slot = self.plan.chunk, self.walk.slot(self.head, num_heads) if head is None else head
        return 0, pl.ds(self.chunk * C, C), pl.ds(slot * D, D)

    def _get(self, name: str, num_heads: int, D: int, keep_dtype: bool = False) -> Array:
        x = self.refs[name][self._where(num_heads, D)]
        if self.plan.T % self.walk.step == 0:
            return x if keep_dtype else x.astype(jnp.float32)
        dtype = x.dtype if keep_dtype else jnp.float32
        # A select, not a product: what lies beyond T may be anything.
        return jnp.where(self._exists(), x.astype(jnp.float32), 0.0).astype(dtype)

    def _exists(self) -> Array:
        start = self.walk.block(pl.program_id(2)) * self.walk.step + self.chunk * self.plan.chunk
        return start + jax.lax.broadcasted_iota(jnp.int32, (self.plan.chunk, 1), 0) < self.plan.T

    def put(self, name: str, num_heads: int, D: int, x: Array) -> None:
        ref = self.refs[name]
        ref[self._where(num_heads, D)] = x.astype(ref.dtype)

    def share(self, name: str, num_heads: int, D: int, x: Array, shared: dict) -> None:
        """Adds up the query heads that share one head, in float32, and writes after the last of this block."""
        slot = self.walk.slot(self.head, num_heads)
        members = [
            h for h in range(self.walk.schedule.heads) if self.walk.slot(h, num_heads) == slot
        ]
        parts = shared.setdefault((name, slot), [])
        parts.append(x)
        if len(parts) == len(members):
            self.put(name, num_heads, D, sum(parts[1:], parts[0]))

    def put_ddecay(self, row: Array) -> None:
        self.refs["ddecay"][0, self.head, self.chunk] = row

    # own scores: what a token's read has of its own write

    def _bonus(self) -> Array | None:
        if "bonus" not in self.refs:
            return None
        return self.refs["bonus"][0, :, pl.ds(self.head * self.plan.K, self.plan.K)].astype(
            jnp.float32
        )

    def own(self) -> Array | None:
        bonus = self._bonus()
        if not self.plan.inclusive and bonus is None:
            return None
        products = self.q * self.k if bonus is None else self.q * bonus * self.k
        return jnp.sum(products, axis=1, keepdims=True)

    def add_own(self, levels: Array, dscores: Array, dq: Array, dk: Array) -> tuple[Array, Array]:
        """dq and dk with the own scores' part; the bonus's gradient adds up in its ref."""
        bonus = self._bonus()
        if bonus is None and (not self.plan.inclusive or self.plan.decay != "vector"):
            return dq, dk  # no own scores, or inside the mask
        down = jnp.sum(jnp.where(levels == 0, dscores, 0.0), axis=1, keepdims=True)
        if bonus is None:
            return dq + down * self.k, dk + down * self.q
        lanes = pl.ds(self.head * self.plan.K, self.plan.K)
        self.refs["dbonus"][0, :, lanes] += jnp.sum(down * self.q * self.k, axis=0, keepdims=True)
        return dq + down * bonus * self.k, dk + down * bonus * self.q

    # decays

    def _starts(self) -> Array | None:
        """bool [C, 1]."""
        if "starts" not in self.refs:
            return None
        return tpu_tile.column(self.refs["starts"][0, self.chunk]) > 0

    def vector(self, levels: Array) -> tuple:
        """What `tile.vector_scores` takes after the levels."""
        starts, log_decay = self._starts(), self._get("decay", self.plan.H, self.plan.K)
        if starts is not None:
            log_decay = jnp.where(starts, reference_tile.LOG_ZERO, log_decay)
        decay, total = jnp.exp(log_decay), jnp.exp(jnp.sum(log_decay, axis=0, keepdims=True))
        self.met_by_read = (
            decay
            if self.plan.inclusive
            else None
            if starts is None
            else jnp.where(starts, 0.0, 1.0)
        )
        return self.dq_of_reads(self.q), self.k, decay, total, self.own()

    def dq_of_reads(self, x: Array) -> Array:
        """q -> reads at the leaves, and their cotangents back: the same factor."""
        return x if self.met_by_read is None else x * self.met_by_read

    def scalar(self, tile: Tile, levels: Array):
        """Generator -> (Scored, mask [C, C], what reads and writes are multiplied with)."""
        if self.plan.decay == "none":
            mask = (levels >= 0 if self.plan.inclusive else levels > 0).astype(jnp.float32)
            read, write, total = 1.0, 1.0, 1.0
        else:
            mask, read, write, total = self._scalar_factors(tile, levels)
        yield
        scores = tpu_tile.matmul(tile, self.q, self.k, tpu_tile.NT) * mask
        if "bonus" in self.refs:
            scores = jnp.where(levels == 0, self.own(), scores)
        return Scored(scores, self.q * read, self.k * write, total), mask, read, write

    def _scalar_factors(self, tile: Tile, levels: Array):
        """(mask [C, C], read, write [C, K], total [1, 1]).

        Broadcasting a column over lanes is what this path spends most of its time on: each is made once, before the
        exponentials.
        """
        C = self.plan.chunk
        rows = self.refs["decay"][0, self.head, self.chunk]
        columns = jnp.transpose(
            jnp.concatenate([rows, jnp.zeros((tpu_tile.ROWS - len(rows), C), rows.dtype)])
        )
        wide = lambda r, lanes: Sums(
            *(jnp.broadcast_to(columns[:, i : i + 1], (C, lanes)) for i in (r, r + 1))
        )
        ends, reads = 0, len(rows) - 2  # inclusive reads meet what the state meets
        mask = tpu_tile.scalar_mask(tile, levels, wide(reads, C), Sums(rows[:1], rows[1:2]))
        last = slice(0, 1) if self.plan.reverse else slice(C - 1, C)
        coarse, fine = (rows[r : r + 1, last] for r in (0, 1))
        read, end = wide(reads, self.plan.K), wide(ends, self.plan.K)
        write = jnp.exp((coarse - end.coarse) + (fine - end.fine))
        return mask, jnp.exp(read.coarse + read.fine), write, jnp.exp(coarse + fine)
