"""linear_scan's TPU kernels, interpreted on CPU: values, gradients, promises, and that these tests
can fail.
"""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms, slow
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scan_cases import (
    BF16,
    CASES,
    DECAYS,
    MAKE_KEYS,
    OPTIONS,
    SEGMENTS,
    compare,
    fast_jit,
    make,
    total,
)

from kernels_pallas import dispatch
from kernels_pallas.common.mesh import mesh_axes
from kernels_pallas.linear_scan.tpu import scalar_decay, vector_decay_backward
from kernels_pallas.linear_scan.tpu import tile as tpu_tile
from kernels_pallas.linear_scan.xla import OUT_NAME, STATES_NAME
from kernels_pallas.ops import RESIDUAL_NAMES, linear_scan

compare_tpu = partial(compare, implementation="tpu", chunk_size=16)
scan_tpu = partial(linear_scan, implementation="tpu", interpret=True, chunk_size=16)
low = lambda inputs, dtype=jnp.float32: {n: jnp.asarray(x, dtype) for n, x in inputs.items()}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rank", [3, 4])
def test_any_decay(rank, decay):
    """Packed and exclusive with a bonus: every term there is. Compiled once a rank."""
    compare_tpu(
        make(H=1, rank=rank, decay=decay, bonus=True), segment_ids=SEGMENTS, inclusive=False
    )


@pytest.mark.parametrize("rank", [3, 4])
def test_minus_infinity_is_a_decay_of_zero(rank):
    x = make(H=1, rank=rank, decay="mixture", bonus=True)
    infinite = x | {"log_decay": np.where(x["log_decay"] < -1000, -np.inf, x["log_decay"])}
    got, want = (compare_tpu(y, segment_ids=SEGMENTS, inclusive=False) for y in (infinite, x))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.slow
@pytest.mark.parametrize("decay", [slow("near zero"), slow("gla"), "mixture"])
def test_inclusive_in_whole_blocks(decay):
    """T a multiple of the grid's steps: no masks."""
    compare_tpu(make(B=1, H=1, T=64, decay=decay))


@pytest.mark.parametrize("rank, T", [slow(3, 2), slow(4, 1), (4, 65)])
def test_any_length(rank, T):
    compare_tpu(make(B=1, H=1, T=T, rank=rank, decay="mixture"))


@pytest.mark.slow
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", [63, 64, 1000])
def test_lengths_at_the_default_chunk(T, decay):
    compare_tpu(make(B=1, H=1, T=T, K=32, V=48, decay=decay), chunk_size=None)


SLOW_CASES = (
    "segments",
    "scalar segments",
    "constant, grouped, exclusive",
    "scalar, normalize, reverse",
    "undecayed segments, reverse",
)


@pytest.mark.parametrize("name", [slow(name) if name in SLOW_CASES else name for name in CASES])
def test_options(name):
    case = dict(CASES[name])
    segment_ids = SEGMENTS[:1] if case.pop("segments", False) else None
    if "Hk" in case:  # many heads in one program: the quicker kernel to compile
        case["rank"] = min(3, case.get("rank", 3))
    x = make(B=1, decay="mixture", **{"H": 1} | {n: case[n] for n in MAKE_KEYS if n in case})
    compare_tpu(x, segment_ids=segment_ids, **{n: case[n] for n in OPTIONS if n in case})


@pytest.mark.slow
def test_more_query_heads_to_a_key_head_than_a_grid_step_has():
    """Nine heads go in steps of three: the gradient of the one key head is a sum over steps."""
    compare_tpu(make(B=1, T=20, H=9, Hk=1, Hv=3, rank=3))


@pytest.mark.parametrize("rank", [slow(3), 4])
@pytest.mark.parametrize("decay", ["gla", slow("heavy tail")])
def test_bfloat16(rank, decay):
    compare_tpu(
        make(B=1, H=1, K=8, V=16, rank=rank, decay=decay), dtype=jnp.bfloat16, tolerance=BF16
    )


@pytest.mark.parametrize("rank", [slow(3), 4])
@pytest.mark.parametrize("decay", ["near zero", slow("gla"), slow("mixture")])
def test_bfloat16_as_the_matrix_unit_rounds(rank, decay, monkeypatch):
    """Interpreted matmuls round nothing. On the machine operands are bfloat16: so the errors there,
    not below BF16.
    """
    room = importlib.import_module("kernels_pallas.linear_scan.tpu.op")
    monkeypatch.setattr(room, "_plan", rounded(room._plan))
    x = make(B=1, H=1, K=8, V=16, rank=rank, decay=decay)
    compare_tpu(x, dtype=jnp.bfloat16, tolerance=4e-3, trace="rounding")


