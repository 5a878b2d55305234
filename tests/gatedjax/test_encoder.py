"""Encoders: what a model of images or of masked text is, and what is refused to it."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gatedjax.config import (
    Config,
    DataConfig,
    DeltaAttentionConfig,
    FrozenDict,
    GatedAttentionConfig,
    GatedLinearAttentionConfig,
    GatedMLPConfig,
    Mamba2Config,
    MeshConfig,
    MLAConfig,
    ModelConfig,
    PatchConfig,
    RouterConfig,
    RWKV6Config,
    RWKV7ChannelMixConfig,
    RWKV7Config,
    SoftMoEConfig,
    SourceConfig,
    SparseMoEConfig,
)
from gatedjax.errors import InputError
from gatedjax.layers.conv import centered_conv
from gatedjax.layers.patches import PatchEmbedding, image_info, pooled, sines_and_cosines
from gatedjax.layers.rope import grid_angles, rotate
from gatedjax.layers.token_info import Grid
from gatedjax.model import LanguageModel, head_weights, init_caches
from gatedjax.training.losses import count_correct

ATTENTION = GatedAttentionConfig(num_heads=2, head_dim=8, causal=False, rope_fraction=0.0)
PATCHES = PatchConfig(height=4, width=6)
SMALL = ModelConfig(
    task="classify",
    patches=PATCHES,
    vocab_size=5,
    width=16,
    num_layers=1,
    mixers=FrozenDict(attention=ATTENTION),
    ffns=FrozenDict(mlp=GatedMLPConfig(hidden=16)),
    init_std=0.3,
    dtype="float32",
)


def with_layers(mixer=ATTENTION, ffn=None, **values) -> ModelConfig:
    ffn = GatedMLPConfig(hidden=16) if ffn is None else ffn
    return dataclasses.replace(
        SMALL, mixers=FrozenDict(attention=mixer), ffns=FrozenDict(mlp=ffn), **values
    )


@pytest.mark.parametrize("task", ["masked_lm", "classify"])
@pytest.mark.parametrize(
    "mixer",
    [
        DeltaAttentionConfig(),
        GatedLinearAttentionConfig(),
        MLAConfig(),
        Mamba2Config(),
        RWKV6Config(num_heads=1, value_dim=16),
        RWKV7Config(num_heads=1, head_dim=16),
        dataclasses.replace(ATTENTION, causal=True),
    ],
    ids=lambda mixer: mixer.kind,
)
def test_an_encoder_refuses_causal_mixers(task, mixer):
    named = "causal true" if mixer.kind == "gated_attention" else mixer.kind
    with pytest.raises(InputError, match=f"mixers.attention: got .*{named}.*task is '{task}'"):
        with_layers(mixer, task=task)


def test_an_encoder_takes_experts_that_see_all_tokens():
    choice = RouterConfig(selection="expert_choice", renormalize=False)
    for ffn in (SoftMoEConfig(), SparseMoEConfig(router=choice)):
        with_layers(ffn=ffn)
        with_layers(ffn=ffn, task="masked_lm")
        with pytest.raises(InputError, match=r"ffns.mlp: got .*this model predicts the next token"):
            with_layers(dataclasses.replace(ATTENTION, causal=True), ffn, task="lm")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda: with_layers(ffn=RWKV7ChannelMixConfig()),
            "ffns.mlp: got .*rwkv7_channel_mix.*expected a feed-forward for both directions",
        ),
        (
            lambda: with_layers(dataclasses.replace(ATTENTION, value_bank=1)),
            "mixers.attention.value_bank: got .*patches have no token ids",
        ),
        (
            lambda: with_layers(ffn=SparseMoEConfig(router=RouterConfig(selection="hash"))),
            "ffns.mlp.router.selection: got .*patches have no token ids",
        ),
        (lambda: PatchConfig(height=5), "patch_height: got 2, expected a divisor of 5"),
        (lambda: Config(model=SMALL), "data.sources.main.kind: got 'python_stdlib', expected"),
        (
            lambda: Config(model=SMALL, data=DataConfig(sources=DIGITS)),
            "data.seq_len: got 256, expected the tokens of an image of model.patches, 7",
        ),
        (
            lambda: Config(
                model=SMALL,
                data=DataConfig(sources=DIGITS, seq_len=7),
                mesh=MeshConfig(context=2),
            ),
            "mesh.context: got 2, expected 1",
        ),
    ],
)
def test_what_does_not_go_together_is_named(change, message):
    with pytest.raises(InputError, match=message):
        change()


DIGITS = FrozenDict(main=SourceConfig(kind="digits"))


def test_sines_and_cosines_follow_their_formula():
    table = sines_and_cosines(PATCHES, 16)
    assert table.shape == (7, 16)
    assert not table[0].any()
    for t in range(6):
        y, x = divmod(t, 3)
        for i in range(4):
            angle = 10_000 ** (-i / 3)
            expected = [np.sin(x * angle), np.cos(x * angle), np.sin(y * angle), np.cos(y * angle)]
            np.testing.assert_allclose(table[1 + t, i::4], expected, atol=1e-7)


@pytest.mark.parametrize("pooling", ["class_token", "mean"])
@pytest.mark.parametrize("positions", ["learned", "sincos", "none"])
def test_patches_become_the_tokens_of_the_formula(pooling, positions):
    """Values and gradients of the embedding and of the pooling, in float64."""
    config = dataclasses.replace(PATCHES, pooling=pooling, positions=positions)
    module = PatchEmbedding(config, 8, 0.5, jnp.float64)
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        patches = rng.normal(size=(2, config.num_tokens, config.size))
        params = nn.meta.unbox(module.init(jax.random.key(0), patches))["params"]
        params = jax.tree.map(lambda p: rng.normal(size=p.shape), params)
        weights = rng.normal(size=(2, 1, 8))

        def loss(params, patches):
            return jnp.sum(weights * pooled(config, module.apply({"params": params}, patches)))

        x = np.asarray(module.apply({"params": params}, patches))
        grads, of_patches = jax.grad(loss, argnums=(0, 1))(params, patches)
    kernel = params["projection"]["kernel"]
    expected = patches @ kernel + params["projection"]["bias"]
    first = config.extra_tokens
    if first:
        expected[:, 0] = params["class_token"]
    if positions == "learned":
        expected = expected + params["positions"]
    if positions == "sincos":
        expected = expected + sines_and_cosines(config, 8)
    np.testing.assert_allclose(x, expected, rtol=1e-6)
    # Of a mean every patch has its part; of the class token no patch has, before the layers.
    dx = np.zeros_like(expected)
    dx[:] = weights / config.num_tokens
    if first:
        dx[:] = 0.0
        dx[:, :1] = weights
        np.testing.assert_allclose(grads["class_token"], weights.sum((0, 1)), rtol=1e-6)
        dx_of_patches = np.zeros_like(dx)
    else:
        dx_of_patches = dx
    np.testing.assert_allclose(of_patches, dx_of_patches @ kernel.T, rtol=1e-5, atol=1e-7)
    if positions == "learned":
        np.testing.assert_allclose(grads["positions"], dx.sum(0), rtol=1e-6)


@pytest.fixture(scope="module")
def encoder():
    module = LanguageModel(SMALL)
    rng = np.random.default_rng(1)
    patches = jnp.asarray(rng.normal(size=(2, 7, 4)), jnp.float32)
    tokens = jnp.zeros((2, 7), jnp.int32)
    init = jax.jit(lambda key: module.init(key, tokens, patches=patches)["params"])

    @jax.jit
    def classify(params, patches):
        """Logits, and the gradient of those of the first image."""

        def of_first(patches):
            hidden, _, _ = module.apply({"params": params}, tokens, patches=patches)
            logits = hidden[:, 0] @ head_weights(params).T
            return logits[0, 0], logits

        (_, logits), gradient = jax.value_and_grad(of_first, has_aux=True)(patches)
        return logits, gradient

    return nn.meta.unbox(init(jax.random.key(0))), patches, classify


def test_the_class_token_sees_every_patch_of_its_image_alone(encoder):
    params, patches, classify = encoder
    size = np.abs(np.asarray(classify(params, patches)[1])).max(axis=-1)
    assert (size[0, 1:] > 1e-4).all() and not size[1].any()
    # The class token stands where its place has no patch.
    assert not size[0, 0]


def test_positions_tell_patches_apart_and_nothing_else_does(encoder):
    params, patches, both = encoder

    def classify(params, patches):
        return np.asarray(both(params, patches)[0])

    moved = patches[:, jnp.array([0, 2, 1, 6, 5, 4, 3])]
    assert not np.allclose(classify(params, moved), classify(params, patches), atol=1e-3)
    without = jax.tree.map(lambda p: p, params)
    without["patches"]["positions"] = jnp.zeros_like(params["patches"]["positions"])
    np.testing.assert_allclose(classify(without, moved), classify(without, patches), atol=1e-5)


def test_an_encoder_decodes_nothing():
    with pytest.raises(ValueError, match=r"config\.task: got 'classify', expected 'lm'"):
        init_caches(SMALL, 1, 8)


def test_the_grid_says_how_patches_lie():
    info = image_info(PATCHES, jnp.zeros((2, 7, 4)))
    assert info.grid == (2, 3, 1)
    assert info.segment_ids is None and info.positions.shape == (2, 7)


@pytest.mark.parametrize("chunk", [0, 4])
def test_correct_predictions_are_counted(chunk):
    rng = np.random.default_rng(2)
    hidden = rng.normal(size=(2, 5, 8)).astype(np.float32)
    weights = rng.normal(size=(6, 8)).astype(np.float32)
    targets = np.argmax(hidden @ weights.T, axis=-1)
    targets[0, :2] = (targets[0, :2] + 1) % 6
    mask = np.array([[1, 1, 1, 0, 2], [0, 0, 1, 1, 1]], np.float32)
    found = count_correct(hidden, weights, targets, mask, chunk)
    np.testing.assert_allclose(found, [3.0, 3.0])


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_a_centered_convolution_sees_both_sides_of_its_document(width):
    """Values, and gradients by the transposed sum."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 6, 3))
    kernel = rng.normal(size=(width, 3))
    bias = rng.normal(size=3)
    segment_ids = np.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]], np.int32)
    dy = rng.normal(size=x.shape)
    expected = np.zeros_like(x) + bias
    dx = np.zeros_like(x)
    dkernel = np.zeros_like(kernel)
    for b, t, w in np.ndindex(2, 6, width):
        source = t - (width - 1) // 2 + w
        if 0 <= source < 6 and segment_ids[b, source] == segment_ids[b, t]:
            expected[b, t] += kernel[w] * x[b, source]
            dx[b, source] += kernel[w] * dy[b, t]
            dkernel[w] += x[b, source] * dy[b, t]
    y, transposed = jax.vjp(
        lambda x, kernel: centered_conv(x, kernel, segment_ids, bias),
        jnp.asarray(x, jnp.float32),
        jnp.asarray(kernel, jnp.float32),
    )
    of_x, of_kernel = transposed(jnp.asarray(dy, jnp.float32))
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(of_x, dx, atol=1e-5)
    np.testing.assert_allclose(of_kernel, dkernel, atol=1e-5)


