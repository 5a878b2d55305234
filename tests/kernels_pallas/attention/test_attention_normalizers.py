"""Every normalizer of `attention` against its paper's formula in float64: tile by tile, in the op,
and decoding.
"""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    BFLOAT16,
    FLOAT32,
    assert_close,
    call,
    cast,
    draw,
    force_tiles,
    truth,
    value_and_gradients,
)
from helpers import rel_rms, slow

from kernels_pallas.attention import NORMALIZERS, Entmax, Normalizer, Relu, Sigmoid
from kernels_pallas.attention.normalizers import multipass
from kernels_pallas.attention.normalizers.reference import weights
from kernels_pallas.ops import attention, attention_step

OTHERS = {
    "entmax 1.3": Entmax(alpha=1.3),
    "clipped at both ends": multipass.ClippedSoftmax(alpha=0.5, zeta=1.2),
    "reweighted, power 3": multipass.ReweightedSoftplus(power=3),
    "sigmoid of a length": Sigmoid(length=100),
}
ALL = NORMALIZERS | OTHERS
# What these do in the op, the others do too.
LATER = (
    "reluformer",
    "exp",
    "exp_mean",
    "plain_self_adjust",
    "normalized_pooling",
    "centered_softmax",
)
EARLY_OR_SLOW = [slow(name) if name in (*LATER, "learned_entmax") else name for name in NORMALIZERS]
R, C, V = 7, 24, 5


def parameters_of(normalizer: Normalizer, dtype):
    """Learned numbers of rows, [R, 1] each, around where they start."""
    around = np.linspace(-0.3, 0.3, R)[:, None]
    return tuple(jnp.asarray(start + around, dtype) for start in normalizer.parameters.values())


def by_tiles(normalizer: Normalizer, s, seen, v, do, tile=8):
    """o, dv and ds of rows whose keys come in tiles, as a kernel does it; the gradients of a row's
    learned numbers.
    """
    zero, keys = jnp.zeros((len(s), 1), s.dtype), jnp.arange(s.shape[1])[None]
    cuts = [(slice(None), slice(j, j + tile)) for j in range(0, s.shape[1], tile)]

    def walk(row, add):
        for cut in cuts:
            row = add(row, s[cut], seen[cut], keys[cut])
        return row

    row, sums = (
        normalizer.start(zero, normalizer.prepare(walk, zero, parameters_of(normalizer, s.dtype))),
        [jnp.zeros_like(do)] * normalizer.sums,
    )
    for cut in cuts:
        row, keep, tile_weights = normalizer.add(row, s[cut], seen[cut], keys[cut])
        sums = [
            (x if keep is None else keep * x) + w @ v[cut[1]] for x, w in zip(sums, tile_weights)
        ]
    outputs, saved = normalizer.finish(row, sums)
    deltas = [jnp.sum(do * outputs[n], axis=-1, keepdims=True) for n in normalizer.deltas]
    # Turned over, keys by rows: `gradient` must not care.
    turned = lambda *xs: tuple(x.T for x in xs)
    w, ds = normalizer.gradient(*turned(s, seen, keys, do @ v.T), turned(*deltas), turned(*saved))
    of_parameters = normalizer.parameter_gradients(deltas, saved)
    return {"o": outputs[0], "ds": ds.T, "dv": w @ do, **named(normalizer, of_parameters)}


def by_formula(normalizer: Normalizer, s, seen, v, do):
    output = lambda s, v, *p: weights(normalizer, s, seen, None, p) @ v
    o, pull = jax.vjp(output, s, v, *parameters_of(normalizer, s.dtype))
    ds, dv, *of_parameters = pull(do)
    return {"o": o, "ds": ds, "dv": dv, **named(normalizer, of_parameters)}


def named(normalizer: Normalizer, gradients):
    return dict(zip(normalizer.parameters, gradients, strict=True))


def tile_inputs(size: float):
    """Row 2 sees nothing, row 3 one key, row 4 three; the others most."""
    rng = np.random.default_rng(1)
    seen = rng.random((R, C)) < 0.8
    seen[2:5], seen[3, 9], seen[4, 9:12] = False, True, True
    s, v, do = (rng.normal(size=shape) for shape in ((R, C), (C, V), (R, V)))
    return (size * s).astype(np.float32), seen, v.astype(np.float32), do.astype(np.float32)


