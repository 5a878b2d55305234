"""Attention of tokens that are cut over devices, by the TPU kernels: keys travel round a ring.

Every device keeps its queries. Keys and values are sent from device to device, and after as many
steps as there are devices each has been everywhere. While the kernel computes with those that are
here, they are already on their way to the next device: a device holds two parts of them at most.

Rows of queries are continued from step to step: the forward kernel begins them with the output and
the log-sum-exp of the steps before. In the backward pass every step computes the final weights
again, from the log-sum-exp over all keys. The sums of dk and dv travel behind their keys, in
float32, and arrive at home with them.

Where attention is causal, device d of n holds the pieces d and 2 n - 1 - d of the sequence, which
has 2 n (`sharded.py` brings them there). To a device that holds the pieces j and 2 n - 1 - j, its
own are

    j = d    a sequence of two pieces: causal attention
    j < d    both later than piece j, and both before the other: all queries see the first half
    j > d    piece d comes before both, the other after both: the later half sees all keys

so that every step but the first has half of the pairs to compute, on every device, and none hides
any by position.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from kernels_pallas.attention import xla
from kernels_pallas.attention.inputs import AttentionInputs, AttentionOptions
from kernels_pallas.attention.kernels import Residuals, unsupported_arrays
from kernels_pallas.attention.normalizers.base import Softmax
from kernels_pallas.attention.tpu.backward import backward
from kernels_pallas.attention.tpu.forward import Before, forward
from kernels_pallas.attention.tpu.op import columns_as_heads, kernel_inputs, make_plan
from kernels_pallas.attention.tpu.plan import KernelInputs, Plan
from kernels_pallas.attention.tpu.tuning import MAX_D
from kernels_pallas.attention.xla import OUT_NAME, STATISTIC_NAME
from kernels_pallas.common.mesh import varying_together
from kernels_pallas.common.second_order import differentiable_gradient, kept
from kernels_pallas.common.tpu import Interpret


def unsupported(inputs: AttentionInputs, options: AttentionOptions, axis_size: int) -> str | None:
    """Why the kernels cannot take a call of `attention_sharded`, or None when they can.

    Args:
      inputs: this device's.
      options: of the whole sequence.
      axis_size: how many devices cut the tokens.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    tokens = q.shape[1]
    refusal = unsupported_arrays(q, k, v, options.normalizer, MAX_D)
    if refusal is not None or needs_two_devices_only(options, tokens):
        # These see the device before, as one sequence with their own tokens.
        return refusal
    if type(options.normalizer) is not Softmax:
        name = type(options.normalizer).__name__
        return f"merges the devices' keys by the log-sum-exp of softmax, which {name} has not"
    if options.window is not None:
        return f"takes a window within the {tokens} tokens of a device, not {options.window}"
    if inputs.alibi_slopes is not None:
        return "takes no alibi_slopes where tokens are cut"
    if options.causal and tokens % 2 and axis_size > 1:
        return f"takes an even number of tokens on each device, not {tokens}"
    return None


def needs_two_devices_only(options: AttentionOptions, tokens: int) -> bool:
    """Whether a window is so short that it reaches no farther than the device before."""
    return options.causal and options.window is not None and options.window <= tokens


class RingInputs(NamedTuple):
    """The arrays of a device. Where attention is causal its tokens are two pieces."""

    q: Float[Array, "B T H*K"]
    k: Float[Array, "B T Hk*K"]
    v: Float[Array, "B T Hk*V"]
    sink_logits: Float[Array, "H"] | None
    # Documents of the whole sequence, in its order.
    all_segments: Int[Array, "B N"] | None


class RingPlan(NamedTuple):
    """The static arguments of a call."""

    axis_name: str
    size: int
    options: AttentionOptions
    # Against the device's own keys.
    own: Plan
    # Against other keys: those of earlier tokens, then those of later ones. Without causality
    # both are all queries against all keys.
    earlier: Plan
    later: Plan


class Rows(NamedTuple):
    """What is known of the queries after some keys."""

    output: Float[Array, "B T H*V"]
    lse: Float[Array, "B H 1 T"]


