"""attention_step's TPU kernel, interpreted on CPU, against the reference in float64: every view of
a cache, every normalizer of one pass, and blocks of which nothing is read.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import BFLOAT16, BY_HEAD, FLOAT32
from helpers import rel_rms
from step_cases import ONE_PASS, cast, draw_step, error_of, run

from kernels_pallas import dispatch
from kernels_pallas.attention import attention_step
from kernels_pallas.attention.normalizers import base
from kernels_pallas.attention.tpu import step, step_cache, step_kernel

slow = partial(pytest.param, marks=pytest.mark.slow)
# By the view that the kernel takes: what the heads and channels are.
CASES = {
    "rows": dict(H=4, Hk=2, K=128, V=128),
    "rows of eight heads, padded": dict(H=24, Hk=8, K=128, V=256, gate="head-wise", slopes=True),
    "panels": dict(H=4, Hk=2, K=256, V=256, slopes=True, sinks=True, lengths=True),
    "panels of one head": dict(H=4, Hk=1, K=256, V=256, slopes=True, sinks=True, lengths=True),
    "heads": dict(H=6, Hk=3, K=128, V=256, lengths=True),
    "channels": dict(H=6, Hk=3, K=24, V=40, slopes=True, sinks=True),
    "keys by channel, values by head": dict(H=4, Hk=1, K=64, V=128, lengths=True),
    "a small cache": dict(H=4, Hk=2, K=16, V=16, slots=60),
}
QUICK = ("panels",)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Three blocks of 128 slots, the last one not whole."""
    monkeypatch.setattr(step, "BLOCK_BYTES", 1)
    monkeypatch.setattr(step, "COLUMNS", 128)


def draw(B=3, H=4, Hk=2, K=128, V=128, lengths=False, **case):
    """(arrays, valid, distances); of the last row nothing is valid."""
    arrays, valid, distances = draw_step(B, H, Hk, K, V, **case)
    if lengths:
        slots = valid.shape[1]
        # The first row ends in its first block.
        valid = np.arange(slots)[None] < np.array([50, slots - 1, 0])[:, None]
    return arrays, jnp.asarray(valid), distances


def error(dtype=jnp.float32, normalizer="softmax", **case) -> float:
    return error_of("tpu", draw(**case), dtype, normalizer)


@pytest.mark.parametrize("name", [n if n in QUICK else slow(n) for n in CASES])
def test_every_view(name):
    case = dict(CASES[name])
    assert error(**case) < FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize("normalizer", ONE_PASS)
def test_every_normalizer_of_one_pass(normalizer):
    assert error(normalizer=normalizer, slopes=True, sinks=normalizer == "softmax") < FLOAT32


@pytest.mark.slow
def test_bfloat16():
    assert error(jnp.bfloat16) < BFLOAT16


def test_views_are_free_where_xla_pads_least():
    """The order of axes in which libtpu lays such arguments out."""
    views = {
        (128, 128, 8): ("rows", "rows"),
        (256, 256, 2): ("rows", "rows"),
        (256, 256, 24): ("rows", "rows"),
        (128, 128, 1): ("heads", "heads"),
        (128, 128, 12): ("heads", "heads"),
        (64, 64, 8): ("channels", "channels"),
        (64, 128, 8): ("channels", "heads"),
        (128, 256, 2): ("heads", "heads"),
    }
    for (K, V, Hk), expected in views.items():
        assert step_cache.views(K, V, Hk, jnp.bfloat16) == expected
    # Float32 registers have one row of a slot with a single head.
    assert step_cache.views(256, 256, 1, jnp.float32) == ("rows", "rows")
    assert step_cache.views(256, 256, 1, jnp.bfloat16) == ("heads", "heads")
    assert step_cache.views(128, 128, 1, jnp.float32) == ("heads", "heads")
    assert step_cache.panels("rows", 256, 2) == 2
    assert step_cache.panels("rows", 256, 8) == 1


@pytest.mark.parametrize("parts", [1, 2])
def test_no_block_without_a_valid_slot_is_read(parts):
    """Of three rows: a length, a window of a ring buffer, nothing at all."""
    slots, blocks = 4, 6
    valid = np.zeros((3, slots * blocks - 1), bool)
    valid[0, :9] = True
    valid[1, 6:8] = valid[1, 16:] = True
    made = jax.jit(step_cache.block_table, static_argnums=(1, 2))
    table = np.asarray(made(valid, slots, parts))
    table = table.reshape(3, parts, -1)
    kinds = table & step_cache.KIND_BITS
    numbers = table >> step_cache.KIND_WIDTH
    expected = ({0: 2, 1: 2, 2: 1}, {1: 1, 4: 2, 5: 1}, {})
    for row, blocks_of_row in enumerate(expected):
        computed = kinds[row] != step_cache.NONE
        found = dict(zip(numbers[row][computed].tolist(), kinds[row][computed].tolist()))
        assert found == blocks_of_row and computed.sum() == len(blocks_of_row)
        for part in range(parts):
            # What is not computed names the part's last block again, so nothing is fetched for it.
            fetched = numbers[row, part][np.r_[True, np.diff(numbers[row, part]) != 0]]
            assert len(fetched) == max(1, computed[part].sum())
        assert computed.sum(1).max() - computed.sum(1).min() <= 1


