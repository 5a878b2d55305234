"""`attention` with its tokens cut over a mesh axis: for sequences longer than one device holds.

On TPU keys and values travel round a ring, and the kernels compute with those that are here:
`tpu/ring.py`. Elsewhere they are gathered, queries are not: with few key heads they are the smaller
part, and one all-gather forward and one reduce-scatter backward can be overlapped with other work,
where a ring has a step for every device.

Causal work is balanced. The later a row, the more keys it sees. So for n devices the sequence
counts as 2 n pieces, and device d takes the queries of the pieces d and 2 n - 1 - d. Together these
see 2 n + 1 pieces of keys, the same on every device. The results travel back. On a ring keys and
values are exchanged alike.

With a window that is no longer than a device's tokens, only the last keys of the device before are
fetched.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas import dispatch
from kernels_pallas.attention import xla
from kernels_pallas.attention.checks import (
    check_inputs,
    check_same_length,
    checked_options,
    with_parameters,
)
from kernels_pallas.attention.documents import document_numbers
from kernels_pallas.attention.inputs import AttentionInputs, AttentionOptions, Outputs
from kernels_pallas.attention.normalizers.base import Normalizer
from kernels_pallas.attention.tpu import op as tpu
from kernels_pallas.attention.tpu import ring
from kernels_pallas.common.checks import all_varying, check_interpret
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
    normalizer_parameters: Float[Array, "P H"] | None = None,
    logits_soft_cap: float | None = None,
    scale: float | None = None,
    implementation: dispatch.Implementation | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H V"]:
    """`attention` inside `shard_map`, with T cut over the mesh axis `axis_name`.

    On TPU a device holds its own keys and values and those of two more devices for the time of
    the call, and their gradients are added up over devices in float32. Elsewhere it holds those of
    the whole sequence, unless a window is shorter than its tokens, and gradients are added up in
    their own dtype. Work is balanced when this device's T is even.

    The kernels take softmax, without `alibi_slopes`, of an even T; a window only if it is causal
    and no longer than T, and then every normalizer that they have on one device.

    Args:
      axis_name: the mesh axis that cuts T.
      q, k, v, gate_logits, segment_ids: as in `attention`: this device's tokens.
      normalizer, causal, window, sink_logits, alibi_slopes, normalizer_parameters: as in
        `attention`, of the whole sequence.
      logits_soft_cap, scale: as in `attention`.
      implementation: None, "xla" or "tpu".
      interpret: run the named kernels ("tpu") in interpret mode, on CPU.

    Returns:
      y of this device's tokens, in v's dtype.

    Raises:
      ValueError: as `attention`.
      NotImplementedError: the implementation asked for does not cover this call.
    """
    op = "attention"
    inputs = AttentionInputs(q, k, v, gate_logits, sink_logits, alibi_slopes, segment_ids)
    check_inputs(op, inputs)
    check_same_length(op, inputs)
    inputs = with_parameters(op, inputs, normalizer, normalizer_parameters)
    options = checked_options(
        op,
        inputs,
        normalizer=normalizer,
        causal=causal,
        window=window,
        logits_soft_cap=logits_soft_cap,
        scale=scale,
    )
    num_devices = jax.lax.axis_size(axis_name)
    device = jax.lax.axis_index(axis_name)
    tokens = q.shape[1]
    # The length of the whole sequence.
    options = options.for_length(num_devices * tokens)
    check_interpret(op, interpret, implementation)
    refusals = {
        "reference": _refusal,
        "gpu": _refusal,
        "tpu": partial(ring.unsupported, inputs, options, num_devices),
    }
    chosen = dispatch.choose(op, implementation, refusals, inputs)
    inputs = dispatch.for_its_platform(op, chosen, interpret, inputs)
    inputs = AttentionInputs._make(all_varying(*inputs))
    # A short window reaches no farther than the device before.
    window = options.window
    if window is not None and ring.needs_two_devices_only(options, tokens):
        keys = _keys_of_two_devices(inputs, window, axis_name)
        if chosen == "tpu":
            return _in_one_sequence(inputs, options, keys, interpret)
        inputs = inputs._replace(
            k=keys.k,
            v=keys.v,
            segment_ids=keys.query_segments,
            key_segment_ids=keys.key_segments,
        )
        return _y(xla.attention(inputs, options, first=keys.first))
    if chosen == "tpu":
        return _round_the_ring(inputs, options, axis_name, interpret)

    all_segments = inputs.segment_ids
    if all_segments is not None:
        # A document may begin on another device.
        all_segments = document_numbers(_gathered(all_segments, axis_name))
    inputs = inputs._replace(
        k=_gathered(inputs.k, axis_name),
        v=_gathered(inputs.v, axis_name),
        key_segment_ids=all_segments,
    )

    def attend(
        q: Array,
        gate_logits: Array | None,
        first: Array,
    ) -> Array:
        """Queries from position `first` on against all keys."""
        # Cut from the gathered ones: these queries may be of another device.
        segments = None
        if all_segments is not None:
            segments = jax.lax.dynamic_slice_in_dim(all_segments, first, q.shape[1], axis=1)
        part = inputs._replace(q=q, gate_logits=gate_logits, segment_ids=segments)
        return _y(xla.attention(part, options, first=first))

    # Without `causal` every query sees as much as any other, and nothing needs to be exchanged.
    if not options.causal or tokens % 2 == 1 or num_devices == 1:
        return attend(inputs.q, inputs.gate_logits, device * tokens)

    pieces = _Pieces(num_devices, axis_name)
    queries = pieces.sent(inputs.q)
    gates = (None, None)
    if inputs.gate_logits is not None:
        gates = pieces.sent(inputs.gate_logits)
    outputs = []
    for q_piece, gate, number in zip(queries, gates, pieces.numbers(device)):
        # Pieces are half of a device's tokens, in the order of the sequence.
        first = number * (tokens // 2)
        outputs.append(attend(q_piece, gate, first))
    return pieces.returned(*outputs)


def _in_one_sequence(
    inputs: AttentionInputs,
    options: AttentionOptions,
    keys: "_Keys",
    interpret: bool,
) -> Array:
    """`attention` of the device's tokens behind the last ones of the device before.

    The queries of those are zeros, whose results are left out: the kernels take a whole sequence.
    """

    def behind_zeros(x: Array | None) -> Array | None:
        if x is None:
            return None
        return jnp.pad(x, ((0, 0), (keys.first, 0), (0, 0), (0, 0)))

    q = behind_zeros(inputs.q)
    assert q is not None
    together = inputs._replace(
        q=q,
        k=keys.k,
        v=keys.v,
        gate_logits=behind_zeros(inputs.gate_logits),
        segment_ids=keys.key_segments,
    )
    return _y(tpu.attention(together, options, interpret=interpret))[:, keys.first :]


def _round_the_ring(
    inputs: AttentionInputs,
    options: AttentionOptions,
    axis_name: str,
    interpret: bool,
) -> Array:
    """`attention` by the TPU kernels, to which the keys of all devices come one after another."""
    all_segments = inputs.segment_ids
    if all_segments is not None:
        all_segments = document_numbers(_gathered(all_segments, axis_name))
    gate_logits = inputs.gate_logits
    ungated = inputs._replace(gate_logits=None, segment_ids=all_segments)
    num_devices = jax.lax.axis_size(axis_name)
    # Without causality every device's work is the same already.
    exchanged = options.causal and num_devices > 1
    pieces = _Pieces(num_devices, axis_name)
    if exchanged:
        ungated = ungated._replace(
            q=pieces.in_order(ungated.q),
            k=pieces.in_order(ungated.k),
            v=pieces.in_order(ungated.v),
        )
        if gate_logits is not None:
            gate_logits = pieces.in_order(gate_logits)
    # The gate is multiplied once, when a row is complete.
    y = ring.attention(ungated, options, axis_name, interpret)
    if gate_logits is not None:
        y = y * jax.nn.sigmoid(gate_logits.astype(jnp.float32))
    y = y.astype(inputs.v.dtype)
    return pieces.out_of_order(y) if exchanged else y


class _Pieces(NamedTuple):
    """The exchange of queries: the halves of device i's tokens are the pieces 2 i and 2 i + 1."""

    size: int
    axis_name: str

    def holder(self, piece: int) -> int:
        """The device that attends for a piece: the first n in order, the others in reverse."""
        return piece if piece < self.size else 2 * self.size - 1 - piece

    def numbers(self, own: Array) -> tuple[Array, Array]:
        """The pieces of device `own`: the even one, which was a first half, then the odd one.

        Of d and 2 n - 1 - d exactly one is even.
        """
        low = own
        high = 2 * self.size - 1 - own
        low_is_even = own % 2 == 0
        even = jnp.where(low_is_even, low, high)
        odd = jnp.where(low_is_even, high, low)
        return even, odd

    def sent(self, x: Array) -> tuple[Array, Array]:
        """x [B, T, ...] of this device -> the two pieces [B, T / 2, ...] that it attends for."""
        # Everybody's first halves are the even pieces, of which each device attends for one.
        first, second = jnp.split(x, 2, axis=1)
        return (
            jax.lax.ppermute(first, self.axis_name, self._routes(0)),
            jax.lax.ppermute(second, self.axis_name, self._routes(1)),
        )

    def returned(self, even: Array, odd: Array) -> Array:
        """The inverse of `sent`."""
        first = jax.lax.ppermute(even, self.axis_name, self._routes_back(0))
        second = jax.lax.ppermute(odd, self.axis_name, self._routes_back(1))
        return jnp.concatenate([first, second], axis=1)

    def in_order(self, x: Array) -> Array:
        """x [B, T, ...] of this device -> its pieces d and 2 n - 1 - d, one after the other."""
        even, odd = self.sent(x)
        is_even = jax.lax.axis_index(self.axis_name) % 2 == 0
        early = jnp.where(is_even, even, odd)
        late = jnp.where(is_even, odd, even)
        return jnp.concatenate([early, late], axis=1)

    def out_of_order(self, x: Array) -> Array:
        """The inverse of `in_order`."""
        early, late = jnp.split(x, 2, axis=1)
        is_even = jax.lax.axis_index(self.axis_name) % 2 == 0
        return self.returned(jnp.where(is_even, early, late), jnp.where(is_even, late, early))

    def _routes(self, half: int) -> list[tuple[int, int]]:
        """(source, destination) of everybody's first (0) or second (1) half."""
        return [(i, self.holder(2 * i + half)) for i in range(self.size)]

    def _routes_back(self, half: int) -> list[tuple[int, int]]:
        return [(destination, source) for source, destination in self._routes(half)]


