"""attention_step's GPU kernel, interpreted on CPU: a cache split over its length gives what the
whole one gives.
"""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import BFLOAT16, FLOAT32
from helpers import rel_rms
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from step_cases import ONE_PASS, cast, draw_step, error_of, run

from kernels_pallas import dispatch

room, normalizers_room = (
    importlib.import_module(f"kernels_pallas.attention.{name}")
    for name in ("gpu.step", "normalizers.base")
)
slow = partial(pytest.param, marks=pytest.mark.slow)  # what a neighbor of the same case also covers
QUICK = ("softmax", "self_adjust")


def draw(B=3, H=4, Hk=2, K=24, V=40, gate="element-wise", **case):
    """(arrays, valid, distances); of the last row nothing at all is valid, and of the one before it
    a single slot.
    """
    arrays, valid, distances = draw_step(B, H, Hk, K, V, gate, **case)
    valid[-2, 1:], valid[-2, 0] = False, True
    return arrays, jnp.asarray(valid), distances


def error(dtype=jnp.float32, normalizer="softmax", **case) -> float:
    return error_of("gpu", draw(**case), dtype, normalizer)


def few_programs(monkeypatch, programs):
    monkeypatch.setattr(room, "STEP_PROGRAMS", programs)


@pytest.mark.parametrize("normalizer", [n if n in QUICK else slow(n) for n in ONE_PASS])
def test_every_normalizer_of_one_walk(normalizer):
    """Five parts, the last one short, a slot of padding in none."""
    assert error(normalizer=normalizer, slopes=True, sinks=normalizer == "softmax") < FLOAT32


@pytest.mark.parametrize("programs", [slow(1), 16])
def test_parts_of_several_blocks(programs, monkeypatch):
    few_programs(monkeypatch, programs)
    assert error(gate="head-wise", sinks=True, H=6, Hk=2) < FLOAT32


@pytest.mark.slow
def test_bfloat16():
    assert error(jnp.bfloat16, gate=None) < BFLOAT16


@pytest.mark.slow
def test_whole_blocks_and_many_heads_of_a_group():
    """Nothing is masked but by `valid`; more rows than the least tile has."""
    assert error(H=20, Hk=1, K=16, V=32, slots=256, gate=None) < FLOAT32


def test_how_a_cache_is_split():
    assert room.split(heads=16, blocks=512) == (16, 32)  # not 17, of which some would wait
    assert room.split(heads=1000, blocks=512) == (1, 512)
    assert room.split(heads=1, blocks=3) == (3, 1)


@pytest.mark.slow
def test_the_gradient_is_xlas():
    arrays, *masks = draw(sinks=True)
    arrays = cast(arrays, jnp.float32)
    loss = lambda a, **options: jnp.sum(run(a, *masks, **options) ** 2)
    got = jax.jit(jax.grad(partial(loss, implementation="gpu", interpret=True)))(arrays)
    want = jax.jit(jax.grad(partial(loss, implementation="xla")))(arrays)
    assert max(rel_rms(got[n], want[n]) for n in want) < FLOAT32


def test_a_slot_that_is_not_valid_may_hold_anything():
    """Not read at all; and what is valid shows."""
    arrays, valid, _ = draw(B=2, gate=None)
    arrays = cast(arrays, jnp.float32)
    step = jax.jit(partial(run, implementation="gpu", interpret=True))
    want = step(arrays, valid, None)
    unused = ~valid[:, :, None, None]
    for bad in (np.nan, np.inf):
        garbage = {n: jnp.where(unused, bad, arrays[n]) for n in ("k_cache", "v_cache")}
        assert (step(arrays | garbage, valid, None) == want).all()
    # Of the first row, slots that the query sees: a value's channel, every one by a key.
    [slot, *_] = np.flatnonzero(valid[0])
    for name in ("k_cache", "v_cache"):
        seen = arrays | {name: arrays[name].at[0, slot, 1, 5].set(np.nan)}
        hidden = np.isfinite(step(seen, valid, None))
        assert hidden[0, :2].all() and not hidden[0, 2:, 5].any() and hidden[1].all()


PLANTED = {
    "parts of other maxima": (
        normalizers_room,
        "at_one_maximum",
        lambda right: lambda m, *sums: (m.max(0), *(x.sum(0) for x in sums)),
    ),
    "a part without its last block": (
        room,
        "split",
        lambda right: lambda *a: (lambda parts, each: (parts, each - 1))(*right(*a)),
    ),
    "the slots of another block": (
        room,
        "_slots",
        lambda right: lambda ref, at, inside, width: right(ref, at ^ 64, inside, width),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [n if "maxima" in n else slow(n) for n in PLANTED])
def test_planted_errors_are_found(name, monkeypatch):
    few_programs(monkeypatch, 16)
    where, of, plant = PLANTED[name]
    monkeypatch.setattr(where, of, plant(getattr(where, of)))
    with pytest.raises(AssertionError):
        assert error(gate=None) < FLOAT32


@pytest.mark.slow
def test_vmap():
    arrays, *masks = draw()
    arrays = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), cast(arrays, jnp.float32))
    step = lambda implementation, **options: jax.jit(
        jax.vmap(lambda a: run(a, *masks, implementation=implementation, **options))
    )
    assert rel_rms(step("gpu", interpret=True)(arrays), step("xla")(arrays)) < FLOAT32


def test_on_a_mesh(interpreter_in_shard_map):
    """Under plain jit, and inside shard_map with varying axes checked: no cache moves."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    arrays, valid, _ = draw(B=2, sinks=True, gate="head-wise")
    arrays = cast(arrays, jnp.float32)
    specs = {n: P("data", None, "tensor") if "cache" in n else P("data", "tensor") for n in arrays}
    specs["sink_logits"] = P("tensor")
    step = lambda a, valid: run(a, valid, None, implementation="gpu", interpret=True)
    inside = jax.shard_map(
        step, in_specs=(specs, P("data")), out_specs=P("data", "tensor"), check_vma=True
    )
    want = run(arrays, valid, None, implementation="xla")
    with jax.set_mesh(mesh):
        placed = {n: jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in arrays.items()}
        here = jax.device_put(valid, NamedSharding(mesh, P("data")))
        for program in (step, inside):
            compiled = jax.jit(program).lower(placed, here).compile()
            assert "all-gather" not in compiled.as_text()
            assert rel_rms(compiled(placed, here), want) < FLOAT32


def test_other_normalizers_are_refused_by_name_and_fall_to_xla():
    arrays, *masks = draw()
    arrays = cast(arrays, jnp.float32)
    with pytest.raises(NotImplementedError, match="pass over the keys once, not Entmax"):
        run(arrays, *masks, normalizer="entmax", implementation="gpu")
    with pytest.raises(ValueError, match="interpret: got True with implementation=None"):
        run(arrays, *masks, interpret=True)
    run(arrays, *masks, normalizer="entmax")
    assert dispatch.last_choice("attention_step").implementation == "xla"
