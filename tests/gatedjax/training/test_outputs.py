"""Outputs other than softmax: values and gradients against float64 numpy, and what training and bad
input make of them.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import slow
from scipy.cluster.vq import kmeans2
from tiny_run import plain, random_batch

from gatedjax.config import ModelConfig, OutputConfig
from gatedjax.errors import InputError
from gatedjax.model import head_weights
from gatedjax.output import log_stable, to_logits
from gatedjax.training.gradients import accumulated_gradients
from gatedjax.training.output_loss import model_loss
from gatedjax.training.spherical_loss import dense, factored, factored_step
from gatedjax.training.state import init_state
from gatedjax.training.vq_head import from_trained, k_means, loss_memory

ROWS, LENGTH, WIDTH, VOCAB = 2, 5, 6, 11
KINDS = ("stablemax", "spherical", "noisy_softmax", "sphereface2", "fourier", "vq", "sparsemax")
OUTPUT = {"offset": 2.0, "frequencies": 3, "smoothness": 0.01, "codes": 4, "cosine_scale": 5.0}


def softplus(x):
    return np.logaddexp(0, x)


def log_sum_exp(x):
    top = x.max(axis=-1, keepdims=True)
    return np.log(np.exp(x - top).sum(axis=-1)) + top[..., 0]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def formula(c, hidden, head, extra, targets, noise):
    """The loss of each of N tokens, and logits whose softmax are probabilities, as the papers say.

    Args:
      c: the OutputConfig.
      hidden: [N, M].
      head: [R, M].
      extra: the bias.
      targets: [N].
      noise: alpha |xi|, [N].
    """
    at = np.arange(len(targets))
    raw = hidden @ head.T
    if c.kind == "stablemax":
        s = np.where(raw >= 0, raw + 1, 1 / (1 - np.minimum(raw, 0)))
        p = s / s.sum(1, keepdims=True)
        return -np.log(p[at, targets]), np.log(s)
    if c.kind == "sparsemax":
        ordered = -np.sort(-raw, axis=1)
        counts = np.arange(1, raw.shape[1] + 1)
        sums = np.cumsum(ordered, axis=1)
        support = (1 + counts * ordered > sums).sum(1)
        tau = (sums[at, support - 1] - 1) / support
        p = np.maximum(raw - tau[:, None], 0)
        squares = np.where(p > 0, raw**2 - tau[:, None] ** 2, 0).sum(1)
        return -raw[at, targets] + squares / 2 + 0.5, np.log(p + 1e-5)
    if c.kind == "spherical":
        z = (raw - raw.mean(1, keepdims=True)) / raw.std(1, keepdims=True)
        return softplus(c.sharpness * (c.offset - z[at, targets])) / c.sharpness, c.sharpness * z
    if c.kind == "noisy_softmax":
        norms = np.linalg.norm(hidden, axis=1) * np.linalg.norm(head, axis=1)[targets]
        cosines = raw[at, targets] / norms
        noisy = raw.copy()
        noisy[at, targets] -= noise * norms * (1 - cosines)
        return log_sum_exp(noisy) - noisy[at, targets], raw
    if c.kind == "sphereface2":
        cosines = unit(hidden) @ unit(head).T
        g = 2 * ((cosines + 1) / 2) ** c.power - 1
        own = np.log1p(np.exp(-c.cosine_scale * (g - c.margin) - extra))[at, targets]
        others = np.log1p(np.exp(c.cosine_scale * (g + c.margin) + extra))
        others = others.sum(1) - others[at, targets]
        weight = c.positive_weight
        loss = (weight * own + (1 - weight) * others) / c.cosine_scale
        return loss, c.cosine_scale * cosines
    if c.kind == "fourier":
        a = raw + extra
        a = a[:, : c.frequencies + 1] + 1j * a[:, c.frequencies + 1 :]
        counts = range(c.frequencies + 1)
        c_k = np.stack([(a[:, k:] * a[:, : a.shape[1] - k].conj()).sum(1) for k in counts], 1)
        edges = np.linspace(-1, 1, VOCAB + 1)
        centers = (edges[:-1] + edges[1:]) / 2
        waves = np.exp(1j * np.pi * np.arange(1, c.frequencies + 1)[:, None] * centers)
        p = 0.5 + ((c_k[:, 1:] / c_k[:, :1].real) @ waves).real
        logits = np.log(p / p.sum(1, keepdims=True) + 1e-5)
        squares = np.arange(c.frequencies + 1) ** 2 * abs(c_k) ** 2
        rough = 4 * np.pi**2 * squares.sum(1)
        return log_sum_exp(logits) - logits[at, targets] + c.smoothness * rough, logits
    codes = np.arange(VOCAB) % c.codes
    logits = raw[:, codes]
    return log_sum_exp(logits) - logits[at, targets], logits


def case(kind):
    rng = np.random.default_rng(KINDS.index(kind))
    output = OutputConfig(kind=kind, **OUTPUT)
    model = ModelConfig(vocab_size=VOCAB, width=WIDTH, tie_embeddings=False, output=output)
    hidden = rng.normal(size=(ROWS, LENGTH, WIDTH))
    head = rng.normal(size=(output.rows(VOCAB), WIDTH))
    extra = {"fourier": rng.normal(size=8), "sphereface2": np.array(0.3)}.get(kind, np.zeros(()))
    targets = rng.integers(0, VOCAB, (ROWS, LENGTH))
    mask = rng.exponential(size=(ROWS, LENGTH))
    mask[0, 2] = 0
    return model, (hidden, head, extra), targets, mask


def params_of(kind, head, extra):
    params = {"head": head}
    if kind in ("fourier", "sphereface2"):
        params["head_bias"] = extra
    if kind == "vq":
        params["codes"] = {"frozen": jnp.arange(VOCAB, dtype=jnp.float32) % OUTPUT["codes"]}
    return params


KEY = jax.random.key(3)


@functools.partial(jax.jit, static_argnums=(0, 4))
def jitted(model, inputs, targets, mask, chunk):
    def loss(hidden, head, extra):
        params = params_of(model.output.kind, head, extra)
        return model_loss(model, params, hidden, targets, mask, jnp.float32(0.5), chunk, KEY)

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*inputs)


def computed(model, inputs, targets, mask, chunk):
    inputs = tuple(np.asarray(x, np.float32) for x in inputs)
    return jitted(model, inputs, targets.astype(np.int32), mask.astype(np.float32), chunk)


@pytest.mark.parametrize("kind", ["stablemax", "spherical", *map(slow, KINDS[2:])])
def test_losses_and_gradients_are_the_papers(kind):
    """Value, and gradient along a direction, in two chunks; what has no weight may be anything."""
    model, inputs, targets, mask = case(kind)
    xi = np.abs(np.asarray(jax.random.normal(KEY, (ROWS, LENGTH)), np.float64))
    noise = model.output.noise * xi.ravel()
    weights = 0.5 * mask.ravel()

    def value(inputs):
        hidden, head, extra = inputs
        flat = hidden.reshape(-1, WIDTH)
        losses, _ = formula(model.output, flat, head, extra, targets.ravel(), noise)
        return weights @ losses

    hidden = inputs[0].copy()
    hidden[0, 2] = np.nan
    shown = np.where(mask == 0, -100, targets)
    (loss, sums), gradients = computed(model, (hidden, *inputs[1:]), shown, mask, chunk=6)
    np.testing.assert_allclose(loss, value(inputs), rtol=1e-5)
    np.testing.assert_allclose(sums.cross_entropy, 2 * value(inputs), rtol=1e-5)
    np.testing.assert_allclose(sums.count, mask.sum(), rtol=1e-6)
    rng = np.random.default_rng(7)
    for i, x in enumerate(inputs):
        direction = rng.normal(size=x.shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = list(inputs)
            moved[i] = x + step * direction
            ends.append(value(moved))
        slope = (ends[0] - ends[1]) / 2e-5
        actual = np.sum(np.asarray(gradients[i], np.float64) * direction)
        np.testing.assert_allclose(actual, slope, rtol=2e-4, atol=1e-5)
    if kind == "stablemax":
        (whole, _), others = computed(model, inputs, targets, mask, chunk=0)
        np.testing.assert_allclose(whole, loss, rtol=1e-5)
        for a, b in zip(gradients, others):
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6)
    targets[0, 0] = VOCAB
    assert np.isnan(computed(model, inputs, targets, mask, chunk=6)[0][0])


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_of_the_next_token(kind):
    model, (hidden, head, extra), targets, _ = case(kind)
    flat = hidden.reshape(-1, WIDTH)
    noise = np.zeros(len(flat))
    _, expected = formula(model.output, flat, head, extra, targets.ravel(), noise)
    head, flat = jnp.asarray(head, jnp.float32), jnp.asarray(flat, jnp.float32)
    logits = to_logits(model, params_of(kind, head, jnp.asarray(extra, jnp.float32)))(flat, head)
    np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-5)


def test_log_of_stablemax_has_a_gradient_everywhere():
    x = jnp.array([-1e30, -1.0, -1e-8, 0.0, 1e-8, 1.0, 1e30])
    slopes = jax.vmap(jax.grad(log_stable))(x)
    np.testing.assert_allclose(slopes, 1 / (1 + np.abs(np.asarray(x, np.float64))), rtol=1e-6)


def test_z_loss_knows_no_shift_and_no_scale():
    model, (hidden, head, extra), targets, mask = case("spherical")
    (loss, _), _ = computed(model, (hidden, head, extra), targets, mask, 6)
    moved = (3.0 * hidden, 5.0 * head + np.arange(WIDTH), extra)
    (same, _), _ = computed(model, moved, targets, mask, 6)
    np.testing.assert_allclose(same, loss, rtol=1e-4)


def test_z_loss_makes_no_logits():
    """Of neither the loss nor its gradient, [rows, vocabulary] anywhere."""
    model = ModelConfig(vocab_size=4096, width=8, output=OutputConfig(kind="spherical"))

    def loss(hidden, head):
        rest = (jnp.zeros((2, 256), int), jnp.ones((2, 256)), jnp.float32(1), 0)
        return model_loss(model, {"embedding": head}, hidden, *rest)[0]

    traced = jax.make_jaxpr(jax.grad(loss, (0, 1)))(jnp.ones((2, 256, 8)), jnp.ones((4096, 8)))
    assert largest(traced.jaxpr) == 4096 * 8


def test_vq_makes_no_logits_of_tokens():
    output = OutputConfig(kind="vq", codes=16)
    model = ModelConfig(vocab_size=4096, width=8, tie_embeddings=False, output=output)

    def loss(hidden, head):
        params = {"head": head, "codes": {"frozen": jnp.arange(4096.0) % 16}}
        rest = (jnp.zeros((2, 256), int), jnp.ones((2, 256)), jnp.float32(1), 0)
        return model_loss(model, params, hidden, *rest)[0]

    traced = jax.make_jaxpr(jax.grad(loss, (0, 1)))(jnp.ones((2, 256, 8)), jnp.ones((16, 8)))
    assert largest(traced.jaxpr) <= 512 * 16


def largest(jaxpr):
    """Of all arrays that are made, in numbers."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [math.prod(v.aval.shape) for v in equation.outvars if hasattr(v.aval, "shape")]
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                sizes.append(largest(getattr(value, "jaxpr", value)))
    return max(sizes)