def test_scores_are_saved_for_the_backward_kernel(monkeypatch):
    """Two heads of three chunks, from the last to the first, packed."""
    room = importlib.import_module("kernels_pallas.linear_scan.tpu.op")
    monkeypatch.setattr(room, "_plan", rounded(room._plan))
    x = make(B=1, H=2, K=8, V=16, T=40, rank=4, decay="mixture")
    options = dict(reverse=True, segment_ids=SEGMENTS[:1, :40])
    loss = partial(total, implementation="tpu", interpret=True, chunk_size=16, **options)
    # [B, H, chunks, C, C]; the last grid step of two chunks is half empty.
    assert "bf16[1,2,4,16,16]" in str(jax.make_jaxpr(jax.grad(loss))(low(x, jnp.bfloat16)))
    compare_tpu(x, dtype=jnp.bfloat16, tolerance=4e-3, trace="rounding", **options)


def rounded(plan):
    """Every operand of a matmul rounded to bfloat16 before it."""

    def make_plan(*args):
        made = plan(*args)
        early = {n: getattr(made, n)._replace(round_early=True) for n in ("forward", "backward")}
        return made._replace(rounds=True, **early)

    return make_plan


@pytest.mark.slow
def test_float16():
    compare_tpu(make(B=1, H=1, rank=3), dtype=jnp.float16, tolerance=BF16 / 4)


# --- what the tests above would miss: are they able to fail?


MODULES = {
    "read_and_update": tpu_tile,
    "read_and_update_backward": tpu_tile,
    "backward": vector_decay_backward,
    "dlog_decay_of_pairs": scalar_decay,
}


def replaced(name: str, change):
    """The function with its result changed; generators stay generators."""
    right = getattr(MODULES[name], name)
    if name in ("read_and_update", "dlog_decay_of_pairs"):
        return change(right)

    def generator(*args):
        return change((yield from right(*args)))

    return generator


times = lambda x, **factors: x._replace(**{n: f * getattr(x, n) for n, f in factors.items()})
PLANTED = {
    "state not read": ("read_and_update", lambda f: lambda t, s, *a: f(t, times(s, reads=0.0), *a)),
    "state not decayed": (
        "read_and_update",
        lambda f: lambda t, s, *a: f(t, s._replace(total=1.0), *a),
    ),
    "reads 1e-5 too large": (
        "read_and_update",
        lambda f: lambda t, s, *a: f(t, times(s, reads=1 + 1e-5), *a),
    ),
    "state gate gradient lost": ("read_and_update_backward", lambda d: times(d, dlog_total=0.0)),
    "state cotangent lost": ("read_and_update_backward", lambda d: times(d, dstate=0.0)),
    "gate gradient flipped": ("backward", lambda d: (*d[:2], -d[2])),
    "scalar gate gradient flipped": ("dlog_decay_of_pairs", lambda f: lambda *a: -f(*a)),
}


@pytest.mark.slow
@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_found(error, monkeypatch):
    name, change = PLANTED[error]
    monkeypatch.setattr(MODULES[name], name, replaced(name, change))
    with pytest.raises(
        AssertionError, match=r"'o': |non-finite"
    ):  # an error of some size, not a crash
        compare_tpu(make(B=1, H=1, T=40, rank=4 if name == "backward" else 3), trace=error)


# --- transformations


@pytest.mark.slow
def test_vmap():
    pairs = [low(make(seed, B=1, H=1, T=20, rank=3, bonus=True)) for seed in (1, 2)]
    both = jax.tree.map(lambda *a: jnp.stack(a), *pairs)
    options = dict(inclusive=False, chunk_size=16)
    got = fast_jit(
        jax.vmap(jax.grad(partial(total, implementation="tpu", interpret=True, **options)))
    )(both)
    want = fast_jit(jax.vmap(jax.grad(partial(total, **options))))(both)
    assert max(rel_rms(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want))) <= 1e-5


