"""The programs of jax that are timed: ops at shapes, by each implementation, one for each pass."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.gpu import cases
from benchmarks.gpu.cases import (
    AttentionShape,
    Cost,
    DeltaShape,
    ExpertShape,
    GroupedShape,
    ScanShape,
    ScanStepShape,
    StepShape,
)
from kernels_pallas.ops import (
    attention,
    attention_step,
    delta_scan,
    expert_mlp,
    grouped_matmul,
    linear_scan,
    linear_scan_step,
)

Spec = jax.ShapeDtypeStruct
Specs = tuple[Any, ...]

FORWARD = "fwd"
BOTH = "both"


class Built(NamedTuple):
    """A function, the shapes of its arguments, and what a call costs."""

    function: Callable
    specs: Specs
    cost: Cost


class Program(NamedTuple):
    """A line of the results. `build` may fail, where a library is missing or refuses the shape."""

    case: str
    implementation: str
    build: Callable[[], Built]


def kernel_options(dry: bool) -> dict[str, Any]:
    """The arguments by which an op takes its GPU kernel."""
    if dry:
        return {"implementation": "gpu", "interpret": True}
    return {"implementation": "gpu"}


def our_options(implementation: str, dry: bool) -> dict[str, Any]:
    """The arguments by which an op takes one of our two implementations."""
    return kernel_options(dry) if implementation == cases.OURS else {"implementation": "xla"}


def programs(dry: bool) -> list[Program]:
    """All of them, in the order of `cases.timed`."""
    found = []
    for shape, implementations in cases.timed(dry):
        for implementation in implementations:
            found += programs_of(shape, implementation, dry)
    return found


def programs_of(shape: cases.Shape, implementation: str, dry: bool) -> list[Program]:
    """Those of an implementation at a shape: one for each pass."""
    match shape:
        case ScanShape():
            function = scan_function(shape, implementation, dry)
            specs = scan_specs(shape)
            differentiable = tuple(range(len(specs)))
        case DeltaShape():
            function = delta_function(implementation, dry)
            specs = delta_specs(shape)
            differentiable = tuple(range(len(specs)))
        case AttentionShape():
            function = attention_function(shape, implementation, dry)
            specs = attention_specs(shape)
            differentiable = tuple(range(len(specs)))
        case GroupedShape() if implementation == cases.DENSE:
            return [_dense_program(shape)]
        case GroupedShape():
            function = grouped_function(implementation, dry)
            specs = grouped_specs(shape)
            differentiable = (0, 1)  # not the group sizes
        case ExpertShape():
            function = partial(expert_mlp, **our_options(implementation, dry))
            specs = expert_specs(shape)
            differentiable = (0, 1, 2, 3)
        case StepShape():
            return [_step_program(shape, implementation, dry)]
        case ScanStepShape():
            return [_scan_step_program(shape, implementation)]
    costs = shape.costs()
    forward = partial(Built, function, specs, costs[FORWARD])
    both = partial(_build_both, function, specs, differentiable, costs[BOTH])
    return [
        Program(f"{shape.case} {FORWARD}", implementation, forward),
        Program(f"{shape.case} {BOTH}", implementation, both),
    ]


def _build_both(
    function: Callable,
    specs: Specs,
    differentiable: tuple[int, ...],
    cost: Cost,
) -> Built:
    """Forward and backward in one program; the cotangent of the result is its last argument.

    Args:
      function: the forward pass.
      specs: its arguments' shapes.
      differentiable: the places of the arguments whose gradients are wanted.
      cost: of both passes.

    Returns:
      The function that gives the result and the gradients.
    """

    def both(*arguments: Array) -> tuple[Array, tuple[Array, ...]]:
        *inputs, cotangent = arguments

        def forward(*values: Array) -> Array:
            filled = list(inputs)
            for place, value in zip(differentiable, values):
                filled[place] = value
            return function(*filled)

        result, vjp = jax.vjp(forward, *(inputs[place] for place in differentiable))
        return result, vjp(cotangent)

    cotangent = jax.eval_shape(function, *specs)
    return Built(both, (*specs, cotangent), cost)


# --- linear_scan


def scan_specs(shape: ScanShape) -> Specs:
    """q, k, v, log decays."""
    B, T, H, K, V, decay = shape
    logs = (B, T, H, K) if decay == "vector" else (B, T, H)
    return (
        Spec((B, T, H, K), jnp.bfloat16),
        Spec((B, T, H, K), jnp.bfloat16),
        Spec((B, T, H, V), jnp.bfloat16),
        Spec(logs, jnp.float32),
    )


def scan_function(shape: ScanShape, implementation: str, dry: bool) -> Callable:
    match implementation:
        case cases.OURS | cases.OUR_XLA:
            return partial(linear_scan, **our_options(implementation, dry))
        case cases.JLA if shape.decay == "vector":
            return _jla_vector_scan
        case cases.JLA:
            return _jla_scalar_scan
    raise ValueError(f"implementation of linear_scan: got {implementation!r}")


def _jla_vector_scan(*arrays: Array) -> Array:
    from jla.ops.mosaic_gpu.gla import gla

    return gla(*arrays)[0]


def _jla_scalar_scan(*arrays: Array) -> Array:
    from jla.ops.mosaic_gpu.scalar_gate import simple_gla

    return simple_gla(*arrays)[0]


# --- delta_scan


def delta_specs(shape: DeltaShape) -> Specs:
    """q, k, v, beta, log decays."""
    *qkv, logs = scan_specs(ScanShape(*shape))
    return (*qkv, Spec((shape.B, shape.T, shape.H), jnp.float32), logs)


def delta_function(implementation: str, dry: bool) -> Callable:
    if implementation == cases.OURS:
        return partial(delta_scan, l2_norm=True, **kernel_options(dry))
    raise ValueError(f"implementation of delta_scan: got {implementation!r}")


# --- attention


def attention_specs(shape: AttentionShape) -> Specs:
    """q, k, v and, where there are any, the logits of the gate and of the sinks."""
    B, T, H, Hk, D, gated, options = shape
    q = Spec((B, T, H, D), jnp.bfloat16)
    k = Spec((B, T, Hk, D), jnp.bfloat16)
    specs = [q, k, k]
    if gated:
        specs.append(q)
    if "sinks" in dict(options):
        specs.append(Spec((H,), jnp.float32))
    return tuple(specs)


def attention_function(shape: AttentionShape, implementation: str, dry: bool) -> Callable:
    match implementation:
        case cases.OURS:
            return partial(_our_attention, shape, kernel_options(dry))
        case cases.OUR_MOSAIC_GPU:
            return partial(_our_attention, shape, {"implementation": "mosaic_gpu"})
        case cases.CUDNN:
            # It has no gate: XLA fuses that into a pass over the output.
            return partial(_our_attention, shape, {"implementation": "cudnn"})
        case cases.JLA:
            return _jla_attention
    raise ValueError(f"implementation of attention: got {implementation!r}")


def _our_attention(
    shape: AttentionShape,
    how: dict[str, Any],
    q: Array,
    k: Array,
    v: Array,
    *others: Array,
) -> Array:
    """The op with the options of a shape.

    Args:
      shape: says which options there are.
      how: the arguments that choose the implementation.
      q, k, v: as of the op.
      *others: the remaining arrays of `attention_specs`.
    """
    left = list(others)
    options = dict(shape.options)
    arrays: dict[str, Array] = {}
    if shape.gated:
        arrays["gate_logits"] = left.pop(0)
    if options.pop("sinks", False):
        arrays["sink_logits"] = left.pop(0)
    if options.pop("slopes", False):
        # ALiBi's: 2^(-8 h / H).
        arrays["alibi_slopes"] = 2.0 ** (-8 * jnp.arange(1, shape.H + 1) / shape.H)
    if "documents" in options:
        document = jnp.arange(shape.T, dtype=jnp.int32) // options.pop("documents")
        arrays["segment_ids"] = jnp.broadcast_to(document, (shape.B, shape.T))
    return attention(q, k, v, **arrays, **options, **how)


def _jla_attention(q: Array, k: Array, v: Array) -> Array:
    from jla.ops.mosaic_gpu.attention import flash_attention

    found = flash_attention(q, k, v)
    return found[0] if isinstance(found, tuple) else found


# --- grouped_matmul


def grouped_specs(shape: GroupedShape) -> Specs:
    """Rows, matrices, group sizes."""
    M, K, N, G = shape
    return (
        Spec((M, K), jnp.bfloat16),
        Spec((G, K, N), jnp.bfloat16),
        Spec((G,), jnp.int32),
    )


def grouped_function(implementation: str, dry: bool) -> Callable:
    match implementation:
        case cases.OURS:
            return partial(grouped_matmul, **kernel_options(dry))
        case cases.RAGGED_DOT:
            return jax.lax.ragged_dot
        case cases.JLA:
            return _jla_ragged_dot
    raise ValueError(f"implementation of grouped_matmul: got {implementation!r}")


def _jla_ragged_dot(lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    from jla.ops.mosaic_gpu.ragged_dot import ragged_dot

    return ragged_dot(lhs, rhs, group_sizes)


def _dense_program(shape: GroupedShape) -> Program:
    """All rows times one matrix: what no grouped product can surpass."""
    M, K, N, _ = shape
    specs = (Spec((M, K), jnp.bfloat16), Spec((K, N), jnp.bfloat16))
    cost = Cost(shape.costs()[FORWARD].flops, 0)
    return Program(
        f"{shape.case} {FORWARD}",
        cases.DENSE,
        partial(Built, jnp.matmul, specs, cost),
    )


# --- expert_mlp


def expert_specs(shape: ExpertShape) -> Specs:
    """Rows, the matrices of gate, up and down, group sizes."""
    R, M, F, G = shape
    up = Spec((G, M, F), jnp.bfloat16)
    return (
        Spec((R, M), jnp.bfloat16),
        up,
        up,
        Spec((G, F, M), jnp.bfloat16),
        Spec((G,), jnp.int32),
    )


# --- linear_scan_step


def _scan_step_program(shape: ScanStepShape, implementation: str) -> Program:
    name = "gpu" if implementation == cases.OURS else "xla"
    return Program(
        shape.case,
        implementation,
        partial(
            Built, partial(_scan_steps, shape.steps, name), scan_step_specs(shape), shape.cost()
        ),
    )


def scan_step_specs(shape: ScanStepShape) -> Specs:
    """q, k, v of a token, log decays, the states."""
    B, H, K, V, _ = shape
    return (
        Spec((B, H, K), jnp.bfloat16),
        Spec((B, H, K), jnp.bfloat16),
        Spec((B, H, V), jnp.bfloat16),
        Spec((B, H, K), jnp.float32),
        Spec((B, H, K, V), jnp.float32),
    )


def _scan_steps(
    steps: int,
    implementation: str,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    state: Array,
) -> tuple[Array, Array]:
    """Steps in a loop, whose carry is updated in place. The last states, and the outputs.

    Args:
      steps: how many.
      implementation: of the op.
      q, k, v, log_decay, state: as of the op, the same token at every step.
    """

    def step(state: Array, _: None) -> tuple[Array, Array]:
        o, state = linear_scan_step(q, k, v, state, log_decay, implementation=implementation)
        return state, o

    return jax.lax.scan(step, state, None, length=steps)


# --- attention_step


def _step_program(shape: StepShape, implementation: str, dry: bool) -> Program:
    function = partial(_our_step, our_options(implementation, dry))
    return Program(
        shape.case,
        implementation,
        partial(Built, function, step_specs(shape), shape.cost()),
    )


def step_specs(shape: StepShape) -> Specs:
    """q, the caches of k and v, the slots that hold a token."""
    B, S, H, Hk, D = shape
    return (
        Spec((B, H, D), jnp.bfloat16),
        Spec((B, S, Hk, D), jnp.bfloat16),
        Spec((B, S, Hk, D), jnp.bfloat16),
        Spec((B, S), jnp.bool_),
    )


def _our_step(
    options: dict[str, Any],
    q: Array,
    k_cache: Array,
    v_cache: Array,
    valid: Array,
) -> Array:
    return attention_step(q, k_cache, v_cache, valid=valid, **options)
