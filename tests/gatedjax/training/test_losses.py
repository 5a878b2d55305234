"""The loss against float64 numpy, for weights of any size; what has no weight is not looked at."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import rel_rms
from tiny_run import plain, random_batch

from gatedjax.config import MeshConfig
from gatedjax.sharding import RULES, make_mesh
from gatedjax.training.gradients import accumulated_gradients
from gatedjax.training.losses import chunked_cross_entropy
from gatedjax.training.sparsemax_loss import sparsemax_loss
from gatedjax.training.state import init_state
from gatedjax.training.training_loss import training_loss

ROWS, LENGTH, WIDTH, VOCAB = 2, 7, 8, 16


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    weights = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (ROWS, LENGTH))
    return hidden, weights, targets


def expected(hidden, weights, targets, mask, z_loss=0.0):
    """Cross-entropy, z-loss and count, and the loss's gradients by hidden states and weights, in
    float64.
    """
    h, w = hidden.reshape(-1, WIDTH).astype(np.float64), weights.astype(np.float64)
    t, m = targets.ravel(), mask.ravel().astype(np.float64)
    counted = m != 0
    h, t, m = h[counted], t[counted], m[counted]
    logits = h @ w.T
    log_z = np.log(np.exp(logits).sum(1))
    rows = np.arange(len(t))
    d = np.exp(logits - log_z[:, None]) * (1 + 2 * z_loss * log_z)[:, None]
    d[rows, t] -= 1
    d *= m[:, None]
    dhidden = np.zeros((ROWS * LENGTH, WIDTH))
    dhidden[counted] = d @ w
    sums = (m @ (log_z - logits[rows, t]), m @ log_z**2, m.sum())
    return sums, (dhidden.reshape(hidden.shape), d.T @ h)


MASKS = {
    "ones": np.ones((ROWS, LENGTH)),
    "less than one in all": np.full((ROWS, LENGTH), 1e-3),
    "tiny": np.full((ROWS, LENGTH), 1e-20),
    "any": np.random.default_rng(1).exponential(size=(ROWS, LENGTH)) * 10,
    "some": (np.random.default_rng(2).random((ROWS, LENGTH)) < 0.5) * 2.5,
    "none": np.zeros((ROWS, LENGTH)),
}


SCALE = 0.25


@functools.partial(jax.jit, static_argnames=("chunk", "z_loss"))
def computed(hidden, weights, targets, mask, chunk, z_loss):
    """The loss with its sums, and its gradients; the loss alone; what evaluation sums."""

    def loss(hidden, weights):
        return training_loss(hidden, weights, targets, mask, jnp.float32(SCALE), chunk, z_loss)

    with_gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, weights)
    alone, _ = loss(hidden, weights)
    return with_gradients, alone, chunked_cross_entropy(hidden, weights, targets, mask, chunk)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [0, 6])
@pytest.mark.parametrize("name", MASKS)
def test_weighted_sums_and_gradients(name, chunk, z_loss):
    hidden, weights, targets = inputs()
    mask = MASKS[name].astype(np.float32)
    right, gradients = expected(hidden, weights, targets, mask, z_loss)
    loss = SCALE * (right[0] + z_loss * right[1])
    results = computed(hidden, weights, targets, mask, chunk=chunk, z_loss=z_loss)
    ((value, sums), actual), alone, summed = results
    np.testing.assert_allclose(sums, right, rtol=1e-5)
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    for a, e in zip(actual, gradients):
        np.testing.assert_allclose(a, SCALE * e, rtol=1e-4, atol=1e-6 * mask.max())
    # Not differentiated it is the same, and so is what evaluation sums.
    np.testing.assert_allclose(alone, loss, rtol=1e-5)
    np.testing.assert_allclose(summed, right, rtol=1e-5)


def test_many_chunks_round_no_worse_than_one():
    """In bfloat16, sums over chunks of the output matrix's gradient are float32."""
    rng = np.random.default_rng(0)
    length = 2048
    hidden = jnp.asarray(rng.normal(size=(1, length, WIDTH)), jnp.bfloat16)
    weights = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (1, length))
    mask = np.ones((1, length), np.float32)

    def gradient(hidden, weights, chunk):
        def loss(weights):
            return training_loss(hidden, weights, targets, mask, jnp.float32(1), chunk, 0.0)[0]

        return jax.grad(loss)(weights)

    rounded = jnp.asarray(weights, jnp.bfloat16).astype(jnp.float32)
    exact = gradient(hidden.astype(jnp.float32), rounded, 0)
    whole = rel_rms(gradient(hidden, weights, 0), exact)
    # Chunks whose sum is bfloat16 are off by 0.05.
    assert rel_rms(gradient(hidden, weights, 4), exact) < max(1.2 * whole, 1e-3)


@pytest.mark.parametrize("chunk", [0, 6])
def test_sums_by_row(chunk):
    hidden, weights, targets = inputs()
    mask = MASKS["some"].astype(np.float32)
    by_row = chunked_cross_entropy(hidden, weights, targets, mask, chunk, by_row=True)
    for row in range(ROWS):
        of_row = mask * (np.arange(ROWS) == row)[:, None]
        right, _ = expected(hidden, weights, targets, of_row)
        np.testing.assert_allclose([x[row] for x in by_row], right, rtol=1e-5)


