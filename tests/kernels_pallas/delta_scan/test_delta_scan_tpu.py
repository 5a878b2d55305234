"""delta_scan's TPU kernels, interpreted on CPU: values, gradients, promises, and that these tests
can fail.
"""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_cases import (
    BF16,
    BF16_CORRELATED,
    CASES,
    SEGMENTS,
    case_of,
    compare,
    fast_jit,
    make,
    outputs_and_gradients,
    weights_for,
)
from helpers import rel_rms, slow
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import dispatch
from kernels_pallas.delta_scan.tpu import scalar_decay, vector_decay_backward
from kernels_pallas.delta_scan.tpu import tile as tpu_tile
from kernels_pallas.delta_scan.xla import OUT_NAME, STATES_NAME
from kernels_pallas.ops import delta_scan, delta_scan_step

compare_tpu = partial(compare, implementation="tpu", chunk_size=16)
tpu = dict(implementation="tpu", interpret=True)


@pytest.fixture(autouse=True)
def programs_are_not_kept():
    """XLA was seen to crash once while it wrote one of these programs to the compilation cache."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


def low(inputs, dtype=jnp.float32):
    return {n: jnp.asarray(x, dtype) for n, x in inputs.items()}


def test_vector_decay():
    """All there is: decays of any size, documents, normalized keys, T that ends inside a chunk."""
    inputs = make(B=1, H=1, decay="mixture")
    compare_tpu(inputs, segment_ids=SEGMENTS[:1], l2_norm=True)


def test_scalar_decay_and_grouped_heads():
    inputs = make(B=1, T=33, H=2, Hq=1, Hk=2, rank=3, decay="mixture", beta=1.99)
    compare_tpu(inputs, segment_ids=SEGMENTS[:1, :33])


def test_no_decay_and_correlated_keys():
    compare_tpu(make(B=1, T=32, H=1, rank=0, cosine=0.7))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_options(name):
    inputs, options = case_of(name)
    compare_tpu(inputs, **options)


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("rank", [0, 3, 4])
def test_lengths_at_the_default_chunk(T, rank):
    compare_tpu(make(B=1, H=1, T=T, K=16, V=24, rank=rank, decay="gla"), chunk_size=None)


@pytest.mark.slow
@pytest.mark.parametrize("K, V", [(96, 192), (160, 16), (256, 300)])
def test_sizes(K, V):
    """Channels that fill no whole register, and more than one."""
    compare_tpu(make(B=1, H=1, T=20, K=K, V=V, rank=3))


@pytest.mark.slow
def test_more_states_to_a_key_head_than_a_grid_step_has():
    """Nine states go in steps of three: the gradient of the one key head is a sum over steps."""
    compare_tpu(make(B=1, T=20, H=9, Hq=3, Hk=1, rank=3))


@pytest.mark.slow
def test_equal_keys_and_beta_two():
    """The hardest legal call: float32 rounds the truth itself, so the bar is wider."""
    compare_tpu(make(B=1, H=1, rank=0, cosine=1.0, beta=2.0), tolerance=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    inputs = make(B=1, H=1, K=16, V=16, rank=3)
    compare_tpu(inputs, dtype=dtype, tolerance=BF16)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 3, 4])
@pytest.mark.parametrize("cosine, tolerance", [(0.0, BF16), (0.9, BF16_CORRELATED)])
@pytest.mark.parametrize("T, K, chunk_size", [(64, 16, 16), (130, 128, None)])
def test_bfloat16_as_the_matrix_unit_rounds(
    rank,
    cosine,
    tolerance,
    T,
    K,
    chunk_size,
    monkeypatch,
):
    """Interpreted matmuls round nothing; here the operands are rounded as on the machine, but for
    those of the inverse.
    """
    room = importlib.import_module("kernels_pallas.delta_scan.tpu.op")
    plan = room._plan
    monkeypatch.setattr(room, "_plan", lambda *args: plan(*args)._replace(rounds=True))
    inputs = make(B=1, H=1, T=T, K=K, V=16, rank=rank, cosine=cosine)
    # Another scale, so that nothing is found in the cache of jit.
    options = dict(chunk_size=chunk_size, scale=0.2501)
    compare_tpu(inputs, dtype=jnp.bfloat16, tolerance=tolerance, **options)


def test_decoding_step():
    inputs, _ = case_of("Gated DeltaNet-2", T=1, H=2)
    kinds = [inputs, make(T=1, H=4, Hq=2, Hk=1, rank=3), make(T=1, rank=0)]
    for x in kinds:
        x = low(x)
        state = x.pop("initial_state")
        token = {n: y[:, 0] for n, y in x.items()}
        step = partial(delta_scan_step, **token, state=state, l2_norm=True)
        want = step(implementation="reference")
        got = fast_jit(partial(step, **tpu))()
        assert max(map(rel_rms, got, want)) < 2e-6


# --- what the tests above would miss: are they able to fail?

# Every one with a scale of its own: nothing of another is found in the cache of jit.
PLANTED = {
    "state not decayed": (tpu_tile, "read_and_update", dict(totals=(1.0,))),
    "state not read by erase keys": (tpu_tile, "read_and_update", dict(erases=0.0)),
    "scores of erase keys not inverted": (tpu_tile, "inverse", 0.0),
    "scores 1e-4 too large": (tpu_tile, "inverse", 1 + 1e-4),
}
PLANTED_IN_GRADIENTS = {
    "erase scores get no gradient": ("derase_scores", 0.0),
    "state gate gradient lost": ("dlog_total", 0.0),
    "state cotangent lost": ("dstate", 0.0),
    "erase keys flipped": ("derases", -1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_found(error, monkeypatch):
    module, name, change = PLANTED[error]
    right = getattr(module, name)

    def wrong_update(options, terms, *args):
        changed = {n: f * getattr(terms, n) if f == 0 else f for n, f in change.items()}
        return (yield from right(options, terms._replace(**changed), *args))

    def wrong_inverse(options, terms, *solved):
        if solved:
            # The backward kernel goes on from what the forward kernel has made.
            return (yield from right(options, terms, *solved))
        changed = terms._replace(
            erase_blocks=change * terms.erase_blocks,
            erase_rows=tuple([change * x for x in rows] for rows in terms.erase_rows),
        )
        return (yield from right(options, changed))

    monkeypatch.setattr(module, name, wrong_update if name != "inverse" else wrong_inverse)
    with pytest.raises(AssertionError, match="'o': "):
        compare_tpu(make(B=1, H=1, T=40, rank=3), scale=0.3 + 1e-3 * list(PLANTED).index(error))


@pytest.mark.slow
@pytest.mark.parametrize("error", PLANTED_IN_GRADIENTS)
@pytest.mark.parametrize("rank", [3, 4])
def test_planted_errors_in_gradients_are_found(error, rank, monkeypatch):
    name, factor = PLANTED_IN_GRADIENTS[error]
    right = tpu_tile.read_and_update_backward

    def wrong(*args):
        cotangents = yield from right(*args)
        return cotangents._replace(**{name: factor * getattr(cotangents, name)})

    monkeypatch.setattr(tpu_tile, "read_and_update_backward", wrong)
    with pytest.raises(AssertionError, match="'o': "):
        compare_tpu(
            make(B=1, H=1, T=40, rank=rank),
            scale=0.4 + 1e-3 * list(PLANTED_IN_GRADIENTS).index(error),
        )


@pytest.mark.slow
@pytest.mark.parametrize("module", [scalar_decay, vector_decay_backward])
def test_a_flipped_gate_gradient_is_found(module, monkeypatch):
    name = "dlog_decay" if module is scalar_decay else "backward"
    right = getattr(module, name)

    def wrong_row(*args):
        return -right(*args)

    def wrong_rows(*args):
        *others, dlog_decay = right(*args)
        return *others, -dlog_decay

    monkeypatch.setattr(module, name, wrong_row if module is scalar_decay else wrong_rows)
    rank = 3 if module is scalar_decay else 4
    with pytest.raises(AssertionError, match="'log_decay': "):
        compare_tpu(make(B=1, H=1, T=40, rank=rank), scale=0.31)


# --- what stays where it is


@pytest.mark.parametrize(
    "name",
    [slow("q"), slow("k"), "v", slow("beta"), slow("log_decay"), slow("initial_state"), slow("do")],
)
@pytest.mark.parametrize("value", [np.nan, slow(np.inf)])
def test_non_finite_numbers_reach_only_what_sees_them(name, value):
    """Exactly where the recurrence has a non-finite number, values and gradients alike."""
    inputs = make(B=1, H=1, rank=3)
    weights = weights_for(inputs)
    token = (0, 20, 0)
    if name == "do":
        weights[0][(*token, 2)] = value
    elif name == "initial_state":
        inputs[name][0, 0, 2, 3] = value
    else:
        inputs[name][(*token, 2) if inputs[name].ndim == 4 else token] = value
    arrays = low(inputs), SEGMENTS[:1], tuple(map(jnp.float32, weights))
    got = outputs_and_gradients(*arrays, chunk_size=16, **tpu)
    want = outputs_and_gradients(*arrays, implementation="reference")
    bad = 0
    for key in want:
        finite = np.isfinite(want[key])
        assert (np.isfinite(got[key]) == finite).all(), key
        assert rel_rms(np.where(finite, got[key], 0), np.where(finite, want[key], 0)) < 2e-6
        bad += (~finite).sum()
    assert bad > 0


# --- transformations


def total(x, **options):
    o, state = delta_scan(**x, return_final_state=True, **options)
    return (o.astype(jnp.float32) ** 2).sum() + (state**2).sum()


total_tpu = partial(total, chunk_size=16, **tpu)


def close(got, want, tolerance=1e-5):
    errors = map(rel_rms, jax.tree.leaves(got), jax.tree.leaves(want))
    assert max(errors) <= tolerance


@pytest.mark.slow
def test_vmap():
    pairs = [low(make(seed, B=1, H=1, T=20, rank=3)) for seed in (1, 2)]
    both = jax.tree.map(lambda *a: jnp.stack(a), *pairs)
    close(
        fast_jit(jax.vmap(jax.grad(total_tpu)))(both),
        fast_jit(jax.vmap(jax.grad(total)))(both),
    )


@pytest.mark.slow
def test_residuals_have_names_and_checkpoint_recomputes():
    x = low(make(B=1, H=1, T=20, rank=3))

    def loss(x):
        """Of o alone: a final state that is used has no name and is computed again."""
        return (delta_scan(**x, chunk_size=16, **tpu) ** 2).sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(x))
    assert all(name in text for name in (OUT_NAME, STATES_NAME))
    policy = jax.checkpoint_policies.save_only_these_names(OUT_NAME, STATES_NAME)
    again = jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(x)
    assert str(again).count("name=delta_scan_forward") == 1, "the forward kernel runs again"
    close(fast_jit(jax.grad(jax.checkpoint(loss)))(x), fast_jit(jax.grad(loss))(x))


@pytest.mark.slow
def test_shard_map_with_varying_axes_checked():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x = low(make(B=2, H=1, T=20, rank=3))
    x.pop("initial_state")
    specs = {n: P("data") for n in x}
    segment_ids = jnp.asarray(np.repeat(np.arange(5), 4)[None].repeat(2, 0))

    def loss(x, segment_ids, **options):
        return (delta_scan(**x, segment_ids=segment_ids, **options) ** 2).sum()

    @jax.shard_map(mesh=mesh, in_specs=(specs, P("data")), out_specs=(P(), specs), check_vma=True)
    def sharded(x, segment_ids):
        run = partial(loss, chunk_size=16, **tpu)
        return jax.value_and_grad(lambda x: jax.lax.psum(run(x, segment_ids), "data"))(x)

    close(fast_jit(sharded)(x, segment_ids), fast_jit(jax.value_and_grad(loss))(x, segment_ids))


@pytest.mark.slow
@pytest.mark.parametrize(
    "names, axis_type", [(("data", "tensor"), AxisType.Auto), (("x", "y"), AxisType.Explicit)]
)
def test_jit_on_a_mesh_cuts_rows_and_heads(names, axis_type):
    """Auto axes by their names, Explicit ones by their arguments' types."""
    mesh = jax.make_mesh((2, 2), names, axis_types=(axis_type,) * 2)
    x = low(make(B=2, T=20, rank=3))
    tokens = P(names[0], None, names[1])
    specs = {n: {"initial_state": P(*names)}.get(n, tokens) for n in x}
    want = fast_jit(jax.value_and_grad(total))(x)
    with jax.set_mesh(mesh):
        placed = {n: jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in x.items()}
        compiled = fast_jit(jax.value_and_grad(total_tpu)).lower(placed).compile()
    assert "all-gather" not in compiled.as_text()
    close(compiled(placed), want)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("T, chunk_size", [(48, 16), (130, 128)])
