"""attention's GPU kernels, interpreted on CPU: values, gradients, promises, and that these tests
can fail.
"""

import importlib
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
from helpers import rel_rms
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import dispatch
from kernels_pallas.attention import NORMALIZERS
from kernels_pallas.attention.tile_ranges import reach_of_queries
from kernels_pallas.ops import RESIDUAL_NAMES, attention

room, tile, plan_room, forward_room, backward_room, tuning = (
    importlib.import_module(f"kernels_pallas.attention.gpu.{name}")
    for name in ("op", "tile", "plan", "forward", "backward", "tuning")
)
KernelConfig, Schedule = tuning.KernelConfig, tuning.Schedule
slow = partial(pytest.param, marks=pytest.mark.slow)  # what a neighbor of the same case also covers
ONE_PASS = [
    name
    for name, normalizer in NORMALIZERS.items()
    if normalizer.passes == 1 and not normalizer.parameters
]
on_gpu = partial(value_and_gradients, implementation="gpu", interpret=True)
# Blocks of every kernel differ, so that each has its own edges.
SMALL = Schedule(
    forward=KernelConfig(block_q=32, block_k=16, num_warps=4, num_stages=1),
    dq=KernelConfig(block_q=16, block_k=32, num_warps=4, num_stages=1),
    dkv=KernelConfig(block_q=16, block_k=32, num_warps=4, num_stages=1),
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(room, "schedule", lambda K, V, matmuls, sums, T: SMALL.fitted(T))


def compare(dtype=jnp.float32, tolerance=FLOAT32, run=on_gpu, **case):
    arrays, options = draw(**case)
    arrays = cast(arrays, dtype)
    got = run(arrays, **options)
    assert_close(got, truth(arrays, **options), tolerance)
    return got


CASES = {
    "causal, grouped": dict(T=70, B=1),
    "everything": EVERYTHING | dict(T=70),
    "full, segments": dict(
        T=65, B=1, H=2, causal=False, segments=True, gate="element-wise", slopes=True
    ),
    "full, window": dict(T=90, B=1, H=2, Hk=1, causal=False, window=20, sinks=True),
    "one token": dict(T=1, B=1, H=2, Hk=2, K=8, V=20, gate="element-wise", sinks=True),
}
# float32 goes up to 128: see `test_what_the_kernel_refuses_by_name`.
WIDE_CASES = {
    "wide keys": dict(T=33, B=1, H=1, Hk=1, K=130, V=8, gate="head-wise"),
    "wide values": dict(T=17, B=1, H=2, Hk=2, K=8, V=136, gate="element-wise", sinks=True),
}


@pytest.mark.parametrize("name", [n if n == "everything" else slow(n) for n in CASES])
def test_float32(name):
    compare(**CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDE_CASES)
def test_heads_of_more_than_128_channels(name):
    compare(jnp.bfloat16, BFLOAT16, **WIDE_CASES[name])


@pytest.mark.parametrize(
    "normalizer",
    [n if n in ("sigmoid", "self_adjust") else slow(n) for n in ONE_PASS if n != "softmax"],
)
def test_every_normalizer_of_one_walk(normalizer):
    """Documents, and either gate; several tiles."""
    gate = ("head-wise", "element-wise")[ONE_PASS.index(normalizer) % 2]
    compare(T=40, B=1, H=1, Hk=1, segments=True, gate=gate, normalizer=normalizer)


@pytest.mark.slow
def test_bfloat16():
    compare(jnp.bfloat16, BFLOAT16, T=50, B=1, H=2, Hk=1, gate="element-wise")


def in_powers_of_two():
    """With 16-bit inputs logits are multiplied by log2(e): sinks, slopes and the cap as well."""
    compare(jnp.bfloat16, BFLOAT16, **EVERYTHING | dict(T=40, B=1, H=2, Hk=1))


def test_exponentials_of_16_bit_inputs():
    in_powers_of_two()


@pytest.mark.slow
@pytest.mark.parametrize("planted", ["the cap of other logits", "slopes of other logits"])
def test_planted_errors_of_the_unit_are_found(planted, monkeypatch):
    if planted == "the cap of other logits":
        monkeypatch.setattr(room, "in_unit", lambda cap, unit: cap)
    else:
        right = tile.slope_of_head
        monkeypatch.setattr(
            tile,
            "slope_of_head",
            lambda plan, refs, head: right(plan._replace(unit=1.0), refs, head),
        )
    with pytest.raises(AssertionError, match="q"):
        in_powers_of_two()


def test_bfloat16_as_the_tensor_core_rounds(monkeypatch):
    """Interpreted matmuls round nothing. On the machine weights and ds are bfloat16: so the errors
    there.
    """
    monkeypatch.setattr(room, "operands", lambda *_: (jnp.dtype(jnp.bfloat16), None))
    monkeypatch.setattr(tile, "matmul", rounded_matmul)
    arrays, options = draw(T=70, B=1, H=1, Hk=1, gate="element-wise")
    arrays = cast(arrays, jnp.bfloat16)
    got = value_and_gradients(
        arrays, f=lambda a: call(a, implementation="gpu", interpret=True, **options)
    )
    assert_close(got, truth(arrays, **options), 4e-3)


def rounded_matmul(p, x, y, trans_y=False):
    """The products of bfloat16 operands are exact in float32."""
    x, y = (z.astype(jnp.bfloat16).astype(jnp.float32) for z in (x, y))
    return jnp.dot(x, y.T if trans_y else y, precision="highest")


@pytest.mark.slow
def test_float16():
    compare(jnp.float16, BFLOAT16 / 4, T=40, B=1, H=1, Hk=1)


def test_huge_logits():
    arrays, options = draw(T=40, B=1, H=1, Hk=1, sinks=True)
    arrays = cast(arrays, jnp.float32)
    arrays["q"] = 1e4 * arrays["q"]
    got = on_gpu(arrays, **options)
    assert rel_rms(got["y"], truth(arrays, **options)["y"]) < FLOAT32
    assert all(np.isfinite(x).all() for x in got.values())


def test_a_kernel_each_for_dk_and_dv(monkeypatch):
    """As with large heads, where registers hold only one of them."""
    monkeypatch.setattr(room, "schedule", lambda *a: SMALL._replace(dv=KernelConfig(32, 16, 4, 1)))
    compare(T=50, B=1, H=2, Hk=1, logits_soft_cap=3.0, slopes=True)


@pytest.mark.slow
def test_segment_ids_in_no_order():
    """Blocks are left out by the least and largest id of each, which must not be taken for
    sorted.
    """
    arrays, _ = draw(T=80, B=1, H=1, Hk=1)
    arrays = cast(arrays, jnp.float32)
    ids = jnp.asarray(np.repeat([[5, 0, 9, 0, 5, 7, 9, 2]], 10, axis=1), jnp.int32)
    assert_close(on_gpu(arrays, segment_ids=ids), truth(arrays, segment_ids=ids), FLOAT32)


MASKS = {
    "causal": {},
    "window": dict(window=29),
    "segments": dict(segments=True),
    "full": dict(causal=False),
}


@pytest.mark.slow
@pytest.mark.parametrize("gate", [None, "head-wise", "element-wise"])
@pytest.mark.parametrize("mask", [*MASKS, "sinks"])
@pytest.mark.parametrize("normalizer", ONE_PASS)
def test_the_product(normalizer, mask, gate):
    extra = dict(sinks=True) if normalizer == "softmax" else dict(slopes=True, logits_soft_cap=3.0)
    options = extra if mask == "sinks" else MASKS[mask]
    compare(T=100, gate=gate, normalizer=normalizer, **options)
    compare(jnp.bfloat16, BFLOAT16, T=100, gate=gate, normalizer=normalizer, **options)


@pytest.mark.slow
@pytest.mark.parametrize("T", [127, 128, 129, 1000])
def test_lengths_at_tuned_blocks(T, monkeypatch):
    monkeypatch.undo()
    compare(T=T, B=1, K=64, V=192)


# --- NaN and infinities at tokens that are not seen

T_POISON = 40
POISON_MASKS = {
    # Which tokens see the bad one; which keys those see: elsewhere nothing may change.
    "segments": (9, dict(segments=True), range(9, 20), range(20)),
    "causal": (24, {}, range(24, 40), range(40)),
    "window": (20, dict(window=6), range(20, 26), range(15, 26)),
    "full, window": (20, dict(window=4, causal=False), range(17, 24), range(14, 27)),
}


def poisoned(mask, dtype=jnp.float32, **case):
    """How y and the gradients differ from the clean ones, for every array that may be bad."""
    bad, options, sees, of_these = POISON_MASKS[mask]
    options = dict(options)
    segments = options.pop("segments", False)
    arrays, drawn = draw(B=1, T=T_POISON, H=2, Hk=1, gate="element-wise", **case)
    options |= drawn
    if segments:
        options["segment_ids"] = jnp.asarray([[0] * 20 + [1] * 20], jnp.int32)
    arrays = cast(arrays, dtype)
    dy = jnp.asarray(np.random.default_rng(5).normal(size=(1, T_POISON, 2, 12)), dtype)

    @jax.jit
    def run(arrays, dy):
        y, pull_back = jax.vjp(
            lambda a: call(a, implementation="gpu", interpret=True, **options), arrays
        )
        return {"y": y, **pull_back(dy)[0]}

    clean = run(arrays, dy)
    others = [i for i in range(T_POISON) if i not in sees]
    unseen = [j for j in range(T_POISON) if j not in of_these]
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in clean.values())
    for name in ("q", "k", "v", "gate_logits", "dy"):
        for value in (np.nan, np.inf):
            at = (0, bad, -1, 3)
            changed = arrays | ({name: arrays[name].at[at].set(value)} if name != "dy" else {})
            got = run(changed, dy.at[at].set(value) if name == "dy" else dy)
            # A query, a gate or a gradient is of its own row; a key, a value of all that see it.
            rows = others if name in "kv" else [i for i in range(T_POISON) if i != bad]
            for output, tokens in (
                ("y", rows),
                ("q", rows),
                ("gate_logits", rows),
                ("k", unseen),
                ("v", unseen),
            ):
                close = np.testing.assert_allclose
                x, want = (np.asarray(z[output][:, tokens], np.float32) for z in (got, clean))
                close(
                    x,
                    want,
                    1e-2,
                    2e-2 if dtype != jnp.float32 else 1e-4,
                    err_msg=f"{name} {output}",
                )
            shown = "gate_logits" if name == "dy" else "y"
            seen = range(bad, bad + 1) if rows != others else sees
            # An infinite logit may have weight 0.
            if np.isnan(value) or name in ("v", "dy"):
                hidden = np.isfinite(np.asarray(got[shown], np.float32)[0, list(seen), -1, 3])
                assert not hidden.any(), (name, value, hidden)