def is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


@pytest.mark.slow
def test_factored_steps_are_steps_of_gradient_descent():
    """Five steps in float64, targets that repeat, against the dense head."""
    rng = np.random.default_rng(0)
    output = OutputConfig(kind="spherical", offset=1.0, sharpness=2.0)
    with jax.enable_x64(True):
        head = jnp.asarray(rng.normal(size=(VOCAB, WIDTH)))

        def loss(head, hidden, targets):
            raw = hidden @ head.T
            z = (raw - raw.mean(1, keepdims=True)) / raw.std(1, keepdims=True)
            own = z[jnp.arange(len(targets)), targets]
            return jnp.sum(jax.nn.softplus(2.0 * (1.0 - own)) / 2.0)

        state = factored(head)
        step = jax.jit(factored_step, static_argnums=(0, 4))
        gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))
        for _ in range(5):
            hidden = jnp.asarray(rng.normal(size=(8, WIDTH)))
            targets = jnp.asarray(rng.integers(0, 4, 8))
            value, (dhead, dhidden) = gradient(head, hidden, targets)
            state, actual, by_hidden = step(output, state, hidden, targets, 0.05)
            np.testing.assert_allclose(actual, value, rtol=1e-9)
            np.testing.assert_allclose(by_hidden, dhidden, rtol=1e-7, atol=1e-9)
            head = head - 0.05 * dhead
            np.testing.assert_allclose(dense(state), head, rtol=1e-8, atol=1e-10)
            np.testing.assert_allclose(state.square, head.T @ head, rtol=1e-8)
            np.testing.assert_allclose(state.total, head.sum(0), rtol=1e-8)


