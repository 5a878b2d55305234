"""A frozen network and a local one behind a gate: the formula, its gradients, and a closed gate."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import check_gradients, rel_rms

from gatedjax.layers.customized import customized_log_probs, customized_logits

RNG = np.random.default_rng(4)
GIVEN = tuple(RNG.normal(size=shape).astype(np.float32) for shape in ((3, 5), (3, 5), (3,)))


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_mixture_and_gradients():
    weights = RNG.normal(size=(3, 5)).astype(np.float32)
    fixed = np.asarray(GIVEN[0], np.float64)

    def formula(given):
        gate = 1 / (1 + np.exp(-given[1][:, None]))
        return np.log((1 - gate) * softmax(fixed) + gate * softmax(given[0]))

    def total(of_local, gate_logit):
        y = customized_log_probs(GIVEN[0], of_local, gate_logit)
        return jnp.vdot(y, weights), y

    (_, y), gradient = jax.value_and_grad(total, (0, 1), has_aux=True)(*GIVEN[1:])
    wide = [np.asarray(x, np.float64) for x in GIVEN[1:]]
    assert rel_rms(y, formula(wide)) < 1e-6
    check_gradients(lambda given: np.sum(formula(given) * weights), GIVEN[1:], gradient)
    # Nothing goes into the frozen network.
    of_global = jax.grad(lambda z: jnp.sum(customized_log_probs(z, *GIVEN[1:])))(GIVEN[0])
    assert not np.any(of_global)


def test_a_fresh_gate_leaves_the_global_network_alone():
    closed = customized_logits(GIVEN[0], GIVEN[1] * np.nan, jnp.zeros(3))
    np.testing.assert_array_equal(closed, GIVEN[0])
    chosen = customized_logits(*GIVEN[:2], jnp.asarray([1.0, -1.0, 0.0]))
    np.testing.assert_array_equal(chosen, np.stack([GIVEN[1][0], *GIVEN[0][1:]]))