def test_no_races(rank, T, chunk_size):
    """The TPU interpreter follows DMAs and semaphores; a read before its copy has ended raises.

    Forward and backward, in chunks that change the order of tokens in memory too.
    """
    x = low(make(B=1, H=1, T=T, rank=rank))
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    run = partial(total, chunk_size=chunk_size, implementation="tpu")
    got = jax.grad(partial(run, interpret=interpret))(x)
    close(got, fast_jit(jax.grad(partial(run, interpret=True)))(x), 1e-6)


# --- refusals


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((1, 4, 1, 257), {}, "K up to 256 and V up to 512"),
        ((1, 4, 1, 8), dict(chunk_size=8), "chunk_size from 16 to 128, not 8"),
        ((1, 4, 1, 8), dict(chunk_size=256), "chunk_size from 16 to 128, not 256"),
    ],
)
def test_what_the_kernel_refuses_by_name(shape, options, message):
    x = jnp.zeros(shape)
    beta = jnp.zeros(shape[:3])
    with pytest.raises(NotImplementedError, match=message):
        delta_scan(x, x, x, beta, implementation="tpu", **options)
    delta_scan(x, x, x, beta, **options)
    assert dispatch.last_choice("delta_scan").implementation == "xla"


def test_float64_is_refused():
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="float64"):
        x = jnp.zeros((1, 4, 1, 8))
        delta_scan(x, x, x, jnp.zeros((1, 4, 1)), **tpu)
