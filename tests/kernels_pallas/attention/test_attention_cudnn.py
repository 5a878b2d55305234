"""implementation="cudnn": traced and lowered for an NVIDIA GPU that is not here. Nothing runs."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn
from jax.sharding import AxisType, PartitionSpec

from kernels_pallas import dispatch
from kernels_pallas.attention import cudnn
from kernels_pallas.ops import attention, linear_scan

by_cudnn = partial(attention, implementation="cudnn")


@pytest.fixture
def on_cuda(monkeypatch):
    """As on a machine with a GPU and cuDNN, as far as tracing and lowering ask."""
    monkeypatch.setattr(cudnn, "target_platform", lambda: "cuda")
    monkeypatch.setattr(jax_cudnn, "check_cudnn_version", lambda: 91000)


def shapes(B=2, T=256, H=4, Hk=2, D=64, dtype=jnp.bfloat16):
    array = lambda heads, width=D: jax.ShapeDtypeStruct((B, T, heads, width), dtype)
    return array(H), array(Hk), array(Hk)


def lowered(fn, *args) -> str:
    return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "options, mask, window",
    [({}, "CAUSAL", 0), (dict(window=100), "CAUSAL", 100), (dict(causal=False), "NO_MASK", 0)],
)
def test_forward_and_backward_are_one_call_each(options, mask, window, on_cuda):
    def loss(q, k, v, gate):
        return by_cudnn(q, k, v, gate_logits=gate, scale=0.25, **options).astype(jnp.float32).sum()

    q, k, v = shapes()
    text = lowered(jax.grad(loss, argnums=range(4)), q, k, v, q)
    assert re.findall(r"@(__cudnn\$fmha\w+)", text) == [
        "__cudnn$fmhaSoftmax",
        "__cudnn$fmhaSoftmaxBackward",
    ]
    # Escaped JSON of the call: the scale, the mask, and how many tokens a query sees.
    config = text.replace("\\22", '"')
    assert f'"mask_type": "{mask}"' in config and '"fmha_scale": 0.25' in config
    assert f'"sliding_window_length": {window}' in config
    assert dispatch.last_choice("attention").implementation == "cudnn"


def test_the_gate_is_multiplied_behind_it(on_cuda, monkeypatch):
    """And the window is the number of tokens before a query: jax's own attention in its place."""
    right = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *a, implementation, **options: right(*a, implementation="xla", **options),
    )
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    q, k, v, gate = draw(1, 40, 4, 8), draw(1, 40, 2, 8), draw(1, 40, 2, 8), draw(1, 40, 4, 1)
    for options in ({}, dict(window=7, scale=0.5), dict(causal=False)):
        got = by_cudnn(q, k, v, gate_logits=gate, **options)
        want = attention(q, k, v, gate_logits=gate, implementation="reference", **options)
        assert got.dtype == want.dtype
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (got, want)), 0.03, 0.03)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_each_device_has_its_rows(axis_type, on_cuda):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        placed = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))
            for x, spec in zip(shapes(B=4), [PartitionSpec("data")] * 3)
        ]
        text = lowered(by_cudnn, *placed)
    assert "__cudnn$fmhaSoftmax" in text and "tensor<2x256x4x64xbf16>" in text


H = jax.ShapeDtypeStruct((4,), jnp.float32)
REFUSED = {
    "softmax, not Sigmoid": dict(normalizer="sigmoid"),
    "logits_soft_cap": dict(logits_soft_cap=30.0),
    "alibi_slopes": dict(alibi_slopes=H),
    "sink_logits": dict(sink_logits=H),
    "segment_ids": dict(segment_ids=jax.ShapeDtypeStruct((2, 256), jnp.int32)),
    "only where attention is causal": dict(window=8, causal=False),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_it_does_not_cover_is_refused_by_name(message, on_cuda):
    options = REFUSED[message]
    arrays = {n: x for n, x in options.items() if isinstance(x, jax.ShapeDtypeStruct)}
    rest = {n: x for n, x in options.items() if n not in arrays}
    with pytest.raises(NotImplementedError, match=f"attention: implementation='cudnn'.*{message}"):
        jax.eval_shape(partial(by_cudnn, **rest), *shapes(), **arrays)


@pytest.mark.parametrize(
    "message, case",
    [
        ("all bfloat16", dict(dtype=jnp.float32)),
        ("multiple of 8", dict(D=36)),
        ("up to", dict(D=264)),
    ],
)
def test_other_arrays_are_refused_by_name(message, case, on_cuda):
    with pytest.raises(NotImplementedError, match=f"attention: implementation='cudnn'.*{message}"):
        jax.eval_shape(by_cudnn, *shapes(**case))


def test_values_of_another_width_and_exact_matmuls_are_refused(on_cuda):
    q, k, _ = shapes()
    _, _, v = shapes(D=32)
    with pytest.raises(NotImplementedError, match="K = V"):
        jax.eval_shape(by_cudnn, q, k, v)
    with (
        jax.default_matmul_precision("highest"),
        pytest.raises(NotImplementedError, match="one pass"),
    ):
        jax.eval_shape(by_cudnn, q, k, k)


def test_without_a_gpu_or_without_cudnn_it_is_refused(monkeypatch):
    with pytest.raises(
        NotImplementedError, match="attention: implementation='cudnn' runs on NVIDIA"
    ):
        jax.eval_shape(by_cudnn, *shapes())
    monkeypatch.setattr(cudnn, "target_platform", lambda: "cuda")
    monkeypatch.setattr(jax_cudnn, "cuda_versions", None)
    with pytest.raises(NotImplementedError, match="implementation='cudnn': cuDNN is not detected"):
        jax.eval_shape(by_cudnn, *shapes())


def test_it_is_attentions_alone_and_never_chosen(on_cuda, monkeypatch):
    x = jnp.zeros((1, 4, 1, 8))
    with pytest.raises(NotImplementedError, match="linear_scan: implementation='cudnn' is not one"):
        linear_scan(x, x, x, implementation="cudnn")
    monkeypatch.setattr(dispatch, "target_platform", lambda: "cuda")
    refusals = {"gpu": lambda: "refuses", "cudnn": lambda: None}
    assert dispatch.choose("attention", None, refusals) == "xla"
