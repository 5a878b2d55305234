"""A model of adaptive and versatile MLPs learns: noise, losses and temperature reach the step; and
it decodes as it reads.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms
from tiny_run import random_batch, run_steps, tiny

from gatedjax.config import AdaptiveMLPConfig, FrozenDict, VersatileMLPConfig
from gatedjax.layers.added_losses import added_loss, has_added_losses
from gatedjax.layers.learner_losses import weighted_losses
from gatedjax.model import LanguageModel, init_caches
from gatedjax.training.state import params_for_evaluation

ADAPTIVE = AdaptiveMLPConfig(hidden=32, learners=4, budget=0.25)
VERSATILE = VersatileMLPConfig(hidden=32, experts=4, loops=3, anneal_steps=4)


def config(**changes):
    return tiny(
        model__pattern=("attention",),
        model__ffns=FrozenDict(learners=ADAPTIVE, loops=VERSATILE),
        model__ffn_pattern=("learners", "loops"),
        model__num_layers=4,
        **changes,
    )


def test_losses_of_layers_of_one_configuration_are_taken_together():
    """From choices as layers sow them: those of a period stacked, others alone."""
    model = config(model__scan_layers=True).model
    assert has_added_losses(model) and not has_added_losses(tiny().model)
    rng = np.random.default_rng(0)
    choices = jax.nn.one_hot(rng.integers(0, 5, (2, 3, 7)), 5)
    sown = {
        "periods": {
            "layer_0": {"ffn": {"learner_choices": (choices,)}},
            "layer_1": {"ffn": {"slice_balance_loss": (jnp.asarray([0.25, 0.5]),)}},
        }
    }
    found = added_loss(model, {"added_losses": sown})
    expected = 0.75 + weighted_losses(ADAPTIVE, choices)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [False, True])
def test_steps_and_decoding(scan_layers):
    run, state, log = run_steps(config(model__scan_layers=scan_layers), 3)
    assert all(np.isfinite(step["loss"]) and np.isfinite(step["added_loss"]) for step in log)
    block = state.routers["periods"]["layer_1"]["ffn"]["router_state"]
    np.testing.assert_allclose(block["temperature"], 5.0 * (0.1 / 5.0) ** 0.75, rtol=1e-5)
    model = run.config.model
    params = params_for_evaluation(state)
    tokens = jnp.asarray(random_batch(rows=1).tokens[:, :12])
    whole, _, _ = LanguageModel(model).apply({"params": params}, tokens)
    caches = init_caches(model, 1, 12)
    _, caches, _ = LanguageModel(model).apply({"params": params}, tokens[:, :9], caches=caches)
    for place in range(9, 12):
        token = tokens[:, place : place + 1]
        hidden, caches, _ = LanguageModel(model).apply({"params": params}, token, caches=caches)
        assert rel_rms(hidden[:, 0], whole[:, place]) < 1e-4


@pytest.mark.slow
def test_micro_batches_see_their_own_choices():
    """The model's loss is that of the whole batch; losses of choices are of each micro-batch."""
    _, _, log = run_steps(config(train__accumulation_steps=2), 2)
    assert all(np.isfinite(step["loss"]) and np.isfinite(step["added_loss"]) for step in log)