def _y(result: Outputs) -> Array:
    # The log-sum-exp is not asked for.
    assert isinstance(result, Array)
    return result


def _refusal() -> str:
    """Why no other backend takes the call: their queries do not start later than the keys."""
    return "takes no queries that are a part of the sequence"


def _gathered(x: Array, axis_name: str) -> Array:
    """The whole sequence of `x` [B, T, ...]. Its transpose is a reduce-scatter."""
    return jax.lax.all_gather(x, axis_name, axis=1, tiled=True)


class _Keys(NamedTuple):
    """This device's keys behind the last ones of the device before."""

    k: Array
    v: Array
    # Of this device's tokens.
    query_segments: Array
    # Of all these keys.
    key_segments: Array
    # The position of the first query among these keys.
    first: int


def _keys_of_two_devices(
    inputs: AttentionInputs,
    window: int,
    axis_name: str,
) -> _Keys:
    """What a short window may see."""
    B, tokens = inputs.k.shape[:2]
    # The first query sees itself and window - 1 keys before it; no slice is empty.
    reach = max(window - 1, 1)
    num_devices = jax.lax.axis_size(axis_name)
    # Nobody sends to the first device, which gets zeros.
    to_the_next = [(i, i + 1) for i in range(num_devices - 1)]

    def before(x: Array) -> Array:
        """The last tokens of the device before; zeros on the first device."""
        return jax.lax.ppermute(x[:, tokens - reach :], axis_name, to_the_next)

    # Even without documents the first device must not see those zeros.
    segments = inputs.segment_ids
    if segments is None:
        segments = varying_like(jnp.zeros((B, tokens), jnp.int32), inputs.k)
    numbers = document_numbers(jnp.concatenate([before(segments), segments], axis=1))
    # What the first device has got belongs to no document.
    is_first = jax.lax.axis_index(axis_name) == 0
    numbers_before = jnp.where(is_first, -1, numbers[:, :reach])
    own_numbers = numbers[:, reach:]
    return _Keys(
        k=jnp.concatenate([before(inputs.k), inputs.k], axis=1),
        v=jnp.concatenate([before(inputs.v), inputs.v], axis=1),
        query_segments=own_numbers,
        key_segments=jnp.concatenate([numbers_before, own_numbers], axis=1),
        first=reach,
    )
