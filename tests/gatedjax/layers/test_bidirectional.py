"""Linear attention in both directions against matrices of all pairs, in float64 numpy: values, and
gradients against differences.
"""

import functools

import dense_attention as dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_gradients, rel_rms, slow

from gatedjax.layers.bidirectional import (
    linear_attention,
    lion,
    manhattan_attention,
    relative_linear_attention,
    softmax_free_attention,
    vision_gla,
)
from gatedjax.layers.bidirectional.grid import serpentines
from gatedjax.layers.bidirectional.local import depthwise_conv
from gatedjax.layers.feature_maps import favor_projection, features
from gatedjax.layers.rope import grid_angles, rotate
from gatedjax.layers.token_info import Grid
from kernels_pallas.linear_scan import linear_scan

B, T, H, K, V = 2, 13, 2, 4, 3
GRID = Grid(3, 4, 1)  # one token comes before it
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def tokens(T=T):
    q, k = normal(B, T, H, K), normal(B, T, H, K)
    # No vector is without a positive channel: ReLU leaves none of zeros.
    q[..., 0], k[..., 0] = np.abs(q[..., 0]), np.abs(k[..., 0])
    return {"q": q, "k": k, "v": normal(B, T, H, V)}


ANGLES = grid_angles(GRID, K, 1e4)[0, :, 0]
W = favor_projection(6, K, seed=1)
FAVOR = tokens()


def turned(x):
    return rotate(x, jnp.asarray(ANGLES)[None, :, None], interleaved=True)


def with_map(name, normalization, *, rope=False, scale=1.0, **options):
    """A form of sums, as (ours, dense)."""

    def ours(q, k, v):
        phi = features(name, q, k, **options)
        both = (
            tuple(
                jnp.concatenate([turned(p) for p in jnp.split(x, x.shape[-1] // K, -1)], -1)
                for x in phi
            )
            if rope
            else None
        )
        return linear_attention(*phi, v, normalization=normalization, scale=scale, rotated=both)

    return ours


def dense_rotated(x):
    blocks = np.split(x, x.shape[-1] // K, -1)
    return np.concatenate([dense.rotated(b, ANGLES) for b in blocks], -1)


def dense_mala(q, k, v):
    q, k = dense.elu_plus_one(q), dense.elu_plus_one(k)
    scale = K**-0.5 / T
    weights = dense.mala(
        scale * dense.products(q, k),
        scale * dense.products(dense_rotated(q), dense_rotated(k)),
    )
    return dense.applied(weights, v)


def dense_inline(q, k, v):
    return dense.applied(dense.inline(dense.products(q, k) * K**-0.5 / T), v)


def dense_nala(q, k, v):
    q, k = dense.norm_aware(q, k)
    total = dense.products(q, k).sum(-1, keepdims=True)
    return dense.applied(dense.products(dense_rotated(q), dense_rotated(k)) / total, v)


def dense_lina(q, k, v):
    q, k = dense.relu(q) + 1e-6, dense.relu(k) + 1e-6
    return dense.applied(dense.by_sum(dense.products(q, k)), v)


def dense_cosformer(q, k, v):
    i = np.arange(T)
    nearness = np.cos(np.pi / 2 / 16 * (i[:, None] - i))
    return dense.applied(dense.by_sum(dense.products(dense.relu(q), dense.relu(k)) * nearness), v)


def favor_exponents(x):
    x = np.asarray(x, np.float64) * K**-0.25
    return x @ W.T.astype(np.float64), (x**2).sum(-1, keepdims=True) / 2


# What is divided out is a constant to the gradient, and to differences here.
LARGEST_Q = favor_exponents(FAVOR["q"])[0].max(-1, keepdims=True)
LARGEST_K = favor_exponents(FAVOR["k"])[0].max((1, 3), keepdims=True)


def dense_favor(q, k, v):
    phi = []
    for x, largest in ((q, LARGEST_Q), (k, LARGEST_K)):
        wx, half = favor_exponents(x)
        phi.append(np.exp(wx - half - largest) + 1e-4)
    return dense.applied(dense.by_sum(dense.products(*phi)), v)


def dense_length(q, k, v):
    return dense.applied(dense.products(q, k) / T, v)


def relative(q, k, v, bias):
    return relative_linear_attention(jax.nn.elu(q) + 1, jax.nn.elu(k) + 1, v, bias)


def dense_relative(q, k, v, bias):
    i = np.arange(T)
    nearness = np.exp(bias[:, i[None] - i[:, None] + T - 1])
    a = dense.products(dense.elu_plus_one(q), dense.elu_plus_one(k)) * nearness
    return dense.applied(dense.by_sum(a), v)


def soft(q, landmarks, v):
    return softmax_free_attention(q, landmarks, v, iterations=40)


def dense_soft(q, landmarks, v):
    def kernel(x, y):
        difference = x[:, :, None] - y[:, None]
        return np.exp(-(difference**2).sum(-1) / 2).transpose(0, 3, 1, 2)

    q_m, m_m = kernel(q, landmarks), kernel(landmarks, landmarks)
    inverse = np.linalg.inv(m_m + 0.01 * np.eye(m_m.shape[-1]))
    return dense.applied(q_m @ inverse @ q_m.swapaxes(2, 3), v)


def manhattan(q, k, v, log_decay, **options):
    on_grid = (x.reshape(B, 4, 4, H, -1) for x in (q, k, v))
    return manhattan_attention(*on_grid, log_decay, **options).reshape(v.shape)


def dense_manhattan(q, k, v, log_decay, **options):
    return dense.manhattan(q, k, v, log_decay, (4, 4), **options)


SQUARE = tokens(T=16) | {"log_decay": -np.abs(normal(H))}
POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))
FORMS = {
    "MALA": (with_map("elu_plus_one", "mala", rope=True, scale=K**-0.5), dense_mala, tokens()),
    "InLine": (with_map("identity", "inline", scale=K**-0.5), dense_inline, tokens()),
    "NaLaFormer": (with_map("norm_aware", "sum", rope=True), dense_nala, tokens()),
    "LINA": (with_map("relu", "sum"), dense_lina, tokens()),
    "cosFormer": (
        with_map("cosformer", "sum", positions=POSITIONS, length=16),
        dense_cosformer,
        tokens(),
    ),
    "FAVOR+": (with_map("favor+", "sum", projection=W, shift_keys=True), dense_favor, FAVOR),
    "length": (with_map("identity", "length"), dense_length, tokens()),
    "relative": (relative, dense_relative, tokens() | {"bias": normal(H, 2 * T - 1)}),
    "SOFT": (
        soft,
        dense_soft,
        {"q": normal(B, T, H, K), "landmarks": 2 * normal(B, 5, H, K), "v": normal(B, T, H, V)},
    ),
    "Manhattan": (manhattan, dense_manhattan, SQUARE),
    "windows, shifted": (
        functools.partial(manhattan, window=2, shift=1),
        functools.partial(dense_manhattan, window=2, shift=1),
        SQUARE,
    ),
}


def compared(forms, tolerance=3e-6):
    """All in one program: values of each, and gradients with regard to the inputs of each."""
    given = {name: {n: jnp.asarray(x) for n, x in forms[name][2].items()} for name in forms}
    rng = np.random.default_rng(5)
    expected = {name: call(forms[name][1], forms[name][2]) for name in forms}
    weights = {name: rng.normal(size=o.shape) for name, o in expected.items()}

    def loss(given):
        out = {name: forms[name][0](**given[name]) for name in forms}
        return sum((out[name] * weights[name]).sum() for name in forms), out

    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(given)
    for name in forms:
        assert rel_rms(out[name], expected[name]) < tolerance, name
        check_gradients(
            lambda g, name=name: (forms[name][1](**g) * weights[name]).sum(),
            given[name],
            gradients[name],
        )


def call(form, given):
    return form(**{name: np.asarray(x, np.float64) for name, x in given.items()})


FAST = ("MALA", "SOFT", "windows, shifted")


def test_equals_all_pairs():
    compared({name: FORMS[name] for name in FAST})


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FORMS if name not in FAST])
def test_other_forms_equal_all_pairs(name):
    compared({name: FORMS[name]})