@pytest.mark.parametrize("mask", [m if m == "segments" else slow(m) for m in POISON_MASKS])
def test_what_is_not_seen_may_be_anything(mask):
    poisoned(mask)


@pytest.mark.slow
@pytest.mark.parametrize("normalizer", ONE_PASS)
def test_what_is_not_seen_may_be_anything_to_every_normalizer(normalizer):
    extra = dict(sinks=True) if normalizer == "softmax" else {}
    poisoned("segments", jnp.bfloat16, normalizer=normalizer, slopes=True, **extra)


@pytest.mark.slow
def test_what_is_not_seen_with_a_kernel_each_for_dk_and_dv(monkeypatch):
    monkeypatch.setattr(room, "schedule", lambda *a: SMALL._replace(dv=KernelConfig(32, 16, 4, 1)))
    poisoned("window", logits_soft_cap=3.0)


HIDDEN_PLANTED = {
    "never computed again": (tile, "write_or_repeat", lambda plan, sums, write, repeat: write()),
    "added though not seen": (tile, "if_seen", lambda seen, x: x),
}


@pytest.mark.slow
@pytest.mark.parametrize("error", HIDDEN_PLANTED)
def test_planted_errors_of_hidden_values_are_found(error, monkeypatch):
    monkeypatch.setattr(*HIDDEN_PLANTED[error])
    with pytest.raises(AssertionError, match=r"[qkvy] [qkvy]"):
        poisoned("segments")


