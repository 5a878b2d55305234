"""attention's TPU kernels, interpreted on CPU: values, gradients, promises, and that these tests
can fail.
"""

import importlib
import json
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    BFLOAT16,
    EVERYTHING,
    FLOAT32,
    assert_close,
    call,
    cast,
    draw,
    truth,
    value_and_gradients,
)
from helpers import rel_rms, slow
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import dispatch
from kernels_pallas.attention import NORMALIZERS
from kernels_pallas.ops import RESIDUAL_NAMES, attention

room, tile, plan_room, forward_room, backward_room, tuning = (
    importlib.import_module(f"kernels_pallas.attention.tpu.{name}")
    for name in ("op", "tile", "plan", "forward", "backward", "tuning")
)
Schedule = plan_room.Schedule
ONE_PASS = [
    name
    for name, normalizer in NORMALIZERS.items()
    if normalizer.passes == 1 and not normalizer.parameters
]
on_tpu = partial(value_and_gradients, implementation="tpu", interpret=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    use_blocks(monkeypatch, 128, 128)


def use_blocks(monkeypatch, block, rows, span=256, lag=1):
    """Forward and backward differ, so that each pads by itself."""
    both = {"forward": Schedule(block, rows, lag), "backward": Schedule(block, rows, lag, span)}
    monkeypatch.setattr(
        room, "schedules", lambda T, *_: {way: s.fitted(T) for way, s in both.items()}
    )


def compare(dtype=jnp.float32, tolerance=FLOAT32, run=on_tpu, **case):
    arrays, options = draw(**case)
    arrays = cast(arrays, dtype)
    got = run(arrays, **options)
    assert_close(got, truth(arrays, **options), tolerance)
    return got


CASES = {
    "causal, grouped, three blocks": dict(T=300, B=1),
    "everything": EVERYTHING | dict(T=300, window=140),
    "full, segments": dict(
        T=300, B=1, H=2, causal=False, segments=True, gate="element-wise", slopes=True
    ),
    "full, window": dict(T=290, B=1, H=2, Hk=1, causal=False, window=20, sinks=True),
    "wide keys": dict(T=130, B=1, H=1, Hk=1, K=130, V=8, gate="head-wise"),
    "wide values, one token": dict(
        T=1, B=1, H=2, Hk=2, K=8, V=136, gate="element-wise", sinks=True
    ),
}


SLOW_CASES = ("causal, grouped, three blocks", "full, window")


@pytest.mark.parametrize("name", [slow(name) if name in SLOW_CASES else name for name in CASES])
def test_float32(name):
    compare(**CASES[name])


# What these do to a tile, and keep of a row, earlier ones do too.
LATER = ("reluformer", "exp", "exp_mean", "plain_self_adjust")


@pytest.mark.parametrize(
    "normalizer",
    [slow(name) if name in LATER else name for name in ONE_PASS if name != "softmax"],
)
def test_every_normalizer_of_one_walk(normalizer):
    """One tile of each, with documents and either gate; the one that keeps most of a row, over
    several.
    """
    gate = ("head-wise", "element-wise")[ONE_PASS.index(normalizer) % 2]
    compare(
        T=150 if normalizer == "self_adjust" else 70,
        B=1,
        H=1,
        Hk=1,
        segments=True,
        gate=gate,
        normalizer=normalizer,
    )


def test_bfloat16():
    compare(jnp.bfloat16, BFLOAT16, T=150, B=1, H=2, Hk=1, gate="element-wise")


def test_bfloat16_as_the_matrix_unit_rounds(monkeypatch):
    """Interpreted matmuls round nothing. On the machine weights and ds are bfloat16: so the errors
    there.
    """
    monkeypatch.setattr(room, "_rounds", lambda *_: True)
    arrays, options = draw(T=70, B=1, H=1, Hk=1, gate="element-wise")
    arrays = cast(arrays, jnp.bfloat16)
    got = value_and_gradients(
        arrays, f=lambda a: call(a, implementation="tpu", interpret=True, **options)
    )
    assert_close(got, truth(arrays, **options), 4e-3)


def test_float16():
    compare(jnp.float16, BFLOAT16 / 4, T=70, B=1, H=1, Hk=1)


def test_huge_logits():
    arrays, options = draw(T=70, B=1, H=1, Hk=1, sinks=True)
    arrays = cast(arrays, jnp.float32)
    arrays["q"] = 1e4 * arrays["q"]
    got = on_tpu(arrays, **options)
    assert rel_rms(got["y"], truth(arrays, **options)["y"]) < FLOAT32
    assert all(np.isfinite(x).all() for x in got.values())


def test_groups_of_rows_and_the_tuned_blocks(monkeypatch):
    """Several groups to a block, as on the machine: the diagonal's stop at different keys."""
    use_blocks(monkeypatch, 256, 128, lag=2)
    compare(T=400, B=1, H=1, Hk=1)


@pytest.mark.slow
@pytest.mark.parametrize("gate", [None, "head-wise", "element-wise"])
@pytest.mark.parametrize(
    "mask", [{}, dict(window=129), dict(segments=True), dict(causal=False), dict(sinks=True)]
)
@pytest.mark.parametrize("normalizer", ONE_PASS)
def test_the_product(normalizer, mask, gate):
    if "sinks" in mask and normalizer != "softmax":
        mask = dict(slopes=True, logits_soft_cap=3.0)
    compare(T=300, gate=gate, normalizer=normalizer, **mask)
    compare(jnp.bfloat16, BFLOAT16, T=300, gate=gate, normalizer=normalizer, **mask)


@pytest.mark.slow
@pytest.mark.parametrize("T", [127, 128, 129, 1000])
def test_lengths_at_tuned_blocks(T, monkeypatch):
    monkeypatch.undo()
    compare(T=T, B=1, K=64, V=192)


# --- which tiles are visited


@pytest.mark.parametrize(
    "causal, window", [(True, None), (True, 100), (True, 300), (False, None), (False, 130)]
)
def test_visits_are_the_tiles_that_the_mask_leaves(causal, window):
    """Each once, in both passes; a tile called FULL hides nothing."""
    T, block = 1000, 128
    schedule = Schedule(block, 128, span=384).fitted(T)
    fields = dict.fromkeys(plan_room.Plan._fields) | dict(
        causal=causal, window=window, T=T, slopes=False, forward=schedule, backward=schedule
    )
    plan = plan_room.Plan(**fields)
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    mask = (j <= i) | (not causal)
    if window is not None:
        mask &= np.abs(i - j) < window
    assert plan.pairs == mask.sum()
    cut = lambda i, j: mask[i * block : (i + 1) * block, j * block : (j + 1) * block]
    wanted = {(i, j) for i in range(8) for j in range(8) if cut(i, j).any()}
    for visits in (plan_room.forward_tiles(plan), plan_room.backward_tiles(plan)[0]):
        computed = [(i, j, w & 3) for i, j, w in zip(*visits) if w & 3 != plan_room.EMPTY]
        assert len(computed) == len(wanted) and {(i, j) for i, j, _ in computed} == wanted
        assert all(cut(i, j).all() for i, j, kind in computed if kind == plan_room.FULL)


def test_blocks_shrink_with_the_window():
    assert tuning.schedules(4096, 128, 128, None)["forward"].block >= 1024
    assert tuning.schedules(4096, 128, 128, 300)["forward"].block == 384


# --- what the tests above would miss: are they able to fail?


def _seen_without_masks(right):
    return lambda plan, at, masks: right(plan, at, False)


def _first_span_only(right):
    def spans(*args):
        visits, count, blocks = right(*args)
        return plan_room.TileTable(*(x[:count] for x in visits)), count, blocks

    return spans


def _a_tile_less(right):
    def visits(plan):
        found = right(plan)
        return plan_room.TileTable(
            *(x[(found.q_blocks != 2) | (found.k_blocks != 1)] for x in found)
        )

    return visits


PLANTED = {
    "no mask": (tile, "visible", _seen_without_masks),
    "lanes' sums of another maximum": (tile, "finite", lambda right: lambda m: 0.999 * right(m)),
    "one span of keys": (backward_room, "backward_tiles", _first_span_only),
    "a tile not visited": (forward_room, "forward_tiles", _a_tile_less),
    "gate open in the gradient": (
        tile,
        "sigmoid",
        lambda right: lambda x: jnp.clip(right(x), 0.01, 0.9),
    ),
    "turned rows": (tile, "as_row", lambda right: lambda x: jnp.roll(right(x), 1, axis=1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_found(error, monkeypatch):
    where, name, plant = PLANTED[error]
    monkeypatch.setattr(where, name, plant(getattr(where, name)))
    with pytest.raises(AssertionError, match=r"e-|0\.|non-finite"):
        compare(
            run=lambda a, **o: on_tpu(a, f=lambda x, **p: call(x, **p), **o),
            T=300,
            B=1,
            H=1,
            Hk=1,
            gate="element-wise",
        )


# --- transformations


def test_vmap():
    pairs = [draw(B=1, T=70, H=2, Hk=1, segments=True, slopes=True, seed=seed) for seed in (1, 2)]
    both = jax.tree.map(
        lambda *a: jnp.stack(a), *[cast(arrays, jnp.float32) for arrays, _ in pairs]
    )
    ids = jnp.stack([options["segment_ids"] for _, options in pairs])

    def total(implementation, arrays, ids):
        options = dict(interpret=True) if implementation == "tpu" else {}
        return jnp.sum(call(arrays, segment_ids=ids, implementation=implementation, **options) ** 2)

    gradient = lambda implementation: jax.jit(jax.vmap(jax.grad(partial(total, implementation))))(
        both, ids
    )
    assert_close(gradient("tpu"), gradient("xla"), FLOAT32)


def test_residuals_have_names_and_checkpoint_recomputes():
    arrays = cast(draw(B=1, T=140, H=1, Hk=1, gate="head-wise")[0], jnp.float32)
    loss = lambda a: jnp.sum(call(a, implementation="tpu", interpret=True) ** 2)
    policy = jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)
    kept = jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(arrays)
    again = jax.make_jaxpr(jax.grad(jax.checkpoint(loss)))(arrays)
    runs = [str(x).count("name=attention_forward") for x in (kept, again)]
    assert runs == [1, 2], runs


def sharded(mesh_names, B=2, T=70):
    arrays, options = draw(B=B, T=T, H=2, Hk=2, gate="head-wise", sinks=True, segments=True)
    rows, heads = mesh_names
    specs = {name: P(rows, None, heads) for name in arrays} | {"sink_logits": P(heads)}
    return cast(arrays, jnp.float32), options["segment_ids"], specs


@pytest.mark.slow
def test_shard_map_with_varying_axes_checked():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    arrays, ids, specs = sharded(("data", None))
    loss = lambda a, ids, **options: jnp.sum(call(a, segment_ids=ids, **options) ** 2)

    @jax.shard_map(mesh=mesh, in_specs=(specs, P("data")), out_specs=(P(), specs), check_vma=True)
    def on_shards(a, ids):
        run = partial(loss, implementation="tpu", interpret=True)
        return jax.value_and_grad(lambda a: jax.lax.psum(run(a, ids), "data"))(a)

    value, got = jax.jit(on_shards)(arrays, ids)
    expected, want = jax.jit(jax.value_and_grad(loss))(arrays, ids)
    assert_close({"loss": value, **got}, {"loss": expected, **want}, FLOAT32)


@pytest.mark.parametrize(
    "names, axis_type",
    [
        (("data", "tensor"), AxisType.Auto),
        pytest.param(("x", "y"), AxisType.Explicit, marks=pytest.mark.slow),
    ],
)
def test_jit_on_a_mesh_cuts_rows_and_heads(names, axis_type):
    """Auto axes by their names, Explicit ones by their arguments' types."""
    mesh = jax.make_mesh((2, 2), names, axis_types=(axis_type,) * 2)
    arrays, ids, specs = sharded(names)
    loss = lambda a, ids, **options: jnp.sum(call(a, segment_ids=ids, **options) ** 2)
    expected, want = jax.jit(jax.value_and_grad(loss))(arrays, ids)
    with jax.set_mesh(mesh):
        placed = {n: jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in arrays.items()}
        ids = jax.device_put(ids, NamedSharding(mesh, P(names[0])))
        run = jax.jit(jax.value_and_grad(partial(loss, implementation="tpu", interpret=True)))
        compiled = run.lower(placed, ids).compile()
    assert "all-gather" not in compiled.as_text()
    value, got = compiled(placed, ids)
    assert_close({"loss": value, **got}, {"loss": expected, **want}, FLOAT32)


@pytest.mark.slow
def test_no_races(monkeypatch):
    """The TPU interpreter follows DMAs and semaphores; a read before its copy has ended raises."""
    arrays, options = draw(T=140, B=1, H=2, Hk=1, gate="element-wise", segments=True)
    use_blocks(monkeypatch, 128, 128, span=128)
    arrays = cast(arrays, jnp.float32)
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    got = value_and_gradients(arrays, implementation="tpu", interpret=interpret, **options)
    assert_close(got, on_tpu(arrays, **options), 1e-6)


# --- compiled for chips that are not here


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["B4,T4096,H16,D128", "B1,T32768,H16,Hk2,D256"])
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "v7x"])
def test_compiles(chip, shape):
    """Forward and backward; the replay follows every visit, so that the model time is one."""
    pytest.importorskip("libtpu")
    command = [
        sys.executable,
        "-m",
        "gatedjax.aot",
        "--op=attention",
        f"--target=tpu:{chip}",
        f"--shape={shape}",
    ]
    done = subprocess.run(
        [*command, "--pass=bwd", "--json"], capture_output=True, text=True, check=True
    )
    report = json.loads(done.stdout)
    assert report["implementation"] == "tpu"
    kernels = report["bwd"]["kernels"]
    assert len(kernels) == 2 and not any(sum(k["unknown"].values()) for k in kernels)


# --- refusals


@pytest.mark.parametrize(
    "D, options, message",
    [
        (257, {}, "K and V up to 256, not 257"),
        (8, dict(normalizer="entmax"), "pass over the keys once, not Entmax"),
    ],
)
def test_what_the_kernel_refuses_by_name(D, options, message):
    x = jnp.zeros((1, 4, 1, D))
    with pytest.raises(NotImplementedError, match=message):
        attention(x, x, x, implementation="tpu", **options)
    attention(x, x, x, **options)
    assert dispatch.last_choice("attention").implementation == "xla"


def test_float64_is_refused():
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="float64"):
        attention(*[jnp.zeros((1, 4, 1, 8))] * 3, implementation="tpu", interpret=True)
