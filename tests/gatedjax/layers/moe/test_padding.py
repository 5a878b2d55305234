"""Padding is no token: it goes nowhere, counts nowhere, and whatever it holds changes nothing.

What a document gets does not depend on the row that it is packed in.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms

from gatedjax.config import (
    GatedMLPConfig,
    LoRAMixtureConfig,
    RouterConfig,
    SoftMoEConfig,
    SparseMoEConfig,
)
from gatedjax.layers import FEED_FORWARDS
from gatedjax.layers.documents import documents_of
from gatedjax.layers.token_info import TokenInfo

M = 8
RNG = np.random.default_rng(0)
FREE = dict(zero_experts=1, copy_experts=1, constant_experts=1)


def sparse(router=(), **values):
    sizes = dict(num_experts=4, hidden=6)
    return SparseMoEConfig(**sizes | values, router=RouterConfig(**dict(router)))


GROUPED = dict(selection="grouped_topk", num_groups=2, kept_groups=1, bias_rule="sign")
FFNS = {
    "softmax": sparse(sequence_loss=1.0),
    "free and shared": sparse(**FREE, shared_hidden=6),
    "grouped": sparse(dict(GROUPED, scoring="sigmoid")),
    "weights go in": sparse(dict(scoring="sigmoid", weight_input=True, renormalize=False)),
    "hash": sparse(dict(selection="hash")),
    "skipping": sparse(dict(threshold=0.3)),
    "residual": sparse(dict(residual=True)),
    "expert choice": sparse(dict(selection="expert_choice", renormalize=False)),
    "capacity": sparse(capacity_factor=0.6),
    "capacity, choice": sparse(capacity_factor=0.6, capacity_order="choice", **FREE),
    "capacity, priority": sparse(capacity_factor=0.6, capacity_order="priority"),
    "soft": SoftMoEConfig(num_experts=2, slots_per_expert=2, hidden=6),
    "xlora": LoRAMixtureConfig(hidden=6, num_experts=3, rank=2, experts_per_token=2),
    "phatgoose": LoRAMixtureConfig(
        hidden=6, num_experts=3, rank=2, gate="phatgoose", experts_per_token=2
    ),
    "mlp": GatedMLPConfig(hidden=6),
    "biases": sparse(
        dict(affine=True),
        bias=True,
        gated=False,
        activation="relu_squared",
        latent=5,
        shared_hidden=6,
    ),
    "mlp with biases": GatedMLPConfig(hidden=6, activation="clamped_swiglu", bias=True),
}
# Two rows of documents and padding: at the end, in front, between, and an id that comes back.
IDS = np.array([[1] * 5 + [2] * 3 + [0] * 4, [0] * 2 + [7] * 4 + [0] + [3] * 2 + [7] * 3], np.int32)
TOKENS = RNG.integers(0, 30, IDS.shape).astype(np.int32)
X = RNG.normal(size=(*IDS.shape, M)).astype(np.float32)
PREVIOUS = RNG.normal(size=(*IDS.shape, 4)).astype(np.float32)
WEIGHT = RNG.normal(size=X.shape).astype(np.float32)


def documents():
    """(row, tokens) of each document, by hand."""
    return [
        (0, slice(0, 5)),
        (0, slice(5, 8)),
        (1, slice(2, 6)),
        (1, slice(7, 9)),
        (1, slice(9, 12)),
    ]


def make(name):
    """The layer, and random parameters and router state."""
    config = FFNS[name]
    layer = FEED_FORWARDS[config.kind](config, 0.5, jnp.float32, training=True)
    init = functools.partial(layer.init, info=info(IDS, TOKENS))
    shapes = nn.meta.unbox(jax.eval_shape(init, jax.random.key(0), X))["params"]
    values = np.random.default_rng(1)
    return layer, jax.tree.map(lambda s: 0.5 * values.normal(size=s.shape).astype("f"), shapes)


def at_start(array, row, tokens):
    """The document at the start of the first row, zeros behind and below it."""
    moved = np.zeros_like(array)
    moved[0, : tokens.stop - tokens.start] = array[row, tokens]
    return moved


def info(ids, tokens):
    positions = jnp.zeros(tokens.shape, jnp.int32)
    ids = None if ids is None else jnp.asarray(ids)
    return TokenInfo(positions, ids, jnp.asarray(tokens))


@functools.cache
def runner(name):
    """Output and statistics, and the gradients of parameters and input, of any rows."""
    layer, params = make(name)
    has_residual = name == "residual"

    def loss(params, x, weight, ids, tokens, previous):
        given = previous if has_residual else None
        y, statistics, _ = layer.apply(
            {"params": params}, x, info(ids, tokens), given, method="with_statistics"
        )
        kept = weight if ids is None else jnp.where((ids != 0)[..., None], weight, 0.0)
        total = jnp.sum(jnp.where(kept == 0, 0.0, y * kept))
        for key in ("probability", "sequence_loss", "z_loss"):
            total = total + jnp.sum(statistics.get(key, jnp.zeros(1)) ** 2)
        return total, (y, statistics)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))

    def run(x, ids=None, tokens=TOKENS, previous=PREVIOUS, weight=WEIGHT):
        return jax.device_get(gradient(params, x, weight, ids, tokens, previous))

    return run


# The others have nothing that these have not.
QUICK = {
    "softmax",
    "free and shared",
    "grouped",
    "residual",
    "expert choice",
    "soft",
    "xlora",
    "mlp",
}
QUICK |= {"capacity, priority"}
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FFNS]


SLOW_PAIRS = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("softmax", "expert choice", "capacity, choice")
]


@pytest.mark.parametrize("name", NAMES)
def test_padding_may_hold_anything(name):
    """Outputs, gradients and statistics to the bit; padding's own outputs and gradients are 0."""
    run = runner(name)
    pad = (IDS == 0)[..., None]
    expected = run(np.where(pad, 0.0, X), IDS)
    (_, dx), (y, _) = expected
    assert not np.any(np.asarray(y)[pad[..., 0]]) and not np.any(np.asarray(dx)[pad[..., 0]])
    for value in (np.nan, np.inf, 1e30):
        filled = np.where(pad, np.float32(value), X)
        previous = np.where(pad, np.float32(value), PREVIOUS)
        actual = run(filled, IDS, np.where(IDS == 0, 10**9, TOKENS), previous)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_packed_documents_equal_documents_alone(name):
    """Each document at the start of a row of its own: outputs; and the counts add up."""
    run = runner(name)
    _, (y, statistics) = run(X, IDS)
    counts = 0
    for row, tokens in documents():
        length = tokens.stop - tokens.start
        ids = np.full_like(IDS, 5)
        given = (X, ids, TOKENS, PREVIOUS, WEIGHT)
        _, (alone, of_document) = run(*(at_start(array, row, tokens) for array in given))
        assert rel_rms(y[row, tokens], alone[0, :length]) < 1e-5
        counts = counts + np.asarray(of_document.get("counts", 0))
    np.testing.assert_array_equal(statistics.get("counts", 0), counts)


