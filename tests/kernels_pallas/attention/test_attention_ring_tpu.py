"""attention_sharded by the TPU kernels, interpreted on CPU: keys that travel round a ring of
devices give what one device gives, values and gradients, in float64's sense.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import FLOAT32, assert_close, call, cast, draw, truth, value_and_gradients
from helpers import slow
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import dispatch
from kernels_pallas.attention import sharded
from kernels_pallas.attention.tpu import op, ring

IN_TIME = ("q", "k", "v", "gate_logits")
CASES = {
    "causal": {},
    "everything": dict(gate="element-wise", sinks=True, segments=True, logits_soft_cap=4.0),
    "full": dict(causal=False, segments=True, sinks=True, gate="head-wise"),
    "short window": dict(window=5, segments=True, slopes=True, gate="head-wise"),
    "window of a device's tokens": dict(window=8, normalizer="sigmoid"),
    "two devices": dict(devices=2, segments=True),
    "one device": dict(devices=1, gate="element-wise"),
}


@pytest.fixture(autouse=True)
def quick_interpreter(interpreter_in_shard_map, monkeypatch):
    """The plain interpreter, which compiles to a program, instead of the one of TPUs."""
    monkeypatch.setattr(op, "interpret_params", lambda interpret, x: interpret)


def on_ring(arrays, segment_ids=None, devices=4, check_vma=True, **options):
    mesh = jax.make_mesh(
        (devices,),
        ("context",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:devices],
    )
    time = P(None, "context")
    specs = {name: time if name in IN_TIME else P() for name in arrays}
    options = {"implementation": "tpu", "interpret": True} | options

    @jax.shard_map(mesh=mesh, in_specs=(specs, time), out_specs=time, check_vma=check_vma)
    def part(a, ids):
        q, k, v = (a[name] for name in "qkv")
        others = {name: x for name, x in a.items() if name not in "qkv"}
        return sharded.attention_sharded(
            q, k, v, axis_name="context", segment_ids=ids, **others, **options
        )

    return part(arrays, segment_ids)


def case(name):
    options = dict(T=32, B=1, H=2, Hk=1, K=6, V=5) | CASES[name]
    devices = options.pop("devices", 4)
    arrays, options = draw(**options)
    return cast(arrays, jnp.float32), options, devices


def compare(name):
    arrays, options, devices = case(name)
    got = value_and_gradients(arrays, on_ring, devices=devices, **options)
    assert_close(got, truth(arrays, **options), FLOAT32)


@pytest.mark.parametrize("name", [slow(name) for name in CASES])
def test_a_ring_equals_one_device(name):
    compare(name)


def test_the_forward_pass_on_two_devices():
    """What is in `make test`; the slow ones have gradients and more devices."""
    arrays, options, _ = case("everything")
    got = jax.jit(lambda a: on_ring(a, devices=2, **options))(arrays)
    assert_close({"y": got}, {"y": truth_of_y(arrays, options)}, FLOAT32)


def truth_of_y(arrays, options):
    with jax.enable_x64(True):
        exact = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in arrays.items()}
        return np.asarray(call(exact, implementation="reference", **options))


PLANTED = {
    "keys of another device": ("_to_the_next", lambda right: lambda plan, x: x),
    "segments of another device": (
        "_segments_of",
        lambda right: lambda plan, inputs, device: right(plan, inputs, 0 * device),
    ),
    "each step by itself": (
        "forward",
        lambda right: lambda plan, inputs, save, before: right(plan, inputs, save),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_found(name, monkeypatch):
    of, plant = PLANTED[name]
    monkeypatch.setattr(ring, of, plant(getattr(ring, of)))
    with pytest.raises(AssertionError):
        compare("everything")


@pytest.mark.slow
def test_second_derivatives():
    arrays, options = draw(T=16, B=1, H=2, Hk=1, K=3, V=3, gate="head-wise", segments=True)
    arrays = cast(arrays, jnp.float32)

    def of_gradient(f, **options):
        def norm(a):
            gradient = jax.grad(lambda a: jnp.sum(f(a, **options) ** 2))(a)
            return sum(jnp.sum(x**2) for x in gradient.values())

        return jax.jit(jax.grad(norm))(arrays)

    got = of_gradient(on_ring, devices=2, **options)
    want = of_gradient(call, implementation="reference", **options)
    assert_close(got, want, 10 * FLOAT32)


def test_nothing_is_gathered_and_every_step_has_half_of_the_pairs():
    """Keys and values travel; of n devices each computes the same FLOPs."""
    arrays, options, _ = case("causal")
    text = str(jax.make_jaxpr(lambda a: on_ring(a, **options))(arrays))
    assert "all_gather" not in text and "ppermute" in text
    # Two keys' halves against all queries, and all keys against half of the queries.
    assert text.count("name=attention_forward") == 3


@pytest.mark.slow
def test_kernels_run_while_keys_travel(monkeypatch):
    """As compiled for four absent chips: in both loops every exchange begins before the kernels of
    a step and ends after them.
    """
    monkeypatch.undo()
    from gatedjax.aot import libtpu
    from gatedjax.aot.compile import slice_devices
    from gatedjax.aot.targets import parse_slice

    if not libtpu.installed():
        pytest.skip("libtpu is not installed")
    devices = np.array(slice_devices(parse_slice("v5e:2x2")))
    mesh = Mesh(devices, ("context",), axis_types=(AxisType.Auto,))
    tokens = P(None, "context")

    def shape(heads):
        where = NamedSharding(mesh, tokens)
        return jax.ShapeDtypeStruct(
            (1, 512 * devices.size, heads, 128), jnp.bfloat16, sharding=where
        )

    def both_passes(q, k, v, dy):
        part = partial(sharded.attention_sharded, axis_name="context")
        split = jax.shard_map(part, mesh=mesh, in_specs=(tokens,) * 3, out_specs=tokens)
        y, pull = jax.vjp(split, q, k, v)
        return y, pull(dy)

    with jax.sharding.set_mesh(mesh):
        traced = jax.jit(both_passes).trace(shape(2), shape(1), shape(1), shape(2))
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    assert dispatch.last_choice("attention").implementation == "tpu"
    text = compiled.as_text()
    assert "all-gather" not in text
    loops = [part for part in text.split("\n\n") if " conditional(" in part]
    assert len(loops) == 2
    for loop, exchanges in zip(sorted(loops, key=len), (2, 4)):
        before, after = loop.split(" conditional(")
        assert before.count(" collective-permute-start(") == exchanges
        assert after.count(" collective-permute-done(") == exchanges


REFUSED = {
    "merges the devices' keys by the log-sum-exp of softmax, which Sigmoid has not": dict(
        normalizer="sigmoid"
    ),
    "takes a window within the 8 tokens of a device, not 9": dict(window=9),
    "takes no alibi_slopes where tokens are cut": dict(slopes=True),
    "takes an even number of tokens on each device, not 7": dict(T=28),
    "takes normalizers that pass over the keys once, not Entmax": dict(normalizer="sparsemax"),
}


def test_what_it_does_not_cover_is_refused_by_name_and_falls_to_xla():
    for refusal, changed in REFUSED.items():
        arrays, options = draw(**dict(T=32, B=1) | changed)
        arrays = cast(arrays, jnp.float32)
        with pytest.raises(NotImplementedError, match=refusal):
            jax.eval_shape(lambda a, o=options: on_ring(a, **o), arrays)
        with dispatch.lowering_for("tpu"):
            by_default = options | dict(implementation=None, interpret=False)
            jax.eval_shape(lambda a, o=by_default: on_ring(a, **o), arrays)
        assert dispatch.last_choice("attention").implementation == "xla"