def test_sphereface2_starts_where_its_bias_is_best():
    output = OutputConfig(kind="sphereface2", cosine_scale=30.0)
    bias = output.first_bias(100)

    def loss(bias):
        g = 2 * 0.5**output.power - 1
        own = softplus(-30.0 * (g - output.margin) - bias)
        others = 99 * softplus(30.0 * (g + output.margin) + bias)
        return output.positive_weight * own + (1 - output.positive_weight) * others

    assert loss(bias) < min(loss(bias - 1e-3), loss(bias + 1e-3))


@pytest.mark.parametrize("kind", ["vq", *map(slow, ("noisy_softmax", "fourier", "sphereface2"))])
def test_a_training_step_takes_them(kind):
    """The parameters are made, the step's gradient is finite for each of them: shapes alone for
    most kinds.
    """
    values = {f"model__output__{key}": value for key, value in OUTPUT.items()}
    config = plain(model__output__kind=kind, model__tie_embeddings=False, **values)
    make = lambda key: init_state(config, _Frozen(), key)
    state = jax.eval_shape(make, jax.random.key(0))
    batch = random_batch(0)
    grads, metrics, _ = jax.eval_shape(
        lambda state: accumulated_gradients(config, state, batch), state
    )
    assert grads["head"].shape == head_weights(state.params).shape
    assert ("head_bias" in grads) == (kind in ("fourier", "sphereface2"))
    assert "codes" not in grads
    assert metrics["loss"].shape == ()