def attention(
    inputs: AttentionInputs,
    options: AttentionOptions,
    axis_name: str,
    interpret: Interpret,
) -> Float[Array, "B T H V"]:
    """The ungated output, float32, of this device's queries.

    Args:
      inputs: of a device, in pieces; without a gate. `segment_ids` are of the whole sequence.
      options: of the whole sequence.
      axis_name: the mesh axis that cuts the tokens.
      interpret: as of the kernels.

    Returns:
      As the queries.
    """
    B, T, H, _ = inputs.q.shape
    all_segments = inputs.segment_ids
    if all_segments is not None:
        # Only whether there are any, and of which shape, is asked for.
        inputs = inputs._replace(
            segment_ids=all_segments[:, :T],
            key_segment_ids=all_segments[:, :T],
        )
    # Queries and keys of the same tokens: every query sees itself.
    own = inputs._replace(key_segment_ids=None)
    half = T // 2
    earlier = later = inputs
    if options.causal:
        earlier = _with_keys(inputs, half)
        later = _with_queries(inputs, half)
    # Between devices positions hide nothing: what they would hide is no step.
    any_pair = options._replace(causal=False)
    plan = RingPlan(
        axis_name=axis_name,
        size=lax.axis_size(axis_name),
        options=options,
        own=step_plan(own, options, interpret),
        earlier=step_plan(earlier, any_pair, interpret),
        later=step_plan(later, any_pair, interpret),
    )
    # What travels is laid out as the kernels take it, once.
    columns = kernel_inputs(plan.own, own)
    ring_inputs = RingInputs(
        q=columns.q,
        k=columns.k,
        v=columns.v,
        sink_logits=columns.sink_logits,
        all_segments=all_segments,
    )
    y = _ring(plan, varying_together(ring_inputs))
    # Without the channels of padding.
    V = inputs.v.shape[3]
    return y.reshape(B, T, H, -1)[..., :V]


def step_plan(inputs: AttentionInputs, options: AttentionOptions, interpret: Interpret) -> Plan:
    """The static arguments of the kernels of one step."""
    plan = make_plan(inputs, options._replace(return_lse=True), interpret)
    # Rows are continued, so they are not rounded.
    return plan._replace(out_dtype=jnp.dtype(jnp.float32))


def _with_keys(inputs: AttentionInputs, count: int) -> AttentionInputs:
    """The inputs with the first keys only."""
    segments = inputs.key_segment_ids
    return inputs._replace(
        k=inputs.k[:, :count],
        v=inputs.v[:, :count],
        key_segment_ids=None if segments is None else segments[:, :count],
    )


def _with_queries(inputs: AttentionInputs, first: int) -> AttentionInputs:
    """The inputs with the queries from `first` on only."""
    segments = inputs.segment_ids
    return inputs._replace(
        q=inputs.q[:, first:],
        segment_ids=None if segments is None else segments[:, first:],
    )


# --- the pieces of a device


def _segments_of(plan: RingPlan, inputs: RingInputs, device: Array) -> Array | None:
    """The documents of a device's tokens, [B, 1, T]."""
    ids = inputs.all_segments
    if ids is None:
        return None
    T = inputs.q.shape[1]
    if not plan.options.causal:
        return lax.dynamic_slice_in_dim(ids, device * T, T, axis=1)[:, None]
    half = T // 2
    pieces = []
    for piece in (device, 2 * plan.size - 1 - device):
        pieces.append(lax.dynamic_slice_in_dim(ids, piece * half, half, axis=1))
    return jnp.concatenate(pieces, axis=1)[:, None]


def _to_the_next(plan: RingPlan, x: Array) -> Array:
    """Every device's `x` at the next device: what the one before had."""
    # (source, destination); the last device sends to the first.
    routes = [(i, (i + 1) % plan.size) for i in range(plan.size)]
    return lax.ppermute(x, plan.axis_name, routes)


def _inputs_of_step(
    inputs: RingInputs,
    k: Array,
    v: Array,
    query_segments: Array | None,
    key_segments: Array | None,
) -> KernelInputs:
    """What the kernels take to attend to some keys; None for documents that are the queries'."""
    return KernelInputs(
        q=inputs.q,
        k=k,
        v=v,
        gate_logits=None,
        sink_logits=None,
        alibi_slopes=None,
        segment_ids=query_segments,
        key_segment_ids=key_segments,
    )


def _first_keys(inputs: KernelInputs, count: int) -> KernelInputs:
    """As `_with_keys`, of columns."""
    segments = inputs.key_segment_ids
    return inputs._replace(
        k=inputs.k[:, :count],
        v=inputs.v[:, :count],
        key_segment_ids=None if segments is None else segments[..., :count],
    )


def _last_queries(inputs: KernelInputs, first: int) -> KernelInputs:
    """As `_with_queries`, of columns."""
    segments = inputs.segment_ids
    return inputs._replace(
        q=inputs.q[:, first:],
        segment_ids=None if segments is None else segments[..., first:],
    )


# --- the derivative


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(plan: RingPlan, inputs: RingInputs) -> Array:
    """The ungated output [B, T, H*V], float32."""
    return _forward(plan, inputs).output


class _Saved(NamedTuple):
    """What the forward pass keeps for the backward pass."""

    inputs: RingInputs
    rows: Rows


