"""The layer of linear attention in both directions: the papers' presets, their starts, what a call
and a configuration cannot have.
"""

import functools

import dense_attention as dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms, slow
from random_parameters import random_parameters

from gatedjax.config import BidirectionalLinearAttentionConfig, ModelConfig, layer
from gatedjax.config.bidirectional import BIDIRECTIONAL
from gatedjax.errors import InputError
from gatedjax.layers import BidirectionalLinearAttention
from gatedjax.layers.bidirectional_linear_attention import operator_start
from gatedjax.layers.token_info import TokenInfo

B, T, M, H, D = 2, 9, 8, 2, 4
GRID = (2, 4)
X = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, M)).astype(np.float32))
# Without a class token: what has no form for one.
WHOLE = ("gated_swin_rmt",)


def config(name, **values):
    sizes = dict(num_heads=H, key_dim=D, value_dim=D, grid=GRID, length=T)
    return BidirectionalLinearAttentionConfig(**sizes | BIDIRECTIONAL[name] | values)


def tokens_of(name):
    return X[:, 1:] if name in WHOLE else X


def made(name, x, **values):
    module = BidirectionalLinearAttention(config(name, **values), 1e-5, 0.4, jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return module, random_parameters(module, x, TokenInfo(positions))


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def heads(p, x, name):
    y = np.tensordot(x, p[name]["kernel"], 1)
    return y + p[name]["bias"] if "bias" in p[name] else y


def layer_norm(x, p, eps=1e-5):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def rms(x, p):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"]


def local(p, x):
    y = dense.depthwise(x, p["local"][None], GRID)
    y[:, 1:] += p["local_bias"]
    return y


def of_values(p, v):
    return local(p, v.reshape(B, T, -1)).reshape(v.shape)


def expected_vig(p, x):
    first = local(p, x)
    first[:, 0] = x[:, 0]
    q, k, v = (heads(p, first, name) for name in ("query", "key", "value"))
    low = heads(p, first, "decay_down")
    decays = [
        -np.logaddexp(0, -heads(p, low, f"{direction}_decay")) / 16
        for direction in ("forward", "backward")
    ]
    o = dense.vig(q, k, v, *decays)
    g = dense.sigmoid(heads(p, x, "local_gate"))
    return g * rms(o, p["norm"]) + (1 - g) * rms(first.reshape(o.shape), p["local_norm"])


def expected_nalaformer(p, x):
    q, k, v = (heads(p, x, name) for name in ("query", "key", "value"))
    phi_q, phi_k = dense.norm_aware(q, k)
    total = dense.products(phi_q, phi_k).sum(-1, keepdims=True)
    y, z = np.divmod(np.arange(8), 4)
    # Two pairs of channels: the row turns one, the column the other, both at frequency 1.
    angles = np.concatenate([np.zeros((1, 2)), np.stack([y, z], -1)])
    turned = [
        np.concatenate([dense.rotated(part, angles) for part in np.split(phi, 2, -1)], -1)
        for phi in (phi_q, phi_k)
    ]
    o = dense.applied(dense.products(*turned) / total, v) + of_values(p, v)
    o = layer_norm(o.reshape(B, T, -1), p["output_norm"]).reshape(o.shape)
    gate = heads(p, x, "output_gate")
    return o * gate * dense.sigmoid(gate)


def expected_inline(p, x):
    q, k, v = (heads(p, x, name) for name in ("query", "key", "value"))
    o = dense.applied(dense.inline(dense.products(q, k) * D**-0.5 / T), v)
    mean = x.mean(1).reshape(B, H, -1)
    h = np.einsum("bhm,hmv->bhv", mean, p["dynamic_up"]) + p["dynamic_up_bias"]
    h = np.asarray(jax.nn.gelu(h, approximate=False))
    kernel = np.einsum("bhv,hvdw->bhdw", h, p["dynamic_down"]) + p["dynamic_down_bias"]
    kernel = np.moveaxis(kernel.reshape(B, H * D, 9), -1, 1)
    return o + dense.depthwise(v.reshape(B, T, -1), kernel, GRID).reshape(v.shape)


def expected_lion_s(p, x):
    q, k, v = (heads(p, x, name) for name in ("query", "key", "value"))
    log_decay = -np.logaddexp(0, heads(p, x, "decay"))
    log_decay[:, 0] = 0
    a = dense.products(dense.unit_silu(q), dense.unit_silu(k)) * dense.lion_mask(log_decay)
    return dense.applied(dense.by_sum(a), v)


def expected_galerkin(p, x):
    y, z = np.divmod(np.arange(8), 4)
    places = np.concatenate([np.zeros((1, 2)), np.stack([y, z / 3], -1)])[None, :, None]
    places = np.broadcast_to(places, (B, T, H, 2))

    def normed(name, norm):
        y = heads(p, x, name)
        if norm:
            y = layer_norm(y, {part: p[f"{name}_norm_{part}"] for part in ("scale", "bias")})
        return np.concatenate([places, y], -1)

    q, k, v = normed("query", False), normed("key", True), normed("value", True)
    return dense.applied(dense.products(q, k) / T, v)


def expected_soft(p, x):
    q, v = heads(p, x, "query") * D**-0.25, heads(p, x, "value")
    image = q[:, 1:].reshape(B, 1, 2, 2, 2, H, D)
    blocks = image.transpose(0, 1, 3, 2, 4, 5, 6).reshape(B, 2, 4, H, D)
    m = np.einsum("bmrhk,rkd->bmhd", blocks, p["landmark"])
    m = np.asarray(jax.nn.gelu(layer_norm(m, p["landmark_norm"]), approximate=False), np.float64)

    def kernel(x, y):
        return np.exp(-((x[:, :, None] - y[:, None]) ** 2).sum(-1) / 2).transpose(0, 3, 1, 2)

    q_m, inverse = kernel(q, m), np.linalg.inv(kernel(m, m) + 0.01 * np.eye(2))
    return dense.applied(q_m @ inverse @ q_m.swapaxes(2, 3), v) + of_values(p, v)


EXPECTED = {
    "vig": expected_vig,
    "nalaformer": expected_nalaformer,
    "inline": expected_inline,
    "lion_s": expected_lion_s,
    "galerkin": expected_galerkin,
    "soft": expected_soft,
}


@pytest.mark.parametrize("name", ["nalaformer", *(slow(n) for n in EXPECTED if n != "nalaformer")])
def test_equals_the_paper(name):
    values = dict(iterations=40) if name == "soft" else {}
    module, params = made(name, X, **values)
    y = jax.jit(module.apply)({"params": params}, X)
    p = float64(params)
    expected = np.tensordot(EXPECTED[name](p, np.asarray(X, np.float64)), p["out"]["kernel"], 2)
    assert rel_rms(y, expected) < 2e-5


def test_every_preset_has_the_shapes_of_its_input():
    """On a sequence, where it has a form for one, traced only."""
    for name in BIDIRECTIONAL:
        values = {} if name in WHOLE else {"grid": ()}
        x = X[:, 1:] if name in (*WHOLE, "soft") else X
        module = BidirectionalLinearAttention(config(name, **values))
        init = functools.partial(module.init_with_output, jax.random.key(0))
        y, _ = jax.eval_shape(init, x)
        assert y.shape == x.shape, name
        assert module.forward_flops_per_token(M, x.shape[1]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_every_preset_is_finite_in_bfloat16(name):
    x = tokens_of(name)
    module, params = made(name, x)
    module = module.clone(dtype=jnp.bfloat16)

    def loss(params, x):
        return (module.apply({"params": params}, x).astype(jnp.float32) ** 2).sum()

    leaves = jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(params, x))
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    unused = [leaf.size for leaf in leaves if not np.abs(np.asarray(leaf, np.float32)).max()]
    assert not unused


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lion_lit", "lion_s", "vig", "lina", "cosformer", "performer"])
def test_documents_equal_each_alone(name):
    module, params = made(name, X, grid=())
    run = jax.jit(functools.partial(module.apply, {"params": params}))
    ids = jnp.asarray([[1] * 4 + [2] * 5] * B)
    positions = jnp.concatenate([jnp.arange(4), jnp.arange(5)])
    packed = run(X, TokenInfo(jnp.broadcast_to(positions, (B, T)), ids))

    def alone(x):
        number = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        return run(x, TokenInfo(number, jnp.ones_like(number)))

    assert rel_rms(packed[:, :4], alone(X[:, :4])) < 2e-5
    assert rel_rms(packed[:, 4:], alone(X[:, 4:])) < 2e-5


def test_two_walks_over_the_image_have_decays_of_their_own():
    module = BidirectionalLinearAttention(config("lion_s", order="serpentine"))
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), X))["params"]
    assert {"decay", "decay_2"} < set(params)