@pytest.mark.parametrize("name", ["soft", *SLOW_PAIRS])
def test_rows_without_padding_need_no_ids(name):
    """One document a row: with ids or without, padded or not."""
    layer, params = make(name)
    run = jax.jit(
        lambda x, ids: layer.apply({"params": params}, x, info(ids, TOKENS[:, : x.shape[1]]))
    )
    y = run(X[:, :9], None)
    assert rel_rms(run(X[:, :9], np.full((2, 9), 3, np.int32)), y) < 1e-6
    padded = np.where(np.arange(12) < 9, 1, 0)[None].repeat(2, 0).astype(np.int32)
    assert rel_rms(run(np.where(padded[..., None], X, np.nan), padded)[:, :9], y) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_a_token_that_is_nan_stays_in_its_document(name):
    """One NaN in the second document of row 0: outputs of all other documents to the bit. Other
    tokens of its own document keep theirs, unless the layer mixes them or they compete.
    """
    run = runner(name)
    _, (expected, _) = run(X, IDS)
    broken = X.copy()
    broken[0, 6] = np.nan
    _, (y, statistics) = run(broken, IDS)
    other = np.ones(IDS.shape, bool)
    competes = name == "soft" or "capacity" in name or name == "expert choice"
    other[0, 5:8] = False if competes else [True, False, True]
    np.testing.assert_array_equal(np.asarray(y)[other], np.asarray(expected)[other])
    if name not in ("expert choice", "capacity", "capacity, choice", "capacity, priority"):
        assert np.isnan(np.asarray(y)[0, 6]).all()
    # The losses say so, and the step is skipped.
    assert "z_loss" not in statistics or np.isnan(statistics["z_loss"])