# Compiled once for all tests; a planted error wants its own `by_tiles`.
tiles = functools.cache(lambda normalizer: jax.jit(partial(by_tiles, normalizer)))
formula = functools.cache(lambda normalizer: jax.jit(partial(by_formula, normalizer)))


def tiles_and_truth(normalizer: Normalizer, size: float, tiles=tiles):
    s, seen, v, do = tile_inputs(size)
    normalizer = normalizer.for_length(C)
    actual = tiles(normalizer)(s, seen, v, do)
    with jax.enable_x64(True):
        s, v, do = (jnp.asarray(x, jnp.float64) for x in (s, v, do))
        expected = jax.tree.map(np.asarray, formula(normalizer)(s, seen, v, do))
    return actual, expected


@pytest.mark.parametrize("name", ALL)
def test_tiles_equal_the_formula(name):
    """Values and gradients; a row that sees nothing is zeros."""
    actual, expected = tiles_and_truth(ALL[name], 2.0)
    assert_close(actual, expected, FLOAT32)
    assert not np.any(actual["o"][2]) and not np.any(actual["ds"][2])


@pytest.mark.parametrize("name", [*EARLY_OR_SLOW, *OTHERS])
def test_huge_logits(name):
    actual, expected = tiles_and_truth(ALL[name], 1e4)
    assert rel_rms(actual["o"], expected["o"]) < FLOAT32
    assert all(np.isfinite(x).all() for x in actual.values())


def test_softpick_of_small_logits_is_exact():
    """e^s - 1 loses its digits there: 1e-3 would be left of them."""
    actual, expected = tiles_and_truth(NORMALIZERS["softpick"], 1e-4)
    assert_close(actual, expected, FLOAT32)


def _without_delta(normalizer, n):
    right = normalizer.gradient
    lose = lambda deltas: tuple(0 * x if i == n else x for i, x in enumerate(deltas))
    return lambda self, s, seen, keys, dp, deltas, saved: right(
        self, s, seen, keys, dp, lose(deltas), saved
    )


def _at_a_tile(normalizer, change):
    right = normalizer.add
    return lambda self, row, s, seen, keys: change(right(self, row, s, seen, keys))


PLANTED = {
    "no delta": ("softmax", "gradient", lambda c: _without_delta(c, 0)),
    "sums not rescaled": (
        "softmax",
        "add",
        lambda c: _at_a_tile(c, lambda a: a._replace(keep=jnp.ones_like(a.keep))),
    ),
    "softpick: masked keys counted": (
        "softpick",
        "add",
        lambda c: (
            lambda self, row, s, seen, keys: (
                lambda a: a._replace(row=(a.row[0], a.row[1] + jnp.exp(-a.row[0])))
            )(c.add(self, row, s, seen, keys))
        ),
    ),
    "bounds without a gradient": (
        "self_adjust",
        "gradient",
        lambda c: lambda self, s, seen, keys, *rest: c.gradient(self, s, seen, keys - 100, *rest),
    ),
    "temperature without a gradient": (
        "adaptive_temperature",
        "gradient",
        lambda c: _without_delta(c, 1),
    ),
    "sum without a gradient": ("reweighted_softplus", "gradient", lambda c: _without_delta(c, 1)),
    "clip without a gradient": ("clipped_softmax", "gradient", lambda c: _without_delta(c, 0)),
    "alpha without the entropy": (
        "learned_entmax",
        "parameter_gradients",
        lambda c: (
            lambda self, deltas, saved: c.parameter_gradients(
                self, (*deltas[:2], 0 * deltas[2]), saved
            )
        ),
    ),
    "deviation without a gradient": (
        "normalized_pooling",
        "gradient",
        lambda c: _without_delta(c, 0),
    ),
    "gamma of the wrong sign": (
        "centered_softmax",
        "parameter_gradients",
        lambda c: (
            lambda self, deltas, saved: c.parameter_gradients(self, (deltas[0], -deltas[1]), saved)
        ),
    ),
    "hidden keys counted": (
        "exp_mean",
        "add",
        lambda c: _at_a_tile(c, lambda a: a._replace(row=(a.row[0] + 1,))),
    ),
    "plain self-adjust without delta": (
        "plain_self_adjust",
        "gradient",
        lambda c: _without_delta(c, 0),
    ),
    "support of one weight too few": (
        "entmax",
        "finish",
        lambda c: lambda self, row, sums: c.finish(self, (*row[:3], 0.99 * row[3]), sums),
    ),
}