def test_operators_start_near_a_hundredth_of_the_identity():
    start = operator_start(jax.random.key(0), (8, 2, 4), jnp.float32).reshape(8, 8)
    assert np.abs(start - 0.01 * np.eye(8)).max() < 0.01 * np.sqrt(6 / 16)


BAD = {
    "normalization: got 'length', expected 'sum' with decay 'scalar'": dict(
        decay="scalar", normalization="length"
    ),
    "grid: got (4,)": dict(grid=(4,)),
    "length: got None, expected a number of tokens with kv_gate": dict(kv_gate=True),
    "order: got 'serpentine'": dict(order="serpentine"),
    "positions: got 'rope'": dict(positions="rope", key_dim=5),
    "feature_map: got 'cosformer'": dict(
        decay="vector", normalization="none", feature_map="cosformer"
    ),
    "local_gate: got True": dict(local_gate=True),
    "decay: got 'constant', expected none of it": dict(form="manhattan", decay="constant"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_values_are_named(message):
    with pytest.raises(InputError) as error:
        BidirectionalLinearAttentionConfig(**BAD[message])
    assert str(error.value).startswith(message)


def test_bad_calls_are_named():
    """Rows that are too short or too long, documents on a grid, a causal model."""
    info = TokenInfo(jnp.zeros((B, T), jnp.int32), jnp.ones((B, T), jnp.int32))

    def message(name, x, *args, **values):
        with pytest.raises(InputError) as error:
            module = BidirectionalLinearAttention(config(name, **values))
            jax.eval_shape(lambda: module.init(jax.random.key(0), x, *args))
        return str(error.value)

    assert message("lina", X[:, :5]).startswith("grid: got (2, 4), expected at most 5 places")
    assert message("soft", X, landmark_size=3).startswith("landmark_size: got 3")
    assert message("gated_swin_rmt", X).startswith("tokens before the grid: got 1")
    assert message("gated_swin_rmt", X, grid=()).startswith("grid: got ()")
    assert message("lina", X, length=8).startswith("length: got 8, expected at least the 9 tokens")
    expected = "segment_ids: got 'documents', expected None with grid (2, 4)"
    assert message("mala", X, info).startswith(expected)
    with pytest.raises(InputError, match="expected a causal mixer"):
        ModelConfig(pattern=("both",), mixers={"both": config("mala")}, num_layers=1)
    mixers = {"both": config("lion_s", grid=())}
    assert ModelConfig(task="masked_lm", pattern=("both",), mixers=mixers, num_layers=1)
    assert layer("bidirectional_linear_attention", **BIDIRECTIONAL["mala"]).kind