def _ring_forward(plan: RingPlan, inputs: RingInputs) -> tuple[Array, _Saved]:
    rows = _saving(plan, inputs)
    # As of the op on one device: a policy that saves these names sends no keys again.
    rows = Rows(
        checkpoint_name(rows.output, OUT_NAME),
        checkpoint_name(rows.lse, STATISTIC_NAME),
    )
    return rows.output, _Saved(inputs, rows)


def _ring_backward(plan: RingPlan, saved: _Saved, do: Array) -> tuple[RingInputs]:
    gradients = differentiable_gradient(
        partial(_gradients, plan),
        partial(_plain, plan),
        saved,
        saved.inputs,
        do,
    )
    return (gradients,)


_ring.defvjp(_ring_forward, _ring_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _saving(plan: RingPlan, inputs: RingInputs) -> Rows:
    """The output and what the backward pass needs; its derivative is that of the output.

    Second derivatives differentiate the forward pass of the first ones.
    """
    return _forward(plan, inputs)


def _saving_forward(plan: RingPlan, inputs: RingInputs) -> tuple[Rows, _Saved]:
    rows = _saving(plan, inputs)
    return rows, _Saved(kept(inputs), rows)


def _saving_backward(plan: RingPlan, saved: _Saved, cotangents: Rows) -> tuple[RingInputs]:
    return _ring_backward(plan, saved, cotangents.output)


_saving.defvjp(_saving_forward, _saving_backward)


def _plain(plan: RingPlan, inputs: RingInputs) -> Array:
    """`_ring` for second derivatives: keys gathered, and attended to by XLA."""
    T = inputs.q.shape[1]
    causal = plan.options.causal
    device = lax.axis_index(plan.axis_name)
    counts = 2 if causal else 1
    length = T // counts

    def in_order(x: Array) -> Array:
        """[B, T, ...] of every device -> [B, size * T, ...], in the order of the sequence."""
        # [size, B, T, ...]: by device.
        every = lax.all_gather(x, plan.axis_name)
        if causal:
            # The later pieces are dealt out in reverse.
            early = every[:, :, :length]
            late = every[::-1, :, length:]
            every = jnp.concatenate([early, late], axis=0)
        # One after the other along the tokens.
        return jnp.concatenate(list(every), axis=1)

    keys = columns_as_heads(in_order(inputs.k), plan.own.K)
    values = columns_as_heads(in_order(inputs.v), plan.own.V)
    queries = columns_as_heads(inputs.q, plan.own.K)
    outputs = []
    for n, piece in enumerate((device, 2 * plan.size - 1 - device)[:counts]):
        first = piece * length
        segments = inputs.all_segments
        if segments is not None:
            segments = lax.dynamic_slice_in_dim(segments, first, length, axis=1)
        part = AttentionInputs(
            q=queries[:, n * length : (n + 1) * length],
            k=keys,
            v=values,
            sink_logits=inputs.sink_logits,
            segment_ids=segments,
            key_segment_ids=inputs.all_segments,
        )
        y = xla.attention(part, plan.options, first=first)
        assert isinstance(y, Array)
        outputs.append(y.astype(jnp.float32))
    y = jnp.concatenate(outputs, axis=1)
    return y.reshape(*y.shape[:2], -1)


# --- the forward pass


def _forward(plan: RingPlan, inputs: RingInputs) -> Rows:
    """The rows of this device's queries after the keys of every device."""
    device = lax.axis_index(plan.axis_name)
    half = inputs.q.shape[1] // 2
    own_segments = _segments_of(plan, inputs, device)
    # These leave before anything is computed, so that they arrive meanwhile.
    travelling = (_to_the_next(plan, inputs.k), _to_the_next(plan, inputs.v))

    def attend(step_plan: Plan, step_inputs: KernelInputs, before: Rows | None = None) -> Rows:
        continued = None if before is None else Before(before.output, before.lse)
        result = forward(step_plan, step_inputs, save=False, before=continued)
        return Rows(result.y, result.statistics[0])

    own = _inputs_of_step(inputs, inputs.k, inputs.v, own_segments, None)
    # A sink counts once, so in this step only.
    rows = attend(plan.own, own._replace(sink_logits=inputs.sink_logits))

    def step(carry: tuple, i: Array) -> tuple[tuple, None]:
        (k, v), rows = carry
        next_ones = (_to_the_next(plan, k), _to_the_next(plan, v))
        # After i steps the keys of the device i places before are here.
        source = (device - i) % plan.size
        key_segments = _segments_of(plan, inputs, source)
        all_pairs = _inputs_of_step(inputs, k, v, own_segments, key_segments)

        def of_earlier_tokens() -> Rows:
            return attend(plan.earlier, _first_keys(all_pairs, half), rows)

        def of_later_tokens() -> Rows:
            # The earlier half of the queries stays as it is.
            late = Rows(rows.output[:, half:], rows.lse[..., half:])
            seeing = attend(plan.later, _last_queries(all_pairs, half), late)
            return Rows(
                lax.dynamic_update_slice_in_dim(rows.output, seeing.output, half, axis=1),
                lax.dynamic_update_slice_in_dim(rows.lse, seeing.lse, half, axis=3),
            )

        # Which of the two is known on the device only; both take the same time.
        if plan.options.causal:
            rows = lax.cond(source < device, of_earlier_tokens, of_later_tokens)
        else:
            rows = attend(plan.earlier, all_pairs, rows)
        return (next_ones, rows), None

    (_, rows), _ = lax.scan(step, (travelling, rows), jnp.arange(1, plan.size))
    return rows


# --- the backward pass


class _KeyGradients(NamedTuple):
    """Sums that travel behind the keys they belong to, float32."""

    k: Float[Array, "B T Hk*K"]
    v: Float[Array, "B T Hk*V"]


def _gradients(plan: RingPlan, saved: _Saved, do: Array) -> RingInputs:
    """The gradients of a device's inputs."""
    inputs, rows = saved
    device = lax.axis_index(plan.axis_name)
    T = inputs.q.shape[1]
    half = T // 2
    own_segments = _segments_of(plan, inputs, device)
    travelling = (_to_the_next(plan, inputs.k), _to_the_next(plan, inputs.v))

    def gradients(step_plan: Plan, step_inputs: KernelInputs, first: int = 0) -> KernelInputs:
        """Of queries from `first` on; keys weigh what they do among all keys."""
        residuals = Residuals(
            inputs=step_inputs,
            outputs={0: rows.output[:, first:]},
            statistics=[rows.lse[..., first:]],
        )
        return backward(step_plan, residuals, do[:, first:])

    def in_float32(of_step: KernelInputs) -> tuple[Array, _KeyGradients]:
        dq, dk, dv = (x.astype(jnp.float32) for x in (of_step.q, of_step.k, of_step.v))
        return dq, _KeyGradients(dk, dv)

    own = _inputs_of_step(inputs, inputs.k, inputs.v, own_segments, None)
    # The gradient of a sink needs rows alone, so it is complete here.
    of_own = gradients(plan.own, own._replace(sink_logits=inputs.sink_logits))
    dq, dkeys = in_float32(of_own)

    def step(carry: tuple, i: Array) -> tuple[tuple, None]:
        (k, v), dq, dkeys = carry
        next_ones = (_to_the_next(plan, k), _to_the_next(plan, v))
        # What the device before has added up for the keys that are here now.
        so_far = jax.tree.map(partial(_to_the_next, plan), dkeys)
        source = (device - i) % plan.size
        key_segments = _segments_of(plan, inputs, source)
        all_pairs = _inputs_of_step(inputs, k, v, own_segments, key_segments)

        def of_earlier_tokens() -> tuple[Array, _KeyGradients]:
            of_step = gradients(plan.earlier, _first_keys(all_pairs, half))
            dq_of_step, dkeys_of_step = in_float32(of_step)
            # The other half of the keys is seen by none of these queries.
            whole = [jnp.pad(x, ((0, 0), (0, T - half), (0, 0))) for x in dkeys_of_step]
            return dq + dq_of_step, _KeyGradients(*whole)

        def of_later_tokens() -> tuple[Array, _KeyGradients]:
            of_step = gradients(plan.later, _last_queries(all_pairs, half), half)
            dq_of_step, dkeys_of_step = in_float32(of_step)
            return dq.at[:, half:].add(dq_of_step), dkeys_of_step

        # Which of the two is known on the device only; both take the same time.
        if plan.options.causal:
            dq, dkeys_of_step = lax.cond(source < device, of_earlier_tokens, of_later_tokens)
        else:
            dq_of_step, dkeys_of_step = in_float32(gradients(plan.earlier, all_pairs))
            dq = dq + dq_of_step
        # Added here, so that what travels need not be there before the kernel begins.
        dkeys = jax.tree.map(jnp.add, so_far, dkeys_of_step)
        return (next_ones, dq, dkeys), None

    carry = (travelling, dq, dkeys)
    (_, dq, dkeys), _ = lax.scan(step, carry, jnp.arange(1, plan.size))
    # After the last step they are one device away from home.
    dkeys = jax.tree.map(partial(_to_the_next, plan), dkeys)
    return RingInputs(
        q=dq.astype(inputs.q.dtype),
        k=dkeys.k.astype(inputs.k.dtype),
        v=dkeys.v.astype(inputs.v.dtype),
        sink_logits=of_own.sink_logits,
        all_segments=None,
    )
