"""Gates that mix tokens, and gates of channels: each against its formula in float64 numpy, values
and gradients by the parameters and the input.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_gradients, rel_rms

from gatedjax.config import (
    AssociativeMemoryConfig,
    GatedMLPConfig,
    GatedPositionalConfig,
    GatedUnitConfig,
    LoRAConfig,
    MixerGateConfig,
    MLPConfig,
    SpatialGateConfig,
)
from gatedjax.errors import InputError
from gatedjax.layers import (
    MLP,
    AssociativeMemory,
    GatedMLP,
    GatedPositional,
    GatedUnit,
    MixerGate,
    SpatialGate,
    TokenInfo,
    low_rank,
)
from gatedjax.layers.class_attention import (
    GatedClassAttention,
    annealed_scale,
    compensated,
    kept_fraction,
    mask_penalty,
    used_before,
)
from gatedjax.layers.fusion_gate import FusionGate
from gatedjax.layers.projection import Projection
from gatedjax.layers.spatial_gate import CrossGate
from gatedjax.layers.ternary import eight_bits, ternary
from gatedjax.layers.token_info import Grid

M = 6
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def gelu(x):
    return x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softmax(s):
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def dense(x, p):
    return np.tensordot(x, p["kernel"], 1) + p.get("bias", 0.0)


def norm(x, p, eps):
    centered = x - x.mean(-1, keepdims=True)
    variance = (centered**2).mean(-1, keepdims=True)
    return centered / np.sqrt(variance + eps) * p["scale"] + p["bias"]


def check(layer, formula, *inputs):
    """A layer's values and gradients with random parameters, against `formula(params, *inputs)`."""
    shapes = jax.eval_shape(lambda *a: layer.init(jax.random.key(0), *a), *inputs)
    params = jax.tree.map(lambda s: 0.6 * normal(*s.shape), shapes["params"])
    given = (params, *inputs)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), given)
    wanted = jax.tree.leaves(formula(*wide))
    weights = [normal(*y.shape) for y in wanted]

    def weighted(given):
        params, *inputs = given
        ys = jax.tree.leaves(layer.apply({"params": params}, *inputs))
        return sum(jnp.vdot(y, w) for y, w in zip(ys, weights)), ys

    run = jax.jit(jax.value_and_grad(weighted, has_aux=True))
    (_, found), gradient = run(given)
    for y, want in zip(found, wanted):
        assert rel_rms(y, want) < 1e-5
    check_gradients(
        lambda given: sum((y * w).sum() for y, w in zip(jax.tree.leaves(formula(*given)), weights)),
        given,
        gradient,
    )


# --- spatial gates


def gate_of_tokens(v, p):
    """Tokens along the axis before the last."""
    return np.einsum("...tf,ts->...sf", v, p["matrix"]) + p["bias"][:, None]


def unit(y, p, eps=1e-6):
    u, v = np.split(y, 2, axis=-1)
    return u * gate_of_tokens(norm(v, p["norm"], eps), p["tokens"])


def gmlp(p, x):
    return dense(unit(gelu(dense(x, p["in"])), p["gating_unit"]), p["out"])