def test_rows_sum_to_one():
    """Values of 1 come out as 1, also where weights are negative."""
    q, k, v = FAVOR["q"], FAVOR["k"], np.ones((B, T, H, 1), np.float32)
    maps = {"mala": jax.nn.softplus, "inline": jax.nn.elu, "sum": jax.nn.softplus}

    @jax.jit
    def run(q, k, v):
        return {
            normalization: linear_attention(phi(q), phi(k), v, normalization=normalization)
            for normalization, phi in maps.items()
        }

    for normalization, o in run(q, k, v).items():
        assert np.abs(o - 1).max() < 1e-5, normalization


# --- decays


def signed(heads, *axes):
    return -np.abs(0.3 * normal(*axes, heads))


def dense_lion(q, k, v, decay, order=None):
    decay = np.broadcast_to(decay, (B, T, H))
    mask = dense.lion_mask(decay if order is None else decay[:, order])
    if order is not None:
        back = np.argsort(order)
        mask = mask[:, :, back][..., back]
    return mask * dense.products(dense.unit_silu(q), dense.unit_silu(k))


def lion_of(implementation=None, chunk_size=None, orders=(None,)):
    def ours(q, k, v, **decays):
        phi = features("unit_silu", q, k)
        return lion(
            *phi,
            v,
            list(decays.values()) or [None],
            orders=orders,
            implementation=implementation,
            chunk_size=chunk_size,
        )

    def expected(q, k, v, **decays):
        decays = list(decays.values()) or [np.zeros(H)]
        pairs = zip(decays, orders, strict=True)
        weights = sum(dense_lion(q, k, v, decay, order) for decay, order in pairs)
        return dense.applied(dense.by_sum(weights), v)

    return ours, expected