@pytest.mark.slow
def test_parts_of_a_row_are_merged():
    """Of a batch of one, two programs share the blocks; a sink counts once."""
    arrays, valid, _ = draw(B=3, sinks=True)
    arrays = cast(arrays, jnp.float32)
    first = {n: x if n in BY_HEAD else x[:1] for n, x in arrays.items()}
    want = run(first, valid[:1], None, implementation="xla")
    got = run(first, valid[:1], None, implementation="tpu", interpret=True)
    assert rel_rms(got, want) < FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows", "panels", "heads", "channels"])
def test_a_slot_that_is_not_valid_may_hold_anything(name):
    """Nor may another key head's; and what is valid shows."""
    case = dict(CASES[name], lengths=False, sinks=False, slopes=False, B=2)
    arrays, valid, _ = draw(**case)
    arrays = cast(arrays, jnp.float32)
    group = case["H"] // case["Hk"]
    kernel = jax.jit(partial(run, implementation="tpu", interpret=True))
    want = kernel(arrays, valid, None)
    unused = ~valid[:, :, None, None]
    for bad in (np.nan, np.inf):
        garbage = {n: jnp.where(unused, bad, arrays[n]) for n in ("k_cache", "v_cache")}
        assert rel_rms(kernel(arrays | garbage, valid, None), want) < FLOAT32
    # Of the first row, slots that the query sees: a value's channel, every one by a key.
    [slot, *_] = np.flatnonzero(valid[0])
    for changed in ("k_cache", "v_cache"):
        seen = arrays | {changed: arrays[changed].at[0, slot, 1, 5].set(np.nan)}
        hidden = np.isfinite(kernel(seen, valid, None))
        own = slice(group, 2 * group)
        others = np.delete(np.asarray(hidden[0]), np.arange(group, 2 * group), axis=0)
        assert others.all() and not hidden[0, own, 5].any() and hidden[1].all()


@pytest.mark.slow
def test_the_gradient_is_xlas():
    arrays, *masks = draw(sinks=True, gate="element-wise")
    arrays = cast(arrays, jnp.float32)
    loss = lambda a, **options: jnp.sum(run(a, *masks, **options) ** 2)
    got = jax.jit(jax.grad(partial(loss, implementation="tpu", interpret=True)))(arrays)
    want = jax.jit(jax.grad(partial(loss, implementation="xla")))(arrays)
    assert max(rel_rms(got[n], want[n]) for n in want) < FLOAT32


PLANTED = {
    "another key head's columns": (
        step_kernel,
        "_own_columns",
        lambda right: lambda plan, columns: jnp.roll(right(plan, columns), 1, axis=1),
    ),
    "the valid slots of another chunk": (
        step_kernel,
        "_by_column",
        lambda right: lambda plan, ref, chunk: right(plan, ref, chunk)[:, ::-1],
    ),
    "parts of other maxima": (
        base,
        "at_one_maximum",
        lambda right: lambda m, *sums, **_: (m.max(0), *(x.sum(0) for x in sums)),
    ),
    "a panel's weights in the columns of another": (
        step_kernel,
        "_in_panels",
        lambda right: lambda plan, weights: jnp.concatenate([weights, weights]),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_found(name, monkeypatch):
    where, of, plant = PLANTED[name]
    monkeypatch.setattr(where, of, plant(getattr(where, of)))
    case = dict(CASES["panels"], lengths=False)
    with pytest.raises(AssertionError):
        assert error(**case) < FLOAT32


def test_what_it_does_not_cover_is_refused_by_name_and_falls_to_xla():
    arrays, *masks = draw(K=16, V=16, slots=20)
    arrays = cast(arrays, jnp.float32)
    with pytest.raises(NotImplementedError, match="pass over the keys once, not Entmax"):
        run(arrays, *masks, normalizer="entmax", implementation="tpu")
    mixed = arrays | {"v_cache": arrays["v_cache"].astype(jnp.bfloat16)}
    with pytest.raises(NotImplementedError, match="caches of one dtype, not float32 and bfloat16"):
        run(mixed, *masks, implementation="tpu")
    wide = {n: jnp.zeros((*x.shape[:-1], 320)) for n, x in arrays.items()}
    with pytest.raises(NotImplementedError, match="K and V up to 256, not 320 and 320"):
        run(wide, *masks, implementation="tpu")
    with dispatch.lowering_for("tpu"):
        jax.eval_shape(partial(run, normalizer="entmax"), arrays, *masks)
        assert dispatch.last_choice("attention_step").implementation == "xla"
        jax.eval_shape(run, arrays, *masks)
        assert dispatch.last_choice("attention_step").implementation == "tpu"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("Hk", [1, 2, 3, 8, 16])
def test_compiles_for_absent_chips_and_copies_no_cache(Hk, D, dtype, monkeypatch):
    monkeypatch.undo()
    from gatedjax.aot import compile_for, libtpu

    if not libtpu.installed():
        pytest.skip("libtpu is not installed")
    B, slots, H = 2, 1024, 2 * Hk
    shape = partial(jax.ShapeDtypeStruct, dtype=dtype)
    cache = shape((B, slots, Hk, D))
    valid = jax.ShapeDtypeStruct((B, slots), jnp.bool_)

    def decode(q, k, v, valid):
        return attention_step(q, k, v, valid=valid, implementation="tpu")

    for chip in ("tpu:v5e", "tpu:v6e"):
        args = (shape((B, H, D)), cache, cache, valid)
        _, report = compile_for(chip, decode, *args, schedule=False)
        # A copied cache would be one of these.
        assert report.temp_bytes < cache.size * cache.dtype.itemsize