@pytest.mark.parametrize("chunk", [0, 6])
@pytest.mark.parametrize("target", [-100, -1, VOCAB, 10**6])
def test_without_weight_anything_may_stand_there(target, chunk):
    hidden, weights, targets = inputs()
    mask = np.ones((ROWS, LENGTH), np.float32)
    mask[0, 3:], mask[1, 0] = 0, 0
    right, (gradient, _) = expected(hidden, weights, targets, mask)
    targets[mask == 0] = target
    hidden[mask == 0] = np.nan
    hidden[0, 4] = np.inf

    def loss(hidden, weights):
        return training_loss(hidden, weights, targets, mask, jnp.float32(1), chunk, 0.0)[0]

    value, (dh, dw) = jax.value_and_grad(loss, (0, 1))(jnp.asarray(hidden), jnp.asarray(weights))
    assert float(value) == pytest.approx(right[0], rel=1e-5)
    np.testing.assert_allclose(dh, gradient, rtol=1e-4, atol=1e-6)
    assert np.isfinite(np.asarray(dw)).all()


@pytest.mark.parametrize("target", [-1, VOCAB])
def test_a_counted_target_outside_the_vocabulary_is_no_loss(target):
    hidden, weights, targets = inputs()
    targets[0, 0] = target
    mask = np.ones((ROWS, LENGTH), np.float32)
    assert np.isnan(chunked_cross_entropy(hidden, weights, targets, mask, 0).cross_entropy)


@functools.cache
def gradients_of(parts: int):
    config = plain(
        optim__ema_decay=0.0,
        train__accumulation_steps=parts,
        model__z_loss=1e-3,
        model__remat="none",
    )
    state = init_state(config, optax.sgd(1.0), jax.random.key(0))
    return jax.jit(lambda batch: accumulated_gradients(config, state, batch))


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_the_step_divides_by_the_weights_of_the_whole_batch():
    """Weights of another size are the same mean; micro-batches of unequal weights (of none at all)
    add up to the whole batch.
    """
    batch = random_batch(0)
    mask = batch.loss_mask * np.linspace(0, 3, 8, dtype=np.float32)[:, None]
    mask[[1, 5]] = 0  # rows of one of four micro-batches
    whole, metrics, _ = gradients_of(1)(batch.replace(loss_mask=mask))
    for factor in (1e-6, 1e-2, 1e3):
        scaled = batch.replace(loss_mask=mask * np.float32(factor))
        for parts in (1, 4):
            grads, m, _ = gradients_of(parts)(scaled)
            assert rel_rms(flat(grads), flat(whole)) < 1e-4, (factor, parts)
            assert float(m["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-5)


@pytest.mark.parametrize("parts", [1, 4])
def test_a_batch_without_weights_has_no_gradient(parts):
    batch = random_batch(0)
    grads, metrics, _ = gradients_of(parts)(batch.replace(loss_mask=0 * batch.loss_mask))
    assert float(metrics["loss"]) == 0.0 and not flat(grads).any()


@pytest.mark.slow
def test_balance_in_a_prefix_is_that_of_the_whole_batch():
    """Also where no period has experts, micro-batches know the loads of all of them."""
    gradients = []
    for parts in (1, 4):
        config = plain(
            model__prefix=("attention",),
            model__ffn_prefix=("moe",),
            model__num_layers=2,
            model__ffns__moe__balance_loss=10.0,
            optim__ema_decay=0.0,
            train__accumulation_steps=parts,
        )
        state = init_state(config, optax.sgd(1.0), jax.random.key(0))
        step = jax.jit(functools.partial(accumulated_gradients, config, state))
        gradients.append(flat(step(random_batch(0))[0]))
    assert rel_rms(gradients[1], gradients[0]) < 1e-4


def test_gradients_that_a_mesh_scatters_are_the_same():
    """Sums of each device's rows, added and cut along the width."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(8, LENGTH, WIDTH)).astype(np.float32)
    weights = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (8, LENGTH))
    mask = np.ones((8, LENGTH), np.float32)

    def loss(hidden, weights):
        return training_loss(hidden, weights, targets, mask, jnp.float32(0.1), 16, 0.1)[0]

    gradients = jax.grad(loss, (0, 1))
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=4))), nn.logical_axis_rules(RULES):
        scattered = jax.jit(gradients)(hidden, weights)
    for a, b in zip(scattered, gradients(hidden, weights)):
        assert a.shape == b.shape and rel_rms(a, b) < 1e-5


def test_sparsemax_loss():
    """Its formula and the gradient by the logits, in float64; what has no weight may be NaN."""
    hidden, weights, targets = inputs()
    mask = np.ones((ROWS, LENGTH), np.float32)
    mask[0, 1], mask[1, 2:4] = 0, 0.5
    z = hidden.reshape(-1, WIDTH).astype(np.float64) @ weights.T.astype(np.float64)
    largest = -np.sort(-z, axis=1)
    size = np.arange(1, VOCAB + 1)
    support = np.sum(1 + size * largest > np.cumsum(largest, axis=1), axis=1, keepdims=True)
    tau = (np.take_along_axis(np.cumsum(largest, 1), support - 1, 1) - 1) / support
    p = np.maximum(z - tau, 0)
    onehot = np.eye(VOCAB)[targets.ravel()]
    of_token = np.sum(np.where(p > 0, z**2 - tau**2, 0), 1) / 2 + 0.5 - np.sum(z * onehot, 1)
    scaled = mask.ravel() / mask.sum()
    broken = hidden.copy()
    broken[0, 1] = np.nan
    loss = jax.jit(jax.value_and_grad(sparsemax_loss, argnums=1))
    value, dweights = loss(jnp.asarray(broken), jnp.asarray(weights), targets, jnp.asarray(mask))
    assert rel_rms(value, np.sum(of_token * scaled)) < 1e-5
    expected_gradient = (scaled[:, None] * (p - onehot)).T @ hidden.reshape(-1, WIDTH)
    assert rel_rms(dweights, expected_gradient) < 1e-5
