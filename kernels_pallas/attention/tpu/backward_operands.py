"""The operands of the backward kernel of `attention` on TPU, and where they are at a grid step.

The grid of the kernel is (batch, key heads, spans of keys, query heads of the key head, tiles of
the span); `backward.py` says why.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from kernels_pallas.attention.kernels import Residuals, Shaped
from kernels_pallas.attention.tpu.plan import FLUSH, KernelInputs, Plan, TileTable
from kernels_pallas.common.mesh import like
from kernels_pallas.common.padding import padded
from kernels_pallas.common.tpu import Operand


class Spans(NamedTuple):
    """How the keys are cut into spans; every span has as many entries in the table of tiles."""

    count: int
    # Entries of the table in a span.
    tiles: int
    # Blocks of keys in a span.
    blocks: int


@dataclass(frozen=True)
class GridStep:
    """Where a grid step is: the grid's indices, and what follows from them."""

    plan: Plan
    spans: Spans
    # The row of the batch.
    b: Array
    key_head: Array
    # The span of keys.
    s: Array
    # The query head within the group of the key head.
    g: Array
    # The tile within the span.
    p: Array
    # In SMEM.
    tiles: TileTable

    @property
    def entry(self) -> Array:
        """The entry of the table of tiles: spans are one after another in it."""
        return self.s * self.spans.tiles + self.p

    @property
    def query_head(self) -> Array:
        """The query head: those of a key head are consecutive."""
        return self.key_head * self.plan.group + self.g

    @property
    def flags(self) -> Array:
        """The tile's kind and flags."""
        return self.tiles.flags[self.entry]

    @property
    def q_block(self) -> Array:
        """The tile's block of queries."""
        return self.tiles.q_blocks[self.entry]

    @property
    def k_block(self) -> Array:
        """The tile's block of keys."""
        return self.tiles.k_blocks[self.entry]