class _Frozen:
    """An optimizer without a state."""

    def init(self, params):
        del params
        return ()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"z_loss": 0.1, "output": {"kind": "stablemax"}}, "z_loss: got 0.1, expected 0 with"),
        ({"output": {"kind": "vq"}}, "tie_embeddings: got True, expected false with"),
        (
            {"vocab_size": 8, "tie_embeddings": False, "output": {"kind": "vq", "codes": 9}},
            "output.codes: got 9, expected at most vocab_size = 8",
        ),
    ],
)
def test_bad_outputs_are_refused(values, message):
    values = dict(values)
    output = OutputConfig(**values.pop("output"))
    with pytest.raises(InputError, match=message):
        ModelConfig(output=output, **values)


def test_k_means_of_a_head():
    """Well-parted clusters are found; no worse than scipy's best on others; the parameters fit."""
    rng = np.random.default_rng(0)
    centers = 10 * rng.normal(size=(4, 3))
    labels = np.arange(40) % 4
    means, nearest = k_means(centers[labels] + 0.01 * rng.normal(size=(40, 3)), 4)
    found = means[nearest]
    np.testing.assert_allclose(found, centers[labels], atol=0.05)
    points = rng.normal(size=(60, 2))
    means, nearest = k_means(points, 6)
    inertia = np.sum((points - means[nearest]) ** 2)
    others = []
    for seed in range(5):
        codebook, code = kmeans2(points, 6, minit="++", seed=seed)
        others.append(np.sum((points - codebook[code]) ** 2))
    assert inertia < 1.2 * min(others)
    assert len(np.unique(nearest)) == 6
    # As many codes as tokens: the model that it was.
    model = ModelConfig(vocab_size=VOCAB, width=WIDTH)
    params = {"embedding": rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)}
    changed, given = from_trained(model, params, VOCAB)
    hidden = rng.normal(size=(5, WIDTH)).astype(np.float32)
    of_vq = {"codes": {"frozen": given["codes", "frozen"]}}
    logits = to_logits(changed, of_vq)(jnp.asarray(hidden), given[("head",)])
    np.testing.assert_allclose(logits, hidden @ params["embedding"].T, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="codes: got 12, expected from 1 to 11 different rows"):
        from_trained(model, params, VOCAB + 1)


@pytest.mark.slow
def test_memory_of_the_vq_loss():
    """With a tenth as many codes, less than a fifth of the memory."""
    sizes = {}
    for kind in ("softmax", "vq"):
        output = OutputConfig(kind=kind, codes=400)
        model = ModelConfig(vocab_size=4000, width=32, tie_embeddings=False, output=output)
        sizes[kind] = loss_memory(model, 1, 512)
    assert sizes["softmax"] > 512 * 4000 * 4
    assert sizes["vq"] < sizes["softmax"] / 5