def test_residuals_have_names_and_checkpoint_recomputes():
    x = low(make(B=1, H=1, rank=3))
    loss = partial(total, implementation="tpu", interpret=True, chunk_size=16)
    assert all(name in str(jax.make_jaxpr(jax.grad(loss))(x)) for name in (OUT_NAME, STATES_NAME))
    policy = jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)
    again = jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(x)
    assert str(again).count("name=linear_scan_forward") == 1, "the forward kernel runs again"
    got, want = fast_jit(jax.grad(jax.checkpoint(loss)))(x), fast_jit(jax.grad(loss))(x)
    assert max(rel_rms(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want))) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("rank", [slow(1), 4])
def test_shard_map_with_varying_axes_checked(rank):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x = low(make(B=2, H=1, T=20, rank=rank, bonus=True))
    specs = {n: P() if n == "bonus" or (n == "log_decay" and rank == 1) else P("data") for n in x}
    segment_ids = jnp.asarray(np.repeat(np.arange(5), 4)[None].repeat(2, 0))

    def loss(x, segment_ids, **options):
        return (linear_scan(**x, inclusive=False, segment_ids=segment_ids, **options) ** 2).sum()

    @jax.shard_map(mesh=mesh, in_specs=(specs, P("data")), out_specs=(P(), specs), check_vma=True)
    def sharded(x, segment_ids):
        run = partial(loss, implementation="tpu", interpret=True)
        return jax.value_and_grad(lambda x: jax.lax.psum(run(x, segment_ids), "data"))(x)

    got, want = (
        fast_jit(sharded)(x, segment_ids),
        fast_jit(jax.value_and_grad(loss))(x, segment_ids),
    )
    assert max(rel_rms(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want))) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "names, axis_type", [(("data", "tensor"), AxisType.Auto), slow(("x", "y"), AxisType.Explicit)]
)
def test_jit_on_a_mesh_cuts_rows_and_heads(names, axis_type):
    """Auto axes by their names, Explicit ones by their arguments' types."""
    mesh = jax.make_mesh((2, 2), names, axis_types=(axis_type,) * 2)
    x = low(make(B=2, T=20, rank=3, bonus=True))
    tokens = P(names[0], None, names[1])
    specs = {n: {"bonus": P(names[1]), "initial_state": P(*names)}.get(n, tokens) for n in x}
    loss = partial(total, inclusive=False, chunk_size=16)
    want = fast_jit(jax.value_and_grad(loss))(x)
    with jax.set_mesh(mesh):
        placed = {n: jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in x.items()}
        gradient = fast_jit(jax.value_and_grad(partial(loss, implementation="tpu", interpret=True)))
        compiled = gradient.lower(placed).compile()
    assert "all-gather" not in compiled.as_text()
    got = compiled(placed)
    assert max(rel_rms(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want))) <= 1e-5


def test_mesh_axes_of_other_names_are_right_but_not_cut_unless_told():
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
    x = low(make(B=2, T=20, rank=0))
    run = lambda: fast_jit(
        partial(linear_scan, implementation="tpu", interpret=True, chunk_size=16)
    )
    with jax.set_mesh(mesh):
        plain = run()(**x)
        with mesh_axes(rows=("rows",), heads=()):
            cut = run()(**x)
    assert rel_rms(plain, linear_scan(**x)) <= 1e-6 and rel_rms(cut, plain) <= 1e-6
    assert cut.sharding.spec == P("rows") and plain.sharding.is_fully_replicated


@pytest.mark.slow
def test_no_races():
    """The TPU interpreter follows DMAs and semaphores; a read before its copy has ended raises."""
    x = low(make(B=1, H=1, T=48, rank=3))
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    loss = partial(total, implementation="tpu", chunk_size=16)
    got = jax.grad(partial(loss, interpret=interpret))(x)
    want = fast_jit(jax.grad(partial(loss, interpret=True)))(x)
    assert max(rel_rms(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want))) <= 1e-6


# --- refusals


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((1, 4, 1, 513), {}, "K and V up to 512"),
        ((1, 4, 1, 8), dict(chunk_size=8), "chunk_size from 16 to 128, not 8"),
        ((1, 4, 1, 8), dict(chunk_size=256), "chunk_size from 16 to 128, not 256"),
    ],
)
def test_what_the_kernel_refuses_by_name(shape, options, message):
    x = jnp.zeros(shape)
    with pytest.raises(NotImplementedError, match=message):
        linear_scan(x, x, x, implementation="tpu", **options)
    linear_scan(x, x, x, **options)
    assert dispatch.last_choice("linear_scan").implementation == "xla"


def test_float64_is_refused():
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="float64"):
        scan_tpu(*[jnp.zeros((1, 4, 1, 8))] * 3)