# --- which tiles are visited


@pytest.mark.parametrize(
    "causal, window",
    [(True, None), (True, 1), (True, 100), (True, 300), (False, None), (False, 1), (False, 130)],
)
def test_visits_are_the_tiles_that_the_mask_leaves(causal, window):
    """Each once, by queries and by keys; a tile that is not masked hides nothing."""
    T, size, other = 1000, 64, 32
    fields = dict.fromkeys(plan_room.Plan._fields) | dict(
        causal=causal, window=window, T=T, length=1024
    )
    p = plan_room.Plan(**fields)
    i, j = np.arange(1024)[:, None], np.arange(1024)[None]
    mask = ((j <= i) | (not causal)) & (j < T) & (i < T)
    if window is not None:
        mask &= np.abs(i - j) < window
    assert p.pairs == mask.sum()
    cut = lambda m, n, k: m[n * size : (n + 1) * size, k * other : (k + 1) * other]
    for reach, found in (
        (reach_of_queries(p), mask),
        (reach_of_queries(p).transposed(), mask.T),
    ):
        ranges = plan_room.tile_ranges(p, reach, jnp.arange(16), size, other, None)
        ranges = [(*np.broadcast_arrays(first, end), masks) for first, end, masks in ranges]
        for n in range(16):
            visited = [(k, masks) for first, end, masks in ranges for k in range(first[n], end[n])]
            assert [k for k, _ in visited] == [k for k in range(32) if cut(found, n, k).any()]
            real = found[n * size : min(T, (n + 1) * size)]
            assert all(
                real[:, k * other : (k + 1) * other].all() for k, masks in visited if not masks
            )