@dataclass(frozen=True)
class Operands:
    """The kernel's operands: which block of its array each of them is at a grid step."""

    plan: Plan
    spans: Spans
    padded_length: int
    padded_keys: int

    def inputs(
        self,
        residuals: Residuals,
        dy: Array,
        dlse: Array | None,
    ) -> list[Operand]:
        """What the kernel reads."""
        plan = self.plan
        inputs: KernelInputs = residuals.inputs
        pad_tokens = partial(padded, axis=1, size=self.padded_length)
        pad_keys = partial(padded, axis=1, size=self.padded_keys)
        pad_numbers = partial(padded, axis=3, size=self.padded_length)
        operands = [
            self._by_query("q", pad_tokens(inputs.q), plan.K),
            self._by_key("k", pad_keys(inputs.k), plan.K),
            self._by_key("v", pad_keys(inputs.v), plan.V),
            self._by_query("dy", pad_tokens(dy), plan.V),
        ]
        if dlse is not None:
            operands.append(self._number_by_query("dlse", pad_numbers(dlse)))
        # What the forward pass saved.
        for n, output in residuals.outputs.items():
            operand = self._by_query(f"o{n}", pad_tokens(output), plan.V)
            operands.append(operand)
        for n, statistic in enumerate(residuals.statistics):
            operand = self._number_by_query(f"saved{n}", pad_numbers(statistic))
            operands.append(operand)
        # An element-wise gate is laid out as y is, a gate by head as a statistic.
        gate_logits = inputs.gate_logits
        if gate_logits is not None and plan.gate == "element":
            operand = self._by_query("gate", pad_tokens(gate_logits), plan.V)
            operands.append(operand)
        elif gate_logits is not None:
            operand = self._number_by_query("gate", pad_numbers(gate_logits))
            operands.append(operand)
        key_segments = inputs.segments_of_keys
        if inputs.segment_ids is not None and key_segments is not None:
            # Padding with the last id does not widen the bounds of the last block.
            operands += self._segments(
                padded(inputs.segment_ids, 2, self.padded_length, mode="edge"),
                padded(key_segments, 2, self.padded_keys, mode="edge"),
            )
        return operands

    def gradients(self, inputs: KernelInputs) -> list[Operand]:
        """What the kernel writes."""
        plan = self.plan
        B = inputs.q.shape[0]
        num_spans = self.spans.count
        q = inputs.q
        # Shapes: by query and by key, a head being a range of columns; numbers along lanes.
        queries = (B, self.padded_length, plan.H * plan.K)
        keys = (B, self.padded_keys, plan.Hk * plan.K)
        values = (B, self.padded_keys, plan.Hk * plan.V)
        numbers = (B, plan.H, 1, self.padded_length)
        # Parts of dq are added up in float32.
        dq_dtype = q.dtype if num_spans == 1 else jnp.float32
        dq = like(q, (num_spans, *queries), dq_dtype)
        dk = like(q, keys, inputs.k.dtype)
        dv = like(q, values, inputs.v.dtype)
        operands = [
            self._dq(dq),
            self._by_span_of_keys("dk", dk, plan.K),
            self._by_span_of_keys("dv", dv, plan.V),
        ]
        # Gradients that need rows alone: the first span writes them.
        if inputs.gate_logits is not None and plan.gate == "element":
            by_element = (B, self.padded_length, plan.H * plan.V)
            dgate = like(q, by_element, inputs.gate_logits.dtype)
            operand = self._by_query("dgate", dgate, plan.V)
            operands.append(self._once(operand))
        elif inputs.gate_logits is not None:
            dgate = like(q, numbers, jnp.float32)
            operand = self._number_by_query("dgate", dgate)
            operands.append(self._once(operand))
        if inputs.sink_logits is not None:
            dsinks = like(q, numbers, jnp.float32)
            operand = self._number_by_query("dsinks", dsinks)
            operands.append(self._once(operand))
        if inputs.alibi_slopes is not None:
            # The distances are to keys: every span adds something.
            dslopes = like(q, (num_spans, *numbers), jnp.float32)
            operands.append(self._dslopes(dslopes))
        return operands

    def _operand(
        self,
        name: str,
        array: Shaped,
        block: tuple[int, ...],
        block_at: Callable[[GridStep], tuple],
    ) -> Operand:
        """An operand whose block at a grid step is block_at(step)."""
        plan = self.plan
        spans = self.spans

        def index(*indices: Any) -> tuple:
            return block_at(GridStep(plan, spans, *indices))

        return Operand(name, array, block, index)

    def _by_query(
        self,
        name: str,
        array: Shaped,
        width: int,
    ) -> Operand:
        """Of [B, T, H * width]: the tile's queries."""

        def block_at(step: GridStep) -> tuple:
            return step.b, step.q_block, step.query_head

        block = (1, self.plan.backward.block, width)
        return self._operand(name, array, block, block_at)

    def _by_key(
        self,
        name: str,
        array: Shaped,
        width: int,
    ) -> Operand:
        """Of [B, S, Hk * width]: the tile's keys."""

        def block_at(step: GridStep) -> tuple:
            return step.b, step.k_block, step.key_head

        block = (1, self.plan.backward.keys, width)
        return self._operand(name, array, block, block_at)

    def _number_by_query(
        self,
        name: str,
        array: Shaped,
    ) -> Operand:
        """Of [B, H, 1, T]: a number for each of the tile's queries, along lanes."""

        def block_at(step: GridStep) -> tuple:
            return step.b, step.query_head, 0, step.q_block

        block = (1, 1, 1, self.plan.backward.block)
        return self._operand(name, array, block, block_at)

    def _segments(self, of_queries: Array, of_keys: Array) -> list[Operand]:
        """Of [B, 1, T] and [B, 1, S]: the segment ids of the tile's queries, and of its keys."""

        def block_of_queries(step: GridStep) -> tuple:
            return step.b, 0, step.q_block

        def block_of_keys(step: GridStep) -> tuple:
            return step.b, 0, step.k_block

        # May be the same array twice: a grid step sees two blocks of it.
        queries = (1, 1, self.plan.backward.block)
        keys = (1, 1, self.plan.backward.keys)
        return [
            self._operand("query_segments", of_queries, queries, block_of_queries),
            self._operand("key_segments", of_keys, keys, block_of_keys),
        ]

    def _once(self, operand: Operand) -> Operand:
        """An output by queries that the first span writes.

        Later spans must leave it alone. Their index stays at the last block that the first span
        wrote, so that Pallas has no other block to write back.
        """
        if self.spans.count == 1:
            return operand
        last_head = self.plan.group - 1
        last_tile = self.spans.tiles - 1

        def index(*indices: Any) -> tuple:
            b, h, s, _, _, tiles = indices
            # Of the grid step that ends the first span.
            at_end = operand.index(
                b,
                h,
                0,
                last_head,
                last_tile,
                tiles,
            )
            here = operand.index(*indices)
            return tuple(
                jnp.where(
                    s == 0,
                    block_here,
                    block_at_end,
                )
                for block_here, block_at_end in zip(here, at_end)
            )

        return operand._replace(index=index)

    def _dq(self, array: Shaped) -> Operand:
        """Of [spans, B, T, H * K]: every span writes its own part."""

        def block_at(step: GridStep) -> tuple:
            return step.s, step.b, step.q_block, step.query_head

        block = (1, 1, self.plan.backward.block, self.plan.K)
        return self._operand("dq", array, block, block_at)

    def _dslopes(self, array: Shaped) -> Operand:
        """Of [spans, B, H, 1, T]: every span writes its own part."""

        def block_at(step: GridStep) -> tuple:
            return step.s, step.b, step.query_head, 0, step.q_block

        block = (1, 1, 1, 1, self.plan.backward.block)
        return self._operand("dslopes", array, block, block_at)

    def _by_span_of_keys(
        self,
        name: str,
        array: Shaped,
        width: int,
    ) -> Operand:
        """Of [B, S, Hk * width]: written once a span, while the last head's last queries pass.

        Pallas writes a block back when the index changes. Until the sums are complete, the index
        stays at the span's first block, which is the first to be written.
        """
        last_head = self.plan.group - 1
        blocks_per_span = self.spans.blocks

        def block_at(step: GridStep) -> tuple:
            # Of this tile's keys: no later tile adds to dk and dv.
            is_complete = step.flags & FLUSH != 0
            is_last_head = step.g == last_head
            k_block = jnp.where(
                is_complete & is_last_head,
                step.k_block,
                step.s * blocks_per_span,
            )
            return step.b, k_block, step.key_head

        block = (1, self.plan.backward.keys, width)
        return self._operand(name, array, block, block_at)