def cells_of(rows, columns, cell, is_grid):
    """Lists of patches that are mixed: the patches of each block, or of each place of the cells."""
    places = np.arange(rows * columns).reshape(rows, columns)
    groups = []
    if is_grid:
        height, width = rows // cell[0], columns // cell[1]
        for r, c in np.ndindex(height, width):
            groups.append(places[r::height, c::width].ravel())
    else:
        for r, c in np.ndindex(rows // cell[0], columns // cell[1]):
            rs, cs = r * cell[0], c * cell[1]
            groups.append(places[rs : rs + cell[0], cs : cs + cell[1]].ravel())
    return groups


def over_cells(x, mix, cell, is_grid):
    B, rows, columns, F = x.shape
    flat = x.reshape(B, rows * columns, F)
    y = np.zeros_like(flat)
    for group in cells_of(rows, columns, cell, is_grid):
        y[:, group] = mix(flat[:, group])
    return y.reshape(x.shape)


BLOCK, CELLS = (2, 3), (2, 2)
PATCHES = SpatialGateConfig(over="blocks_and_grid", hidden=8, block=BLOCK, grid=CELLS)


def multi_axis(p, x):
    parts = np.split(gelu(dense(x, p["in"])), 2, axis=-1)
    for i, (name, cell) in enumerate({"grid": CELLS, "blocks": BLOCK}.items()):

        def mix(group, q=p[name]):
            y = gelu(dense(norm(group, q["norm"], 1e-6), q["in"]))
            return group + dense(unit(y, q["gating_unit"]), q["out"])

        parts[i] = over_cells(parts[i], mix, cell, name == "grid")
    return dense(np.concatenate(parts, axis=-1), p["out"])


def test_gmlp():
    x = normal(2, 5, M)
    check(SpatialGate(SpatialGateConfig(hidden=8)), gmlp, x)


def test_amlps_tiny_attention():
    """Of the input of the block, added to the map of tokens."""

    def formula(p, x):
        q, k, v = (dense(x, p[f"tiny_{n}"])[:, :, 0] for n in ("query", "key", "value"))
        weights = softmax(np.einsum("btd,bsd->bts", q, k) * 3**-0.5)
        tiny = p["tiny_out"]
        attended = np.einsum("btd,hdf->btf", weights @ v, tiny["kernel"]) + tiny["bias"]
        u, v = np.split(gelu(dense(x, p["in"])), 2, axis=-1)
        gating = p["gating_unit"]
        gate = gate_of_tokens(norm(v, gating["norm"], 1e-6), gating["tokens"])
        return dense(u * (gate + attended), p["out"])

    x = normal(2, 5, M)
    check(SpatialGate(SpatialGateConfig(hidden=8, tiny_attention=3)), formula, x)


def nin(p, x):
    def mlp(x, name):
        return dense(gelu(dense(x, p[f"{name}_up"])), p[f"{name}_down"])

    m = x + mlp(norm(x, p["token_norm"], 1e-6).swapaxes(1, 2), "token").swapaxes(1, 2)
    m = m + mlp(norm(m, p["channel_norm"], 1e-6), "channel")
    return dense(x, p["value"]) * m


@pytest.mark.slow
def test_ninformer():
    check(MixerGate(MixerGateConfig(token_hidden=3, channel_hidden=7)), nin, normal(2, 5, M))


@pytest.mark.slow
def test_maxims_block():
    """Patches of 4 x 6 behind one other token, which gets nothing."""
    info = TokenInfo(jnp.zeros((2, 25), jnp.int32), grid=Grid(4, 6, 1))

    def formula(p, x):
        y = multi_axis(p["multi_axis"], x[:, 1:].reshape(2, 4, 6, M))
        return np.concatenate([np.zeros((2, 1, M)), y.reshape(2, 24, M)], axis=1)

    layer = SpatialGate(PATCHES)
    check(_With(layer, info), formula, normal(2, 25, M))


class _With:
    """A layer with its token info, for `check`."""

    def __init__(self, layer, *rest):
        self.layer, self.rest = layer, rest

    def init(self, key, x):
        return self.layer.init(key, x, *self.rest)

    def apply(self, params, x):
        return self.layer.apply(params, x, *self.rest)


@pytest.mark.slow
def test_maxims_cross_gate():
    def weights(x, p):
        parts = np.split(gelu(dense(norm(x, p["norm"], 1e-6), p["in"])), 2, axis=-1)
        for i, (name, cell) in enumerate({"grid": CELLS, "blocks": BLOCK}.items()):

            def mix(group, q=p[name]):
                return gate_of_tokens(group, q)

            parts[i] = over_cells(parts[i], mix, cell, name == "grid")
        return dense(np.concatenate(parts, axis=-1), p["out"])

    def formula(p, x, y):
        first = {"x": dense(x, p["first_x"]), "y": dense(y, p["first_y"])}
        inner = {n: gelu(dense(norm(first[n], p[f"norm_{n}"], 1e-6), p[f"in_{n}"])) for n in first}
        gates = {n: weights(inner[n], p[f"weights_{n}"]) for n in first}
        y = first["y"] + dense(inner["y"] * gates["x"], p["out_y"])
        x = first["x"] + y + dense(inner["x"] * gates["y"], p["out_x"])
        return x, y

    layer = CrossGate(PATCHES, 1e-6, 0.02, jnp.float32)
    check(layer, formula, normal(1, 4, 6, 4), normal(1, 4, 6, 4))


def test_what_spatial_gates_refuse():
    x = jnp.zeros((1, 6, M))
    layer = SpatialGate(PATCHES)
    with pytest.raises(ValueError, match=r"spatial_gate: info.grid: got None, expected the rows"):
        jax.eval_shape(layer.init, jax.random.key(0), x)
    info = TokenInfo(jnp.zeros((1, 6), jnp.int32), grid=Grid(2, 3))
    other = SpatialGate(SpatialGateConfig(over="blocks_and_grid", hidden=4, block=(2, 2)))
    with pytest.raises(InputError, match=r"grid: got \(2, 2\), expected divisors of the grid"):
        jax.eval_shape(lambda x: other.init(jax.random.key(0), x, info), x)
    behind = TokenInfo(jnp.zeros((1, 6), jnp.int32), grid=Grid(1, 5, 1))
    with pytest.raises(InputError, match=r"tokens before the patches: got 1, expected 0"):
        GatedPositional(GatedPositionalConfig()).init(jax.random.key(0), x, behind)
    packed = TokenInfo(jnp.zeros((1, 6), jnp.int32), jnp.ones((1, 6), jnp.int32))
    for mixer in (SpatialGate(SpatialGateConfig()), MixerGate(MixerGateConfig())):
        with pytest.raises(ValueError, match=r"info.segment_ids: got an array, expected None"):
            mixer.init(jax.random.key(0), x, packed)
        with pytest.raises(ValueError, match="cache: got one, expected none"):
            mixer.init_cache(1, 6)
    with pytest.raises(InputError, match="hidden: got 3, expected an even number"):
        SpatialGateConfig(hidden=3)
    with pytest.raises(InputError, match=r"block: got \(1, 2, 3\), expected two numbers"):
        SpatialGateConfig(block=(1, 2, 3))


# --- gated attention units

CHUNK = 4
DOCUMENTS = np.asarray([[1] * 9 + [2] * 4, [1] * 3 + [2] * 8 + [0] * 2])
POSITIONS = np.asarray([[*range(9), *range(4)], [*range(3), *range(8), 0, 0]])


def unit_formula(c, positions, documents):
    def activated(x, p, name):
        h = silu(dense(x, p[name]))
        if not c.conv_width:
            return h
        T, before = h.shape[1], (c.conv_width - 1) // 2
        y = h.copy()
        for t, w in np.ndindex(T, c.conv_width):
            if 0 <= t - before + w < T:
                y[:, t] += h[:, t - before + w] * p[f"{name}_conv"][w]
        return y

    def formula(p, x):
        T = x.shape[1]
        if c.token_shift:
            moved = np.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
            x = np.concatenate([moved[..., : M // 2], x[..., M // 2 :]], axis=-1)
        u, v = activated(x, p, "gate"), activated(x, p, "value")
        z = activated(x, p, "query_and_key")
        four = z[:, :, None] * p["scale"] + p["offset"]
        half = c.rotary_dim // 2
        angle = positions[:, :, None, None] * 1e4 ** (-np.arange(half) / max(half, 1))
        a, b = four[..., :half], four[..., half : 2 * half]
        cos, sin = np.cos(angle), np.sin(angle)
        turned = [a * cos - b * sin, b * cos + a * sin, four[..., 2 * half :]]
        four = np.concatenate(turned, axis=-1)
        squared = np.einsum("btk,bsk->bts", four[:, :, 0], four[:, :, 2]) / CHUNK
        linear = np.einsum("btk,bsk->bts", four[:, :, 1], four[:, :, 3])
        number = positions // CHUNK if c.causal else np.arange(T)[None] // CHUNK
        is_own = number[:, :, None] == number[:, None]
        weights = np.where(is_own, np.maximum(squared, 0) ** 2, 0)
        if c.causal:
            weights = weights + np.where(is_own, 0, linear) / CHUNK
            seen = (documents[:, :, None] == documents[:, None]) & np.tri(T, dtype=bool)
            weights = np.where(seen & (documents[:, :, None] > 0), weights, 0)
        else:
            weights = weights + linear / T
        o = u * (weights @ v)
        if c.form == "mossformer":
            o = (weights @ u) * v * sigmoid((weights @ v) * u)
        if c.conv_width:
            return activated(norm(o, p["out_norm"], 1e-6), p, "out")
        return dense(o, p["out"])

    return formula


def test_flash_unit_keeps_documents_apart():
    c = GatedUnitConfig(hidden=5, key_dim=8, chunk=CHUNK, rope_fraction=0.5)
    info = TokenInfo(jnp.asarray(POSITIONS), jnp.asarray(DOCUMENTS))
    formula = unit_formula(c, POSITIONS, DOCUMENTS)
    is_token = (DOCUMENTS > 0)[..., None]
    layer = GatedUnit(c)

    class Masked(_With):
        def apply(self, params, x):
            return jnp.where(is_token, super().apply(params, x), 0)

    check(Masked(layer, info), lambda p, x: np.where(is_token, formula(p, x), 0), normal(2, 13, M))


@pytest.mark.slow
def test_mossformers_unit_sees_both_ways():
    c = GatedUnitConfig("gated_unit", "mossformer", 5, 8, CHUNK, causal=False)
    positions = np.arange(10)[None].repeat(2, 0)
    check(GatedUnit(c), unit_formula(c, positions, None), normal(2, 10, M))


def test_mossformers_shift_and_convolutions():
    c = GatedUnitConfig(
        form="mossformer",
        hidden=5,
        key_dim=4,
        chunk=CHUNK,
        causal=False,
        token_shift=True,
        conv_width=3,
        rope_fraction=0.0,
    )
    check(GatedUnit(c), unit_formula(c, np.arange(6)[None].repeat(2, 0), None), normal(2, 6, M))
    for name, value in {"token_shift": True, "conv_width": 3}.items():
        with pytest.raises(InputError, match=f"{name}: got {value}, expected none with causal"):
            GatedUnitConfig(**{name: value})


@pytest.mark.slow
@pytest.mark.parametrize("form", ["flash", "mossformer"])
def test_a_unit_decodes(form):
    layer = GatedUnit(GatedUnitConfig("gated_unit", form, 5, 8, CHUNK), init_std=0.6)
    decodes(layer, normal(2, 11, M), (7, 8, 9, 10, 11))


def decodes(layer, x, ends):
    """A prompt and single tokens give what the whole row gives."""
    params = layer.init(jax.random.key(0), x)
    whole = layer.apply(params, x)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    cache = layer.init_cache(x.shape[0], x.shape[1])
    step = jax.jit(lambda x, p, c: layer.apply(params, x, TokenInfo(p), c, method="with_cache"))
    start = 0
    for end in ends:
        y, cache = step(x[:, start:end], positions[:, start:end], cache)
        assert rel_rms(y, whole[:, start:end]) < 1e-5
        start = end


# --- associative memory


def memory_formula(documents):
    def formula(p, x):
        T = x.shape[1]
        local = np.zeros_like(x)
        for t, w in np.ndindex(T, 3):
            s = t - 2 + w
            if s >= 0:
                same = (documents[:, s] == documents[:, t])[:, None]
                local[:, t] += np.where(same, x[:, s] * p["conv"][w], 0)
        gates = sigmoid(dense(x, p["gate"]))
        recalled = softmax(x @ p["memory"].T) @ p["memory"]
        return gates[:, :, 0] * (local + p["conv_bias"]) + gates[:, :, 1] * recalled

    return formula


@pytest.mark.slow
def test_associative_memory():
    layer = AssociativeMemory(AssociativeMemoryConfig(width=M, slots=5))
    info = TokenInfo(jnp.asarray(POSITIONS[:1]), jnp.asarray(DOCUMENTS[:1]))
    check(_With(layer, info), memory_formula(DOCUMENTS[:1]), normal(1, 13, M))


@pytest.mark.slow
def test_associative_memory_decodes():
    layer = AssociativeMemory(AssociativeMemoryConfig(width=M, slots=5), init_std=0.6)
    decodes(layer, normal(2, 6, M), (4, 5, 6))


# --- feed-forwards and projections


@pytest.mark.slow
def test_activator():
    def formula(p, x):
        u = norm(gelu(dense(x, p["gate"])), p["norm"], 1e-5)
        return dense(u * norm(dense(x, p["up"]), p["norm"], 1e-5), p["down"])

    c = GatedMLPConfig(hidden=5, activation="gelu", bias=True, norm=True)
    check(GatedMLP(c), formula, normal(2, 3, M))


def test_neuron_gates():
    def formula(p, x):
        a = np.maximum(dense(x, p["up"]), 0) ** 2
        q = p["neuron_gate"]
        return dense(q["gain"] * a * sigmoid((a - q["threshold"]) / 0.5), p["down"])

    c = MLPConfig(hidden=5, neuron_gate="soft", neuron_temperature=0.5)
    check(MLP(c), formula, normal(2, 3, M))
    hard = MLP(MLPConfig(hidden=5, neuron_gate="hard", activation="silu"))
    x = normal(2, 3, M)
    p = jax.tree.map(
        lambda s: normal(*s.shape), jax.eval_shape(hard.init, jax.random.key(0), x)["params"]
    )
    a = silu(dense(x, p["up"]))
    q = p["neuron_gate"]
    wanted = dense(np.where(a > q["threshold"], q["gain"] * a, 0), p["down"])
    assert rel_rms(hard.apply({"params": p}, x), wanted) < 1e-5


def test_ternary_matrices_and_gated_updates():
    """Values, the straight-through gradient, and the merged matrix."""
    config = LoRAConfig(2, 3.0, ("*",), ternary=True, gate_start=0.1)
    x = normal(3, M)
    layer = Projection({"embed": M}, {"mlp": 4}, 0.02, jnp.float32, name="w")
    with low_rank.low_rank_updates(config):
        shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
        p = jax.tree.map(lambda s: normal(*s.shape), shapes)
        y, pull = jax.vjp(lambda p: layer.apply({"params": p}, x), p)
        (gradient,) = pull(jnp.ones_like(y))
    w, lora = p["kernel"], p["lora"]
    s = np.abs(w).mean()
    effective = s * np.clip(np.round(w / s), -1, 1) + 1.5 * lora["gate"] * lora["a"] @ lora["b"]
    assert rel_rms(y, x @ effective) < 1e-5
    # As if the matrix were not rounded.
    assert rel_rms(gradient["kernel"], x.T @ np.ones((3, 4))) < 1e-6
    of_gate = (1.5 * x @ lora["a"] @ lora["b"]).sum()
    assert np.isclose(gradient["lora"]["gate"], of_gate, rtol=1e-4)
    whole = low_rank.merged({"w": p}, config)["w"]
    assert set(whole) == {"kernel"} and rel_rms(whole["kernel"], effective) < 1e-5
    stack = np.stack([w, 3 * w])
    assert rel_rms(ternary(jnp.asarray(stack), 1)[1], 3 * ternary(jnp.asarray(w))) < 1e-6


def test_inputs_of_eight_bits():
    """Of a token: 255 steps, zeros stay, the gradient goes straight through; a projection's too."""
    x = normal(4, 2, 3)
    x[0] = 0
    wide = x.astype(np.float64)
    s = np.maximum(np.abs(wide).max((1, 2), keepdims=True), 1e-5) / 127
    rounded = s * np.clip(np.round(wide / s), -128, 127)
    found, pull = jax.vjp(lambda x: eight_bits(x, 2), jnp.asarray(x))
    assert rel_rms(found, rounded) < 1e-6 and rel_rms(found, wide) > 1e-3
    weights = normal(4, 2, 3)
    np.testing.assert_array_equal(pull(jnp.asarray(weights))[0], weights)
    config = LoRAConfig(1, 1.0, ("*",), ternary=True, eight_bit_inputs=True)
    layer = Projection({"heads": 2, "head_dim": 3}, {"embed": 4}, 0.02, jnp.float32, name="w")
    with low_rank.low_rank_updates(config):
        shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
        p = jax.tree.map(lambda s: normal(*s.shape), shapes)
        y, pull = jax.vjp(lambda x: layer.apply({"params": p}, x), jnp.asarray(x))
        (gradient,) = pull(jnp.ones_like(y))
    w, a, b = (np.asarray(k, np.float64) for k in (p["kernel"], p["lora"]["a"], p["lora"]["b"]))
    scale = np.abs(w).mean()
    w = scale * np.clip(np.round(w / scale), -1, 1)
    update = np.tensordot(a, b, 1)
    assert rel_rms(y, np.tensordot(rounded, w, 2) + np.tensordot(wide, update, 2)) < 1e-5
    assert rel_rms(gradient, np.broadcast_to((w + update).sum(-1), x.shape)) < 1e-5
    with pytest.raises(InputError, match="eight_bit_inputs: got True, expected false without"):
        LoRAConfig(1, 1.0, ("*",), eight_bit_inputs=True)


# --- class attention and fusion


@pytest.mark.slow
def test_gated_class_attention():
    def formula(p, x):
        masks = sigmoid(2.5 * p["tasks"][1])
        token = np.broadcast_to(p["class_token"], (2, 1, M))
        seen = np.concatenate([token, x], axis=1)
        q, k, v = (
            np.einsum("btm,mhd->bthd", a, p[n]["kernel"]) * masks[i].reshape(2, 3)
            for i, (n, a) in enumerate({"query": token, "key": seen, "value": seen}.items())
        )
        weights = softmax(np.einsum("bthd,bshd->bhts", q, k) * 3**-0.5)
        o = np.einsum("bhts,bshd->bthd", weights, v)
        return np.einsum("bthd,hdm->btm", o, p["out"]["kernel"])

    layer = GatedClassAttention(num_heads=2, num_tasks=3)
    check(_With(layer, 1, 2.5), formula, normal(2, 4, M))


def test_hard_attention_to_the_task():
    """What HAT does to scales, gradients and unused channels."""
    assert np.allclose([annealed_scale(b, 5, 40.0) for b in (0, 2, 4)], [0.025, 20.0125, 40.0])
    e = jnp.linspace(-1.0, 1.0, 7)
    scaled = jax.grad(lambda e: jnp.sum(jax.nn.sigmoid(3.0 * e)))(e)
    plain = jax.grad(lambda e: jnp.sum(jax.nn.sigmoid(e)))(e)
    assert np.allclose(compensated(scaled, e, 3.0, 40.0), 40.0 * plain, rtol=1e-4)
    masks = np.asarray([[1.0, 0.0, 0.2], [0.5, 0.0, 0.7]])
    before = used_before(masks)
    assert np.allclose(before, [1.0, 0.0, 0.7]) and not used_before(masks[:0]).any()
    assert np.isclose(mask_penalty(np.asarray([1.0, 1.0, 0.5]), before), (1.0 + 0.15) / 1.3)
    assert mask_penalty(masks[0], np.ones(3)) == 0
    kept = kept_fraction(np.ones(2), before)
    assert np.allclose(kept, [[0.0, 1.0, 0.3]] * 2)


@pytest.mark.slow
def test_fusion_of_two_streams():
    def formula(p, a, b):
        def taken(own, other, name):
            g = sigmoid(dense(np.concatenate([own, other], axis=-1), p[f"gate_{name}"]))
            return g * own + (1 - g) * dense(other, p[f"value_{name}"])

        return taken(a, b, "a"), taken(b, a, "b")

    check(FusionGate(), formula, normal(2, 3, M), normal(2, 3, 4))
