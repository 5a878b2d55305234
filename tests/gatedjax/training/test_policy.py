"""SAPO's gate and GRPO's clip against their formulas, the tasks that a program checks, Lanczos, and
modular addition.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gatedjax.data.recall import RecallConfig, recall_dataset
from gatedjax.errors import InputError
from gatedjax.study.policy_loop import Loop, problems, run_loop
from gatedjax.training.curvature import lanczos, largest_eigenvalue
from gatedjax.training.policy import (
    group_advantages,
    grpo_objective,
    sapo_gate,
    sapo_objective,
)


def test_the_gate_is_its_formula():
    """f(1) = 2 / tau; the slope is sech^2(tau (r - 1) / 2), 1 at r = 1."""
    r = np.linspace(0.0, 4.0, 9)
    advantage = np.array([[2.0], [-2.0], [0.0]])
    tau = np.array([[1.0], [1.05], [1.05]])

    @jax.jit
    def computed(r):
        of_r = jnp.broadcast_to(r, (3, 9))
        slopes = jax.grad(lambda r: jnp.sum(sapo_objective(r, advantage)))(of_r)
        return sapo_gate(of_r, advantage), slopes, sapo_gate(of_r, advantage + 3.0, 0.5)

    gates, slopes, softer = computed(r.astype(np.float32))
    np.testing.assert_allclose(gates, 4 / tau / (1 + np.exp(-tau * (r - 1))), rtol=1e-5)
    sech = 1 / np.cosh(tau * (r - 1) / 2)
    np.testing.assert_allclose(slopes, advantage * sech**2, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(softer[0], 8 / (1 + np.exp(-0.5 * (r - 1))), rtol=1e-5)


def test_the_clip_is_its_formula():
    r = np.array([0.5, 0.8, 1.0, 1.2, 2.0])
    for advantage in (1.5, -1.5):
        expected = np.minimum(r * advantage, np.clip(r, 0.8, 1.2) * advantage)
        np.testing.assert_allclose(grpo_objective(jnp.asarray(r), advantage), expected, rtol=1e-6)


def test_advantages_are_within_groups():
    rewards = np.array([[0.0, 1.0, 0.5, 0.5], [0.25, 0.25, 0.25, 0.25], [10.0, 11.0, 10.0, 11.0]])
    advantages = np.asarray(group_advantages(jnp.asarray(rewards)))
    np.testing.assert_allclose(advantages.mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(advantages[[0, 2]].std(1), 1, rtol=1e-4)
    np.testing.assert_array_equal(advantages[1], 0)


def test_problems_and_their_answers():
    rng = np.random.default_rng(0)
    prompts, right = problems(Loop(task="reverse", length=3), rng, 5)
    np.testing.assert_array_equal(prompts[:, :3], right[:, ::-1])
    assert np.all(prompts[:, 3] == 5)
    prompts, right = problems(Loop(task="add", length=2), rng, 50)
    units = 10 ** np.arange(3)
    sums = prompts[:, :2] @ units[:2] + prompts[:, 3:5] @ units[:2]
    np.testing.assert_array_equal(right @ units, sums)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["SAPO", "GRPO"])
def test_a_policy_learns(objective):
    loop = Loop(objective=objective, letters=3, length=2, rounds=60, prompts=8, answers=8, width=32)
    values = run_loop(loop, seed=0)
    assert values["reward"] > 0.7, values


def test_an_unknown_objective_is_refused():
    with pytest.raises(InputError, match="objective: got 'PPO', expected one of"):
        Loop(objective="PPO")


def test_lanczos_finds_the_largest():
    """Of a matrix in float64 numpy whose largest eigenvalue is one of many."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(60, 60)))
    matrix = q * np.concatenate([np.linspace(-3, 4, 58), [6.0, 9.0]]) @ q.T
    product = lambda v: jnp.asarray(matrix, jnp.float32) @ v
    found = lanczos(product, jnp.asarray(rng.normal(size=60), jnp.float32), 25)
    np.testing.assert_allclose(found[-2:], [6.0, 9.0], rtol=1e-4)
    # No eigenvalue twice.
    assert found[-3] < 4.1
    # A space of three dimensions is used up.
    small = np.diag([1.0, 5.0, 2.0]).astype(np.float32)
    few = lanczos(lambda v: small @ v, jnp.ones(3), 20)
    np.testing.assert_allclose(few, [1, 2, 5], rtol=1e-4)


@pytest.mark.slow
def test_curvature_of_a_quadratic():
    scales = {"a": jnp.array([1.0, 7.0]), "b": jnp.array([3.0])}

    def loss(params):
        return sum(jnp.sum(s * params[k] ** 2) / 2 for k, s in scales.items())

    value = largest_eigenvalue(loss, jax.tree.map(jnp.ones_like, scales), jax.random.key(0), 5)
    np.testing.assert_allclose(value, 7.0, rtol=1e-3)


def test_modular_addition():
    """Each pair once, none in both splits, the answer at the last position."""
    task = RecallConfig(
        task="modular_addition",
        seq_len=3,
        vocab_size=8,
        train_examples=30,
        validation_examples=19,
    )
    pairs = {}
    for split, count in [("train", 30), ("validation", 19)]:
        batch = recall_dataset(task, split, batch_size=count, rows=range(count))[0]
        a, b, end = batch.tokens.T
        np.testing.assert_array_equal(end, 7)
        np.testing.assert_array_equal(batch.targets[:, 2], (a + b) % 7)
        np.testing.assert_array_equal(batch.loss_mask, [[0, 0, 1]] * count)
        pairs[split] = set(zip(a.tolist(), b.tolist()))
        assert len(pairs[split]) == count
    assert not pairs["train"] & pairs["validation"]
    with pytest.raises(ValueError, match="train_examples: got 31, expected at most 49 pairs"):
        RecallConfig(
            task="modular_addition", vocab_size=8, train_examples=31, validation_examples=19
        )
