"""Thresholds for the experts of a model: what its state skips is what its configuration would, the
search against all pairs, what ran counted by hand.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import plain, random_batch, tiny

from gatedjax.errors import InputError
from gatedjax.evaluation import skipping_model as skipping
from gatedjax.evaluation.expert_skipping import Skipping
from gatedjax.evaluation.skipping_model import Thresholds
from gatedjax.model import LanguageModel, head_weights, logits
from gatedjax.training.flops import forward_flops_per_token

KIND = tuple(range(0, 64, 3))


def test_thresholds_are_those_of_all_routers():
    model = tiny().model
    found = skipping.with_thresholds(model, KIND, Thresholds(0.1, 0.2))
    router = found.ffns["moe"].router
    assert (router.threshold, router.second_threshold, router.second_kind) == (0.1, 0.2, KIND)
    one = skipping.with_thresholds(model, (), Thresholds(0.1, 0.2)).ffns["moe"].router
    assert (one.threshold, one.second_threshold) == (0.1, 0.0)
    assert dataclasses.replace(found, ffns=model.ffns) == model
    with pytest.raises(InputError, match="a model without sparse experts"):
        skipping.with_thresholds(plain().model, (), Thresholds(0.1, 0.1))


@pytest.mark.slow
@pytest.mark.parametrize("kind, scan_layers", [(KIND, False), ((), True)])
def test_search_and_what_it_gives(kind, scan_layers):
    model = tiny(model__scan_layers=scan_layers, model__num_layers=4).model
    batch = random_batch(rows=2)
    tokens = jnp.asarray(batch.tokens)
    params = LanguageModel(model).init(jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(1), p.shape), params)
    found = Skipping(model, params, kind, 32)
    found.calibrate(batch)
    assert found.importances.shape == (2,) and np.all(found.importances > 0)
    whole = found.measure([batch], Thresholds(0.0, 0.0))
    assert whole.experts == 2 and whole.divergence == 0 and whole.skipped == (0, 0)
    assert whole.flops == pytest.approx(forward_flops_per_token(model, 32))
    thresholds = found.one_threshold(batch, 0.4)
    if kind:
        best = found.search(batch, 0.4, 5)
        thresholds = best.thresholds
        assert best.tried <= 5
    outcome = found.measure([batch], thresholds)
    is_token = np.asarray(batch.segment_ids) != 0
    places = is_token.sum() * 2 * 2
    ran = outcome.experts / 2 * places
    # What is skipped in one layer changes what the next one's router sees.
    assert ran == pytest.approx(round(ran)) and ran <= 0.6 * places + 0.05 * places
    of_expert = 6 * 32 * 32
    expected = forward_flops_per_token(model, 32) - 2 * (2 - outcome.experts) * of_expert
    assert outcome.flops == pytest.approx(expected)
    # The configuration with these thresholds, and the importances in its state.
    skips = skipping.with_thresholds(model, kind, thresholds)
    state = found.state(Thresholds(1.0, 1.0))
    merged = skipping.router_state.merge(found._params, state)
    inputs = (tokens, batch.positions, batch.segment_ids)
    hidden, _, _ = LanguageModel(skips).apply({"params": merged}, *inputs)
    own = logits(hidden, head_weights(merged))
    by_state = found._run(found._params, found.state(thresholds), batch)[0]
    np.testing.assert_allclose(own[is_token], by_state[is_token], rtol=1e-4, atol=1e-4)
    if not kind:
        return
    assert outcome.divergence == pytest.approx(best.divergence, rel=0.5)
    with pytest.raises(InputError, match="--second_kind: got 'tokens of one kind only'"):
        Skipping(model, params, tuple(range(64)), 32).search(batch, 0.4, 3)
