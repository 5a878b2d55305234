"""`attention` with its tokens cut over a mesh axis: for sequences longer than one device holds.

Keys and values are gathered, queries are not: with few key heads they are the smaller part, and one all-gather forward
and one reduce-scatter backward can be overlapped with other work, where a ring has a step for every device. Causal rows
see more the later they stand. So the sequence counts as 2 n pieces for n devices, and device d takes the queries of the
pieces d and 2 n - 1 - d, which see 2 n + 1 pieces of keys together, the same on every device. The results travel back.
With a window that is no longer than a device's tokens, only the last keys of the device before are fetched.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas import dispatch
from kernels_pallas.attention import xla
from kernels_pallas.attention.api import check_call
from kernels_pallas.attention.normalizers.base import Normalizer
from kernels_pallas.common.checks import all_varying, default_scale
from kernels_pallas.common.mesh import varying_like


def attention_sharded(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T Hk V"],
    *,
    axis_name: str,
    gate_logits: Float[Array, "B T H V"] | Float[Array, "B T H 1"] | None = None,
    normalizer: str | Normalizer = "softmax",
    causal: bool = True,
    window: int | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    sink_logits: Float[Array, "H"] | None = None,
    alibi_slopes: Float[Array, "H"] | None = None,
    logits_soft_cap: float | None = None,
    scale: float | None = None,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "B T H V"]:
    """`attention` inside `shard_map`, T cut over the mesh axis `axis_name`; the arguments and results of this device.

    Every device holds the keys and values of the whole sequence for the time of the call, unless a window is shorter
    than its tokens. Gradients of keys and values are added up over devices in their own dtype. Work is balanced when
    this device's T is even.

    Raises:
      ValueError: as `attention`.
      NotImplementedError: an implementation other than "xla" is asked for.
    """
    op, (size, own), length = (
        "attention",
        (jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)),
        q.shape[1],
    )
    normalizer = check_call(
        op,
        q,
        k,
        v,
        gate_logits,
        normalizer,
        window,
        segment_ids,
        sink_logits,
        alibi_slopes,
        logits_soft_cap,
    )
    refused = "takes no queries that are a part of the sequence"
    dispatch.choose(op, implementation, dict.fromkeys(("reference", "tpu", "gpu"), refused))
    q, k, v, gate_logits, sink_logits, alibi_slopes, segment_ids = all_varying(
        q, k, v, gate_logits, sink_logits, alibi_slopes, segment_ids
    )
    options = dict(
        normalizer=normalizer.for_length(length * size),
        causal=causal,
        window=window,
        logits_soft_cap=logits_soft_cap,
        scale=default_scale(scale, q.shape[-1]),
    )
    if causal and window is not None and window <= length:
        k, v, ids, key_ids, first = _with_keys_before(k, v, segment_ids, window, axis_name)
        return xla.attention(
            q,
            k,
            v,
            gate_logits,
            sink_logits,
            alibi_slopes,
            ids,
            key_segment_ids=key_ids,
            first=first,
            **options,
        )
    k, v, all_ids = (_gathered(x, axis_name) for x in (k, v, segment_ids))

    def attend(q, gate_logits, first):
        ids = (
            None
            if all_ids is None
            else jax.lax.dynamic_slice_in_dim(all_ids, first, q.shape[1], axis=1)
        )
        return xla.attention(
            q,
            k,
            v,
            gate_logits,
            sink_logits,
            alibi_slopes,
            ids,
            key_segment_ids=all_ids,
            first=first,
            **options,
        )

    if not causal or length % 2 or size == 1:
        return attend(q, gate_logits, own * length)
    half = length // 2
    pieces = _Pieces(size, axis_name)
    queries, gates = (
        pieces.sent(q),
        (None, None) if gate_logits is None else pieces.sent(gate_logits),
    )
    numbers = pieces.numbers(own)
    return pieces.returned(*(attend(x, g, i * half) for x, g, i in zip(queries, gates, numbers)))


class _Pieces(NamedTuple):
    """The exchange: the halves of device i's tokens are the pieces 2 i and 2 i + 1, of 2 n."""

    size: int
    axis_name: str

    def holder(self, piece: int) -> int:
        return piece if piece < self.size else 2 * self.size - 1 - piece

    def numbers(self, own: Array) -> tuple[Array, Array]:
        """The pieces that device `own` attends for: the even one, which was the first half of some tokens, first."""
        low, high = own, 2 * self.size - 1 - own
        return jnp.where(own % 2 == 0, low, high), jnp.where(own % 2 == 0, high, low)

    def sent(self, x: Array) -> tuple[Array, Array]:
        """x [B, T, ...] of this device -> the two pieces [B, T / 2, ...] that it attends for."""
        halves = jnp.split(x, 2, axis=1)
        return tuple(
            jax.lax.ppermute(x, self.axis_name, self._routes(n)) for n, x in enumerate(halves)
        )

    def returned(self, *pieces: Array) -> Array:
        """The inverse of `sent`."""
        back = lambda n: [(to, source) for source, to in self._routes(n)]
        return jnp.concatenate(
            [jax.lax.ppermute(x, self.axis_name, back(n)) for n, x in enumerate(pieces)], axis=1
        )

    def _routes(self, half: int) -> list[tuple[int, int]]:
        return [(i, self.holder(2 * i + half)) for i in range(self.size)]


def _gathered(x: Array | None, axis_name: str) -> Array | None:
    return None if x is None else jax.lax.all_gather(x, axis_name, axis=1, tiled=True)


def _with_keys_before(
    k: Array, v: Array, segment_ids: Array | None, window: int, axis_name: str
) -> tuple:
    """(k, v, the queries' ids, the keys' ids, the first query's place), the keys of the device before put in front."""
    B, length = k.shape[:2]
    reach = max(window - 1, 1)
    steps = [(i, i + 1) for i in range(jax.lax.axis_size(axis_name) - 1)]
    before = lambda x: jax.lax.ppermute(x[:, length - reach :], axis_name, steps)
    ids = varying_like(jnp.zeros((B, length), jnp.int32), k) if segment_ids is None else segment_ids
    # Before the first device there is nothing: what stands there belongs to no document.
    nobody = jax.lax.axis_index(axis_name) == 0
    ids_before = jnp.where(nobody, jnp.min(ids) - 1, before(ids))
    joined = lambda x: jnp.concatenate([before(x), x], axis=1)
    return joined(k), joined(v), ids, jnp.concatenate([ids_before, ids], axis=1), reach