def test_documents_are_walked_alone():
    ids = jnp.asarray(np.repeat(np.arange(4), 64)[None], jnp.int32)
    spans = plan_room.segment_spans(ids, 32, 16)
    assert spans.tolist()[0] == [[4 * (n // 2), 4 * (n // 2) + 4] for n in range(8)]


def test_blocks_are_no_larger_than_a_short_sequence():
    assert tuning.schedule(128, 128, "bfloat16", 1, 20).forward[:2] == (32, 32)
    assert tuning.schedule(128, 128, "bfloat16", 1, 4096).forward.block_q >= 64


# --- what the tests above would miss: are they able to fail?


def _a_tile_less(right):
    return lambda *a: [
        (first, jnp.maximum(first, end - masks), masks) for first, end, masks in right(*a)
    ]


def _without_correction(right):
    def add(normalizer, row, s, seen, keys):
        added = right(normalizer, row, s, seen, keys)
        return added._replace(keep=jnp.ones_like(added.keep))

    return add


PLANTED = {
    "no mask": (tile, "visible", lambda right: lambda p, at, masks: right(p, at, False)),
    "a tile not visited": (plan_room, "tile_ranges", _a_tile_less),
    "sums of another maximum": (type(NORMALIZERS["softmax"]), "add", _without_correction),
    "gate's gradient flipped": (
        room,
        "_gradients_by_row",
        lambda right: lambda *a: (lambda do, deltas, dgate: (do, deltas, -dgate))(*right(*a)),
    ),
    "delta forgotten": (
        room,
        "_gradients_by_row",
        lambda right: (
            lambda *a: (lambda do, deltas, dgate: (do, [0 * d for d in deltas], dgate))(*right(*a))
        ),
    ),
    "another head's queries": (
        backward_room,
        "_load_of_head",
        lambda right: lambda ref, rows, g, width: right(ref, rows, 0 * g, width),
    ),
}


QUICK = ("sums of another maximum", "gate's gradient flipped")


@pytest.mark.slow
@pytest.mark.parametrize("error", [n if n in QUICK else slow(n) for n in PLANTED])
def test_planted_errors_are_found(error, monkeypatch):
    where, name, plant = PLANTED[error]
    monkeypatch.setattr(where, name, plant(getattr(where, name)))
    with pytest.raises(AssertionError, match=r"e-|0\.|non-finite"):
        compare(
            run=lambda a, **o: on_gpu(a, f=lambda x, **p: call(x, **p), **o),
            T=40,
            B=1,
            H=2,
            Hk=1,
            gate="element-wise",
        )


# --- transformations


@pytest.mark.slow
def test_vmap():
    pairs = [draw(B=1, T=40, H=2, Hk=1, segments=True, slopes=True, seed=seed) for seed in (1, 2)]
    both = jax.tree.map(
        lambda *a: jnp.stack(a), *[cast(arrays, jnp.float32) for arrays, _ in pairs]
    )
    ids = jnp.stack([options["segment_ids"] for _, options in pairs])

    def total(implementation, arrays, ids):
        options = dict(interpret=True) if implementation == "gpu" else {}
        return jnp.sum(call(arrays, segment_ids=ids, implementation=implementation, **options) ** 2)

    gradient = lambda implementation: jax.jit(jax.vmap(jax.grad(partial(total, implementation))))(
        both, ids
    )
    assert_close(gradient("gpu"), gradient("xla"), FLOAT32)


def test_residuals_have_names_and_checkpoint_recomputes():
    arrays = cast(draw(B=1, T=40, H=1, Hk=1, gate="head-wise")[0], jnp.float32)
    loss = lambda a: jnp.sum(call(a, implementation="gpu", interpret=True) ** 2)
    policy = jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)
    kept = jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(arrays)
    again = jax.make_jaxpr(jax.grad(jax.checkpoint(loss)))(arrays)
    runs = [str(x).count("name=attention_forward") for x in (kept, again)]
    assert runs == [1, 2], runs


def sharded(mesh_names, B=2, T=40):
    arrays, options = draw(B=B, T=T, H=2, Hk=2, gate="head-wise", sinks=True, segments=True)
    rows, heads = mesh_names
    specs = {name: P(rows, None, heads) for name in arrays} | {"sink_logits": P(heads)}
    return cast(arrays, jnp.float32), options["segment_ids"], specs


@pytest.mark.slow
def test_shard_map_with_varying_axes_checked(interpreter_in_shard_map):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    arrays, ids, specs = sharded(("data", None))
    loss = lambda a, ids, **options: jnp.sum(call(a, segment_ids=ids, **options) ** 2)

    @jax.shard_map(mesh=mesh, in_specs=(specs, P("data")), out_specs=(P(), specs), check_vma=True)
    def on_shards(a, ids):
        run = partial(loss, implementation="gpu", interpret=True)
        return jax.value_and_grad(lambda a: jax.lax.psum(run(a, ids), "data"))(a)

    value, got = jax.jit(on_shards)(arrays, ids)
    expected, want = jax.jit(jax.value_and_grad(loss))(arrays, ids)
    assert_close({"loss": value, **got}, {"loss": expected, **want}, FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "names, axis_type", [(("data", "tensor"), AxisType.Auto), slow(("x", "y"), AxisType.Explicit)]
)
def test_jit_on_a_mesh_cuts_rows_and_heads(names, axis_type, interpreter_in_shard_map):
    """Auto axes by their names, Explicit ones by their arguments' types."""
    mesh = jax.make_mesh((2, 2), names, axis_types=(axis_type,) * 2)
    arrays, ids, specs = sharded(names)
    loss = lambda a, ids, **options: jnp.sum(call(a, segment_ids=ids, **options) ** 2)
    expected, want = jax.jit(jax.value_and_grad(loss))(arrays, ids)
    with jax.set_mesh(mesh):
        placed = {n: jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in arrays.items()}
        ids = jax.device_put(ids, NamedSharding(mesh, P(names[0])))
        run = jax.jit(jax.value_and_grad(partial(loss, implementation="gpu", interpret=True)))
        compiled = run.lower(placed, ids).compile()
    assert "all-gather" not in compiled.as_text()
    value, got = compiled(placed, ids)
    assert_close({"loss": value, **got}, {"loss": expected, **want}, FLOAT32)


# --- refusals


@pytest.mark.parametrize(
    "D, options, message",
    [
        (257, {}, "K and V up to 256, not 257"),
        # The least blocks spill kilobytes of registers a thread.
        (130, {}, "K and V of float32 up to 128, not 130"),
        (8, dict(normalizer="entmax"), "pass over the keys once, not Entmax"),
    ],
)
def test_what_the_kernel_refuses_by_name(D, options, message):
    x = jnp.zeros((1, 4, 1, D))
    with pytest.raises(NotImplementedError, match=message):
        attention(x, x, x, implementation="gpu", **options)
    attention(x, x, x, **options)
    assert dispatch.last_choice("attention").implementation == "xla"


def test_arrays_too_large_for_a_32_bit_index_are_refused():
    x = jax.ShapeDtypeStruct((64, 2**15, 16, 128), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="2\\*\\*31"):
        jax.eval_shape(partial(attention, implementation="gpu"), x, x, x)


def test_float64_is_refused():
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="float64"):
        attention(*[jnp.zeros((1, 4, 1, 8))] * 3, implementation="gpu", interpret=True)