PLANTED_METHODS = ("add", "finish", "gradient", "parameter_gradients")


@pytest.mark.slow
@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_found(error, monkeypatch):
    name, method, plant = PLANTED[error]
    cls = type(NORMALIZERS[name])
    right = type("Right", (), {m: getattr(cls, m) for m in PLANTED_METHODS})
    monkeypatch.setattr(cls, method, plant(right))
    with pytest.raises(AssertionError, match=r"e-|0\."):
        assert_close(
            *tiles_and_truth(
                NORMALIZERS[name], 2.0, lambda normalizer: partial(by_tiles, normalizer)
            ),
            FLOAT32,
        )


MASKS = {"causal": {}, "window": dict(window=9), "segments": dict(segments=True)}
GATES = (None, "head-wise", "element-wise")
# `make test` has one case for each normalizer, with everything in it, every third in bfloat16 too;
# the slow ones are the whole product.
QUICK = [
    (name, GATES[1 + i % 2], (jnp.float32, jnp.bfloat16)[: 1 + (i % 3 == 0)])
    for i, name in enumerate(NORMALIZERS)
    if name not in LATER
]
TOLERANCES = {jnp.float32: FLOAT32, jnp.bfloat16: BFLOAT16}


def check_op(name, mask, gate, dtypes, monkeypatch):
    """On inputs that every dtype can hold, so that one truth serves them all."""
    force_tiles(monkeypatch, 16, 16)
    parameters = ALL[name].parameters
    arrays, options = draw(B=2, T=37, H=2, Hk=1, K=6, V=5, gate=gate, parameters=parameters, **mask)
    options["normalizer"] = ALL[name]
    rounded = cast(arrays, jnp.bfloat16)
    expected = truth(rounded, **options)
    for dtype in dtypes:
        actual = value_and_gradients(cast(rounded, dtype), implementation="xla", **options)
        assert_close(actual, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("name, gate, dtypes", QUICK, ids=[name for name, *_ in QUICK])
def test_op(name, gate, dtypes, monkeypatch):
    check_op(name, dict(window=6, segments=True), gate, dtypes, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", NORMALIZERS)
def test_op_with_every_mask_and_gate(name, mask, gate, monkeypatch):
    check_op(name, MASKS[mask], gate, TOLERANCES, monkeypatch)


@pytest.mark.parametrize("name", EARLY_OR_SLOW)
def test_decode_steps_equal_forward(name):
    """Also a step that may see no slot: zeros, and no NaN in its gradients."""
    T = 12
    arrays, _ = draw(B=1, T=T, H=2, Hk=1, K=6, V=5)
    a, normalizer = cast(arrays, jnp.float32), ALL[name].for_length(T)

    def step(t, q):
        valid = (jnp.arange(T) <= t)[None]
        return attention_step(q, a["k"], a["v"], valid=valid, normalizer=normalizer)

    def loss(q):
        nothing = step(jnp.int32(-1), q[:, 0])
        return jnp.sum(nothing), (
            nothing,
            jax.vmap(step, in_axes=(0, 1), out_axes=1)(jnp.arange(T), q),
        )

    (_, (nothing, steps)), dq = jax.jit(jax.value_and_grad(loss, has_aux=True))(a["q"])
    expected = call(a, normalizer=normalizer, implementation="reference")
    assert rel_rms(steps, expected) < FLOAT32
    assert not np.any(nothing) and not np.any(dq)


def test_sparsemax_equals_the_projection_on_the_simplex():
    projection = pytest.importorskip("optax.projections").projection_simplex
    s, seen, *_ = tile_inputs(1.0)
    expected = jax.vmap(projection)(s)
    actual = tiles(NORMALIZERS["sparsemax"])(
        s, np.ones_like(seen), np.eye(C, dtype=np.float32), np.ones((R, C))
    )["o"]
    assert rel_rms(actual, expected) < FLOAT32
    assert 0.2 < np.mean(np.asarray(actual) == 0) < 1


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_entmax_equals_the_entmax_package(alpha):
    """Values and gradients of the package by Entmax's authors."""
    torch, entmax = pytest.importorskip("torch"), pytest.importorskip("entmax")
    s, seen, _, do = tile_inputs(2.0)
    seen, v = np.ones_like(seen), np.eye(C, dtype=np.float32)
    do = np.random.default_rng(3).normal(size=(R, C)).astype(np.float32)
    z = torch.tensor(s.astype(np.float64), requires_grad=True)
    p = entmax.entmax_bisect(z, alpha=alpha, dim=-1, n_iter=100)
    (p * torch.tensor(do.astype(np.float64))).sum().backward()
    actual = by_tiles(Entmax(alpha=alpha), s, seen, v, do)
    assert_close(
        {x: actual[x] for x in ("o", "ds")},
        {"o": p.detach().numpy(), "ds": z.grad.numpy()},
        FLOAT32,
    )


def test_learned_entmax_equals_the_entmax_package():
    """With an alpha of every row: values, and gradients by logits and by alpha."""
    torch, entmax = pytest.importorskip("torch"), pytest.importorskip("entmax")
    s, seen, _, do = tile_inputs(2.0)
    seen, v = np.ones_like(seen), np.eye(C, dtype=np.float32)
    do = np.random.default_rng(3).normal(size=(R, C)).astype(np.float32)
    normalizer = NORMALIZERS["learned_entmax"]
    (alpha,) = parameters_of(normalizer, jnp.float32)
    z = torch.tensor(s.astype(np.float64), requires_grad=True)
    alphas = torch.tensor(np.asarray(alpha, np.float64), requires_grad=True)
    p = entmax.entmax_bisect(z, alpha=alphas, dim=-1, n_iter=100)
    (p * torch.tensor(do.astype(np.float64))).sum().backward()
    actual = by_tiles(normalizer, s, seen, v, do)
    expected = {"o": p.detach().numpy(), "ds": z.grad.numpy(), "alpha": alphas.grad.numpy()}
    assert_close({x: actual[x] for x in expected}, expected, FLOAT32)


def test_entmax_walks_few_times():
    """Newton's steps end when nothing moves any more."""
    count = []
    normalizer = Entmax(alpha=1.5)
    s, seen, *_ = tile_inputs(3.0)

    def walk(row, add):
        jax.debug.callback(lambda: count.append(1))
        return add(row, jnp.asarray(s), jnp.asarray(seen), None)

    jax.block_until_ready(normalizer.prepare(walk, jnp.zeros((R, 1))))
    jax.effects_barrier()
    assert 3 < len(count) < 14


def test_memory_of_two_walks_is_linear_too():
    T = 2048
    q = jnp.zeros((1, T, 1, 8))
    loss = lambda q: attention(q, q, q, normalizer="entmax").sum()
    compiled = jax.jit(jax.grad(loss)).lower(q).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.25 * 4 * T * T


@pytest.mark.parametrize("name", ["sigmoid", "relu", "clipped_softmax"])
def test_a_step_wants_the_length(name):
    x = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(
        ValueError,
        match=r"attention_step: normalizer: got .* without a length, expected .*\(length=...\)",
    ):
        attention_step(x[:, 0], x, x, valid=jnp.ones((1, 4), bool), normalizer=name)


def test_a_normalizer_of_ones_own():
    """An object that the op does not know runs on the xla path, and is refused by the reference."""

    class Identity(Relu):
        def _weights(self, s, seen):
            return (s if seen is None else jnp.where(seen, s, 0)) / self.length

    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 1, 4)), jnp.float32)
    normalizer = Identity(length=6)
    s = np.tril(np.einsum("btk,bsk->bts", x[:, :, 0], x[:, :, 0])) / 2 / 6
    assert rel_rms(attention(x, x, x, normalizer=normalizer)[:, :, 0], s @ x[:, :, 0]) < FLOAT32
    with pytest.raises(NotImplementedError, match="no formula for Identity"):
        attention(x, x, x, normalizer=normalizer, implementation="reference")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Entmax(alpha=2.5), "Entmax: alpha: got 2.5, expected above 1 and at most 2"),
        (lambda: Relu(power=3), "Relu: power: got 3, expected 1 or 2"),
        (lambda: multipass.ClippedSoftmax(alpha=-1.0), "ClippedSoftmax: got alpha=-1.0"),
        (lambda: multipass.ReweightedSoftplus(power=1), "ReweightedSoftplus: power: got 1"),
    ],
)
def test_bad_parameters_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