def test_rotations_on_a_grid_say_how_far_rows_and_columns_are_apart():
    """Products of rotated vectors depend on the two distances alone, and follow the formula."""
    angles = grid_angles(Grid(3, 4, extra=1), 8, base=100.0)
    assert angles.shape == (1, 13, 1, 4) and not angles[0, 0].any()
    np.testing.assert_allclose(angles[0, 1 + 4 * 2 + 3, 0], [2, 2 / 10, 3, 3 / 10], rtol=1e-6)
    rng = np.random.default_rng(4)
    q, k = rng.normal(size=(2, 10)).astype(np.float32)
    rotated = [
        np.asarray(rotate(jnp.asarray(np.tile(x, (1, 13, 1, 1))), jnp.asarray(angles)))[0, 1:, 0]
        for x in (q, k)
    ]
    products = (rotated[0] @ rotated[1].T).reshape(3, 4, 3, 4)
    np.testing.assert_allclose(products[0, 0, 1, 2], products[1, 1, 2, 3], rtol=1e-4)
    assert abs(products[0, 0, 1, 2] - products[0, 0, 2, 1]) > 1e-3
    # The last two channels do not turn.
    np.testing.assert_array_equal(rotated[0][:, 8:], np.tile(q[8:], (12, 1)))
    with pytest.raises(InputError, match=r"rope_grid: got True, expected false with model.task"):
        mixer = dataclasses.replace(ATTENTION, rope_fraction=1.0, rope_grid=True)
        with_layers(mixer, task="masked_lm")
