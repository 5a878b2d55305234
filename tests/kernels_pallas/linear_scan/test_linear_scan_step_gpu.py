"""linear_scan_step on GPU, through jax-triton: numbers from Triton's interpreter, compilation for
an H200 not here.
"""

import importlib.util
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda_plugin import plugin_missing
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from triton_stand_in import interpreted

from gatedjax.aot import compile_for
from gatedjax.aot.gpu import devices
from gatedjax.aot.targets import GPUS
from kernels_pallas import dispatch
from kernels_pallas.linear_scan.gpu import step as gpu_step
from kernels_pallas.ops import linear_scan_step

PROGRAM = Path(__file__).with_name("triton_interpreter.py")
has = lambda name: importlib.util.find_spec(name) is not None
needs_triton = pytest.mark.skipif(
    not has("triton"), reason="triton is not installed (make test-cuda-aot)"
)
needs_cuda = pytest.mark.skipif(
    not has("jax_triton") or plugin_missing(),
    reason="jax-triton or the CUDA plugin is not installed (make test-cuda-aot)",
)


@needs_triton
def test_values_in_tritons_interpreter():
    """Every kind of decay, inclusive, exclusive and with a bonus, heads grouped, K and V no powers
    of two.
    """
    errors = interpreted(PROGRAM)
    assert len(errors) == 13 and all(state <= 2e-6 for _, state in errors.values())
    assert all(o <= (4e-3 if "bfloat16" in case else 2e-6) for case, (o, _) in errors.items()), (
        errors
    )


@pytest.mark.slow
@needs_triton
def test_a_planted_error_is_found():
    assert all(o > 2e-5 for case, (o, _) in interpreted(PROGRAM, "--plant").items())


def arrays(
    rank: int, B=8, H=16, Hk=8, Hv=4, K=128, V=128, dtype=jnp.bfloat16
) -> list[jax.ShapeDtypeStruct]:
    """State first, then q, k, v and the decay."""
    shapes = [(B, H, K), (B, Hk, K), (B, Hv, V)]
    decay = {0: [], 1: [(H,)], 3: [(B, H)], 4: [(B, H, K)]}[rank]
    of = lambda dtype: lambda shape: jax.ShapeDtypeStruct(shape, dtype)
    return [of(jnp.float32)((B, H, K, V)), *map(of(dtype), shapes), *map(of(jnp.float32), decay)]


def step(state, q, k, v, *decay, **options):
    return linear_scan_step(q, k, v, state, *decay, **options)


@needs_cuda
@pytest.mark.parametrize("rank", [0, 1, 3, 4])
def test_compiles_for_h200_and_updates_in_place(rank):
    args = arrays(rank)
    compiled, report = compile_for("cuda:h200", step, *args, donate_argnums=(0,))
    assert dispatch.last_choice("linear_scan_step").implementation == "gpu"
    assert "triton_kernel_call" in compiled.as_text()
    assert report.aliased_bytes == args[0].size * 4 and report.temp_bytes == 0


@needs_cuda
def test_compiles_inside_a_loop_a_checkpoint_and_vmap():
    def loop(state, *rest):
        return jax.lax.scan(lambda s, _: (step(s, *rest)[1], None), state, None, length=4)[0]

    args = arrays(4, K=96, V=80)
    one_more = [jax.ShapeDtypeStruct((2, *a.shape), a.dtype) for a in args]
    for fn, given in ((loop, args), (jax.checkpoint(step), args), (jax.vmap(step), one_more)):
        compiled, _ = compile_for("cuda:a100", fn, *given)
        assert "triton_kernel_call" in compiled.as_text()


@needs_cuda
def test_normalized_with_a_bonus():
    def run(state, *rest):
        return step(state, *rest[:-1], bonus=rest[-1], inclusive=False, normalize=True)

    args = arrays(4)
    args[0] = jax.ShapeDtypeStruct((*args[0].shape[:3], 129), jnp.float32)
    compiled, _ = compile_for("cuda:h200", run, *args, jax.ShapeDtypeStruct((16, 128), jnp.float32))
    assert "triton_kernel_call" in compiled.as_text()


@needs_cuda
def test_on_a_mesh_every_device_updates_its_own_rows():
    mesh = Mesh(np.array(devices(GPUS["h200"], 2)), ("data",), axis_types=(AxisType.Auto,))
    place = lambda a: jax.ShapeDtypeStruct(
        a.shape, a.dtype, sharding=NamedSharding(mesh, P("data"))
    )
    with jax.set_mesh(mesh):
        lowered = (
            jax.jit(step, donate_argnums=0)
            .trace(*map(place, arrays(4)))
            .lower(lowering_platforms=("cuda",))
        )
        text = lowered.compile(compiler_options={"xla_gpu_autotune_level": 0}).as_text()
    assert "all-gather" not in text and "triton_kernel_call" in text


def test_refusals(monkeypatch):
    x = jnp.ones((1, 2, 16))
    state = jnp.zeros((1, 2, 16, 16))
    by_name = partial(linear_scan_step, x, x, x, state, implementation="gpu")
    with pytest.raises(NotImplementedError, match="Triton's interpreter"):
        by_name(interpret=True)
    monkeypatch.setattr(gpu_step.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match="needs jax-triton"):
        by_name()
    monkeypatch.setattr(dispatch, "target_platform", lambda *arrays: "gpu")
    linear_scan_step(x, x, x, state)
    assert dispatch.last_choice("linear_scan_step").implementation == "xla"


def test_an_older_triton_is_said_once(monkeypatch):
    """torch pins one that jax-triton cannot compile with: then the step is XLA's."""
    x = jnp.ones((1, 2, 16))
    state = jnp.zeros((1, 2, 16, 16))
    monkeypatch.setattr(gpu_step.importlib.util, "find_spec", lambda name: "there")
    monkeypatch.setattr(gpu_step.metadata, "version", lambda name: "3.6.0+git1")
    monkeypatch.setattr(dispatch, "target_platform", lambda *arrays: "gpu")
    monkeypatch.setattr(gpu_step, "target_platform", lambda *arrays: "gpu")
    gpu_step._warn.cache_clear()
    with pytest.warns(UserWarning, match=r"needs triton 3\.7 or newer for jax-triton, got 3\.6\.0"):
        linear_scan_step(x, x, x, state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_scan_step(x, x, x, state)
    choice = dispatch.last_choice("linear_scan_step")
    assert choice.implementation == "xla" and "triton 3.7" in choice.reason
    with pytest.raises(NotImplementedError, match=r"'gpu' needs triton 3\.7"):
        linear_scan_step(x, x, x, state, implementation="gpu")
    monkeypatch.setattr(gpu_step.metadata, "version", lambda name: "3.10.1")
    assert gpu_step._unusable_triton() is None
