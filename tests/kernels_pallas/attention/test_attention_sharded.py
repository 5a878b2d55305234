"""attention cut along T over devices equals attention on one: values and gradients; and the work is
shared out.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    FLOAT32,
    assert_close,
    call,
    cast,
    draw,
    force_tiles,
    value_and_gradients,
)
from helpers import slow
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels_pallas.attention import sharded

DEVICES = 4
CASES = {
    "causal": {},
    "everything": dict(
        gate="head-wise", sinks=True, slopes=True, segments=True, window=18, logits_soft_cap=4.0
    ),
    "short window, element-wise gate": dict(
        window=5, gate="element-wise", slopes=True, segments=True
    ),
    "window of a device's tokens": dict(window=16),
    "full": dict(causal=False, segments=True, slopes=True),
    "odd parts, a length": dict(T=60, gate="element-wise", normalizer="sigmoid"),
    "sparsemax": dict(normalizer="sparsemax", gate="head-wise"),
}
IN_TIME = ("q", "k", "v", "gate_logits")


def on_many(arrays, segment_ids=None, **options):
    mesh = jax.make_mesh((DEVICES,), ("context",), axis_types=(AxisType.Auto,))
    time = P(None, "context")
    specs = {name: time if name in IN_TIME else P() for name in arrays}

    @jax.shard_map(mesh=mesh, in_specs=(specs, time), out_specs=time, check_vma=True)
    def part(a, ids):
        q, k, v = (a[name] for name in "qkv")
        others = {name: x for name, x in a.items() if name not in "qkv"}
        return sharded.attention_sharded(
            q, k, v, axis_name="context", segment_ids=ids, **others, **options
        )

    return part(arrays, segment_ids)


def compare(name, monkeypatch):
    force_tiles(monkeypatch, 8, 8)
    arrays, options = draw(**dict(T=64, B=1, K=6, V=5) | CASES[name])
    arrays = cast(arrays, jnp.float32)
    expected = value_and_gradients(arrays, call, **options)
    assert_close(value_and_gradients(arrays, on_many, **options), expected, FLOAT32)


# "sparsemax" is causal in even parts too; the window of as many tokens is the harder one.
SLOW_CASES = ("causal", "short window, element-wise gate")


@pytest.mark.parametrize("name", [slow(name) if name in SLOW_CASES else name for name in CASES])
def test_four_devices_equal_one(name, monkeypatch):
    compare(name, monkeypatch)


def test_pieces_at_the_wrong_place_are_found(monkeypatch):
    right = sharded._Pieces.numbers
    monkeypatch.setattr(sharded._Pieces, "numbers", lambda self, own: right(self, own)[::-1])
    with pytest.raises(AssertionError, match=r"e-|0\."):
        compare("causal", monkeypatch)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_causal_work_is_balanced(size):
    """Every device attends for two pieces, which see the same number of keys together; every piece
    has one device.
    """
    pieces = sharded._Pieces(size, "context")
    numbers = np.stack(pieces.numbers(jnp.arange(size)))
    assert sorted(numbers.ravel().tolist()) == list(range(2 * size))
    assert set((numbers + 1).sum(0).tolist()) == {2 * size + 1}
    for half in (0, 1):
        for source, to in pieces._routes(half):
            assert numbers[half, to] == 2 * source + half


def test_other_implementations_are_refused():
    with pytest.raises(
        NotImplementedError, match="implementation='reference' takes no queries that are a part"
    ):
        on_many(cast(draw(T=8)[0], jnp.float32), implementation="reference")


def test_no_array_is_gathered_but_keys_and_values():
    """Per layer: two all-gathers forward, two reduce-scatters backward, and queries travel once
    each way.
    """
    arrays = cast(draw(T=64)[0], jnp.float32)
    text = lambda **options: str(
        jax.make_jaxpr(jax.grad(lambda a: on_many(a, **options).sum()))(arrays)
    )
    assert text().count("all_gather[") == 2 and text().count("reduce_scatter[") == 2
    assert "all_gather[" not in text(window=16), "a short window needs its neighbor only"
