"""delta_scan_step on GPU, through jax-triton: numbers from Triton's interpreter, compilation for an
H200 not here.
"""

import importlib.util
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from cuda_plugin import plugin_missing
from triton_stand_in import interpreted

from gatedjax.aot import compile_for
from kernels_pallas import dispatch
from kernels_pallas.linear_scan.gpu import step as scan_step
from kernels_pallas.ops import delta_scan_step

PROGRAM = Path(__file__).with_name("delta_triton_interpreter.py")


def has(name):
    return importlib.util.find_spec(name) is not None


needs_triton = pytest.mark.skipif(
    not has("triton"), reason="triton is not installed (make test-cuda-aot)"
)
needs_cuda = pytest.mark.skipif(
    not has("jax_triton") or plugin_missing(),
    reason="jax-triton or the CUDA plugin is not installed (make test-cuda-aot)",
)


@needs_triton
def test_values_in_tritons_interpreter():
    """Every kind of decay and of erase key, heads grouped, K and V no powers of two."""
    errors = interpreted(PROGRAM)
    assert len(errors) == 7
    for case, (o, state) in errors.items():
        assert state <= 2e-6, errors
        assert o <= (4e-3 if "bfloat16" in case else 2e-6), errors


@pytest.mark.slow
@needs_triton
def test_a_planted_error_is_found():
    errors = interpreted(PROGRAM, "--plant")
    assert all(o > 2e-5 for o, _ in errors.values())


def arrays(rank: int, rule: str = "beta", B=8, H=16, Hk=8, K=128, V=128):
    """State first, then q, k and v, then what else the rule has, by name."""
    like = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    single = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    tokens = [single((B, H, K, V)), like((B, Hk, K)), like((B, Hk, K)), like((B, H, V))]
    others = {}
    if rule == "beta":
        others["beta"] = single((B, H))
    else:
        others |= {"erase": like((B, H, K)), "write": like((B, H, V))}
    if rank:
        others["log_decay"] = single({3: (B, H), 4: (B, H, K)}[rank])
    return tokens, others


def step(state, q, k, v, others):
    return delta_scan_step(q, k, v, state, **others, l2_norm=True)


@needs_cuda
@pytest.mark.parametrize("rank, rule", [(0, "beta"), (3, "beta"), (4, "beta"), (4, "channels")])
def test_compiles_for_h200_and_updates_in_place(rank, rule):
    tokens, others = arrays(rank, rule)
    compiled, report = compile_for("cuda:h200", step, *tokens, others, donate_argnums=(0,))
    assert dispatch.last_choice("delta_scan_step").implementation == "gpu"
    assert "triton_kernel_call" in compiled.as_text()
    assert report.aliased_bytes == tokens[0].size * 4 and report.temp_bytes == 0


@needs_cuda
def test_compiles_inside_a_loop_and_vmap():
    tokens, others = arrays(4, K=96, V=80)

    def loop(state, *rest):
        def body(state, _):
            return step(state, *rest)[1], None

        return jax.lax.scan(body, state, None, length=4)[0]

    def one_more(x):
        return jax.ShapeDtypeStruct((2, *x.shape), x.dtype)

    rows = jax.tree.map(one_more, (*tokens, others))
    for fn, given in ((loop, (*tokens, others)), (jax.vmap(step), rows)):
        compiled, _ = compile_for("cuda:a100", fn, *given)
        assert "triton_kernel_call" in compiled.as_text()


def test_refusals(monkeypatch):
    x = jnp.ones((1, 2, 16))
    state = jnp.zeros((1, 2, 16, 16))
    beta = jnp.ones((1, 2))
    by_name = partial(delta_scan_step, x, x, x, state, beta, implementation="gpu")
    with pytest.raises(NotImplementedError, match=r"delta_scan_step.*Triton's interpreter"):
        by_name(interpret=True)
    monkeypatch.setattr(scan_step.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match=r"delta_scan_step.*needs jax-triton"):
        by_name()
    monkeypatch.setattr(dispatch, "target_platform", lambda *arrays: "gpu")
    delta_scan_step(x, x, x, state, beta)
    assert dispatch.last_choice("delta_scan_step").implementation == "xla"
