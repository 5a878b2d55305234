"""Batches that grow: the norm test, its variance, the order of the data, and a state that knows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import plain, random_batch

from gatedjax.config import TrainConfig
from gatedjax.errors import InputError
from gatedjax.training.gradients import MICRO_SQUARES, VARIANCE, gradient_variance
from gatedjax.training.growing import Growth, doublings_needed
from gatedjax.training.optim_growth import doublings, growing, with_doublings
from gatedjax.training.run import fresh_state, prepare


def test_the_norm_test():
    """Variance over b times as many rows is 1 / b of it: it must come below eta^2 |g|^2."""
    assert doublings_needed(0.89, 10.0, 0.3, 6) == 0
    assert doublings_needed(0.91, 10.0, 0.3, 6) == 1
    assert doublings_needed(3.7, 10.0, 0.3, 6) == 3
    assert doublings_needed(1e9, 10.0, 0.3, 6) == 6
    assert doublings_needed(1.0, 0.0, 0.3, 4) == 4
    assert doublings_needed(0.0, 0.0, 0.3, 4) == 0
    assert doublings_needed(float("nan"), 1.0, 0.3, 4) == 0


def test_the_variance_of_the_mean():
    rng = np.random.default_rng(0)
    count = 4
    of_micros = rng.normal(size=(count, 50)) + 1.0
    mean = of_micros.mean(0)
    expected = np.sum((of_micros - mean) ** 2) / (count * (count - 1))
    # Parts of the whole batch's gradient add up to it.
    parts = of_micros / count
    metrics = {MICRO_SQUARES: jnp.float32(np.sum(parts**2))}
    config = plain(train__accumulation_steps=count, train__batch_size=8)
    found = gradient_variance(config, metrics, jnp.float32(np.linalg.norm(mean)))
    np.testing.assert_allclose(found[VARIANCE], expected, rtol=1e-4)
    assert metrics == {}


def test_the_state_says_how_far_it_has_grown():
    tx = growing(optax.sgd(1.0))
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    assert doublings(state) == 0
    _, state = tx.update(params, with_doublings(state, 3), params)
    assert doublings(state) == 3


@pytest.mark.slow
def test_rows_come_in_their_order():
    """A grown step is the step over the rows that two steps would have had."""
    config = plain(
        train__grow_batches=1e-3,
        train__accumulation_steps=2,
        train__most_accumulation_steps=8,
        optim__name="am_msgd",
    )
    run = prepare(config, jax.devices()[:1])
    seen = []

    def stream():
        for i in range(100):
            seen.append(i)
            yield random_batch(i)

    rows = stream()
    with jax.set_mesh(run.mesh):
        state = fresh_state(run)
        growth = Growth(run, config)
        growth.begin(state)
        state, metrics = growth.train_step(state, growth.next_batch(rows))
        assert seen == [0]
        assert float(metrics[VARIANCE]) > 0
        # So small an eta asks for all that there is: 8 micro-batches.
        state = growth.grown(state, metrics)
        assert (growth.rows, doublings(state.opt_state)) == (32, 2)
        batch = growth.next_batch(rows)
        assert seen == [0, 1, 2, 3, 4]
        expected = np.concatenate([random_batch(i).tokens for i in range(1, 5)])
        np.testing.assert_array_equal(batch.tokens, expected)
        state, metrics = growth.train_step(state, batch)
        assert growth.grown(state, metrics) is state
        # A run that goes on from this state has grown already.
        again = Growth(run, config)
        again.begin(state)
        assert again.rows == 32


def test_growing_needs_micro_batches():
    with pytest.raises(InputError, match="accumulation_steps: got 1, expected from 2 to most_"):
        TrainConfig(grow_batches=0.5)