def vig_of(implementation=None, chunk_size=None):
    options = dict(implementation=implementation, chunk_size=chunk_size)

    def ours(q, k, v, forward, backward):
        return vision_gla(q, k, v, forward, backward, **options)

    return ours, dense.vig


VECTOR = {"forward": signed(K, B, T, H), "backward": signed(K, B, T, H)}
SCANS = {
    "no decay": (*lion_of(), tokens()),
    "one a head, recurrence": (*lion_of("reference"), tokens() | {"log_decay": signed(H)}),
    "one a token, chunks": (*lion_of("xla", 4), tokens() | {"log_decay": signed(H, B, T)}),
    "one a token, recurrence": (*lion_of("reference"), tokens() | {"log_decay": signed(H, B, T)}),
    "two orders": (
        *lion_of("xla", 4, serpentines(GRID)),
        tokens() | {"log_decay": signed(H, B, T), "log_decay_2": signed(H, B, T)},
    ),
    "ViG, chunks": (*vig_of("xla", 4), tokens() | VECTOR),
    "ViG, recurrence": (*vig_of("reference"), tokens() | VECTOR),
}


FAST_SCAN = "one a token, recurrence"


@pytest.mark.parametrize("name", [slow(name) if name != FAST_SCAN else name for name in SCANS])
def test_recurrence_and_chunks_equal_all_pairs(name):
    compared({name: SCANS[name]})


def test_orders_walk_over_the_grid():
    by_rows, by_columns = serpentines(Grid(2, 3, 1))
    assert by_rows.tolist() == [0, 1, 2, 3, 6, 5, 4]
    assert by_columns.tolist() == [0, 1, 4, 5, 2, 3, 6]


# --- documents, features, neighbors


@pytest.mark.slow
def test_documents_equal_each_alone():
    ids = jnp.asarray([[1] * 5 + [2] * 8, [1] * 9 + [2] * 4])
    q, k, v = FAVOR["q"], FAVOR["k"], FAVOR["v"]
    phi = (jax.nn.softplus(q), jax.nn.softplus(k))
    for normalization in ("none", "length", "sum", "mala", "inline"):
        run = jax.jit(functools.partial(linear_attention, normalization=normalization))
        packed = run(*phi, v, segment_ids=ids)
        for row, cut in ((0, 5), (1, 9)):
            for part in (slice(0, cut), slice(cut, T)):
                alone = run(*(x[row : row + 1, part] for x in (*phi, v)))
                assert rel_rms(packed[row : row + 1, part], alone) < 1e-5, normalization


def test_signed_features_keep_the_sign_of_their_sum():
    """o = num / den although some sums of weights are negative."""
    T = 29
    q, k, v = (np.random.default_rng(i).normal(size=(1, T, 1, 4)) for i in range(3))
    a = np.tril(dense.products(q, k))
    assert (a.sum(-1) < 0).sum() > 5
    expected = dense.applied(dense.by_sum(a), v)
    arrays = (x.astype(np.float32) for x in (q, k, v))
    for implementation in ("reference", "xla"):
        o = linear_scan(*arrays, normalize=True, implementation=implementation)
        assert rel_rms(o, expected) < 1e-4
        arrays = (x.astype(np.float32) for x in (q, k, v))


def test_random_features_approach_exponentials():
    """The error of FAVOR+ falls as features grow in number, until 1e-4 weighs more."""
    x = np.random.default_rng(3).normal(0, 0.5, size=(1, 32, 1, 8)).astype(np.float32)
    y = np.random.default_rng(4).normal(0, 0.5, size=(1, 32, 1, 8)).astype(np.float32)
    exact = dense.softmax(dense.products(x, y) * 8**-0.5)
    errors = []
    for count in (16, 128, 1024):
        phi = features("favor+", x, y, projection=favor_projection(count, 8, 0), shift_keys=True)
        errors.append(rel_rms(dense.by_sum(dense.products(*map(np.asarray, phi))), exact))
    assert errors[0] > errors[1] > errors[2]
    assert errors[0] > 2 * errors[2]


def test_features_are_finite():
    """Of queries of zeros, and of keys so long that their exponentials overflow."""
    zeros = jnp.zeros((1, 2, 1, K))

    @jax.jit
    def run(zeros):
        options = dict(projection=100 * W)
        return (
            jax.grad(lambda q: features("norm_aware", q, q).q.sum())(zeros),
            features("favor+", zeros, zeros + 100.0, **options, shift_keys=False),
            features("favor+", zeros, zeros + 100.0, **options, shift_keys=True),
        )

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run(zeros)))


@pytest.mark.parametrize("grid", [None, GRID])
def test_convolution_equals_a_sum_over_neighbors(grid):
    x = normal(B, T, 5)
    kernel = normal(B, 9 if grid else 3, 5)
    expected = dense.depthwise(x, kernel, grid and grid[:2])
    assert rel_rms(depthwise_conv(x, kernel, grid), expected) < 1e-6