def test_statistics_are_those_of_tokens():
    """Beside NumPy, in float64."""
    _, params = make("softmax")
    _, (_, s) = runner("softmax")(X, IDS)
    z = X.astype(np.float64) @ np.asarray(params["router"]["kernel"], np.float64)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    hit = np.argsort(np.argsort(-z)) < 2
    real = IDS != 0
    np.testing.assert_array_equal(s["counts"], hit[real].sum(0))
    np.testing.assert_allclose(s["probability"], p[real].mean(0), rtol=1e-5)
    np.testing.assert_allclose(
        s["z_loss"], np.mean(np.log(np.exp(z[real]).sum(-1)) ** 2), rtol=1e-5
    )
    np.testing.assert_allclose(s["entropy"], -(p * np.log(p))[real].sum(-1).mean(), rtol=1e-5)
    rows = [
        4 * (hit[b][real[b]].mean(0) / 2 * p[b][real[b]].mean(0)).sum() for b in range(len(IDS))
    ]
    np.testing.assert_allclose(s["sequence_loss"], np.mean(rows), rtol=1e-5)


def test_rows_of_padding_alone_are_no_rows():
    run = runner("softmax")
    ids, x = IDS.copy(), X.copy()
    ids[1], x[1] = 0, np.nan
    _, (_, statistics) = run(x, ids)
    _, (_, twice) = run(X[[0, 0]], IDS[[0, 0]], TOKENS[[0, 0]])
    for name in statistics:
        factor = 2 if name == "counts" else 1
        np.testing.assert_allclose(factor * statistics[name], twice[name], rtol=1e-6, err_msg=name)
    nothing = run(np.full_like(X, np.nan), np.zeros_like(IDS))
    for leaf in jax.tree.leaves(nothing):
        assert not np.any(leaf)


def test_capacity_is_a_measure_of_training():
    """Evaluation drops nothing: a row of tokens is what its tokens are one by one."""
    layer, params = make("capacity")
    evaluated = jax.jit(layer.clone(training=False).apply)
    _, (_, trained) = runner("capacity")(X, IDS)
    whole = evaluated({"params": params}, X)
    assert trained["dropped"] > 0
    single = [evaluated({"params": params}, X[:, t : t + 1]) for t in range(X.shape[1])]
    assert rel_rms(jnp.concatenate(single, axis=1), whole) < 1e-6


def test_documents_are_runs_of_equal_ids():
    d = documents_of(info(IDS, TOKENS))
    np.testing.assert_array_equal(d.is_token, IDS != 0)
    for row, tokens in documents():
        np.testing.assert_array_equal(d.start[row, tokens], tokens.start)
        np.testing.assert_array_equal(d.length[row, tokens], tokens.stop - tokens.start)
    np.testing.assert_array_equal(d.index[1], [0] * 2 + [1] * 4 + [2] + [3] * 2 + [4] * 3)
    assert documents_of(None) is None and documents_of(info(None, TOKENS)) is None
