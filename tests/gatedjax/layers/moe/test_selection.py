"""Experts are not chosen by rounded scores, and Gumbel noise is divided by the temperature once."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import slow

from gatedjax.config import RouterConfig
from gatedjax.errors import InputError
from gatedjax.layers.moe.lora import xlora_weights
from gatedjax.layers.moe.routing import route
from gatedjax.layers.moe.selection import across_tokens

GROUPS = dict(selection="grouped_topk", num_groups=2, kept_groups=1)
# Logits whose scores round to the same number: to 1, to 0, to 1 and 0, far apart and mixed.
SATURATED = [
    [20.0, 30, 40, 50],
    [-120.0, -110, -130, -105],
    [0.0, -300, -200, -110],
    [90.0, 95, 200, 100],
    [-95.0, -90, 30, 25],
    [40.0, 39, -150, -151],
]
ROUTERS = {
    "softmax": dict(),
    "sigmoid": dict(scoring="sigmoid"),
    "sparsemax": dict(scoring="sparsemax"),
    "softmax, max": dict(GROUPS, group_score="max"),
    "softmax, sum_top2": dict(GROUPS),
    "sigmoid, max": dict(GROUPS, group_score="max", scoring="sigmoid"),
    "sigmoid, sum_top2": dict(GROUPS, scoring="sigmoid"),
}


def chosen(router, logits, k=2, **options):
    # Compiled, as in a model: rewrites of the compiler must not undo the exact sums.
    return np.asarray(
        jax.jit(lambda z: route(router, z, k, **options).experts)(jnp.asarray(logits))
    )


# Every score of a group with either scoring is in one of the two tests below.
SLOW_ROUTERS = ("softmax, max", "sigmoid, sum_top2")


@pytest.mark.parametrize("name", [slow(n) if n in SLOW_ROUTERS else n for n in ROUTERS])
def test_saturated_scores_are_ordered_by_logits(name):
    """No bias, zeros, and a bias that is the same for all: the two best of the best group."""
    router = RouterConfig(**ROUTERS[name])
    for bias in (None, jnp.zeros(4), jnp.full(4, 0.125)):
        got = chosen(router, [SATURATED], bias=bias)[0]
        for logits, experts in zip(SATURATED, got):
            order = np.argsort(-np.asarray(logits), kind="stable")
            if "selection" in ROUTERS[name]:
                group = order[0] // 2
                order = [expert for expert in order if expert // 2 == group]
            np.testing.assert_array_equal(experts, order[:2], err_msg=f"{logits} {bias}")


def exact_scores(scoring, logits):
    """Scores as fractions, 60 digits and more, from Python's own arithmetic."""
    from decimal import Decimal, localcontext

    with localcontext() as context:
        context.prec = 80
        exps = [Decimal(float(z)).exp() for z in logits]
        if scoring == "sigmoid":
            scores = [e / (1 + e) for e in exps]
        else:
            scores = [e / sum(exps) for e in exps]
        return [Fraction(s) for s in scores]


@pytest.mark.parametrize(
    "grouped, scoring",
    [
        ("", "softmax"),
        ("", "sigmoid"),
        ("max", "softmax"),
        slow("max", "sigmoid"),
        slow("sum_top2", "softmax"),
        ("sum_top2", "sigmoid"),
    ],
)
def test_any_bias_is_added_exactly(scoring, grouped):
    """Beside sums of 80 digits: logits from 0.1 to 60 wide, biases from 1e-9 to 1."""
    rng = np.random.default_rng(3)
    sizes = dict(GROUPS, num_groups=4, kept_groups=2, group_score=grouped) if grouped else {}
    router = RouterConfig(scoring=scoring, bias_rule="sign", **sizes)
    for bias_scale in (1e-9, 1e-4, 1.0):
        widths = np.array([0.1, 1.0, 10.0, 30.0, 60.0]).repeat(6)[:, None]
        z = (widths * rng.normal(size=(30, 8))).astype(np.float32)
        bias = (bias_scale * rng.choice([-1.0, 0.0, 0.5, 1.0], 8)).astype(np.float32)
        got = chosen(router, z[None], 3, bias=jnp.asarray(bias))[0]
        for logits, experts in zip(z, got):
            scores = exact_scores(scoring, logits)
            preferred = [s + Fraction(float(b)) for s, b in zip(scores, bias)]
            ids = range(8)
            if grouped:
                best = 1 if grouped == "max" else 2
                of_group = [sum(sorted(preferred[g : g + 2])[-best:]) for g in range(0, 8, 2)]
                kept = sorted(range(4), key=lambda g: -of_group[g])[:2]
                ids = [i for i in ids if i // 2 in kept]
            order = sorted(ids, key=lambda i: (-preferred[i], -logits[i]))[:3]
            # Scores themselves are right to float32's digits: nearer than that may be either.
            gap = max(abs(preferred[a] - preferred[b]) for a, b in zip(order, experts))
            assert list(experts) == order or gap < 2e-7 * max(map(abs, preferred)), logits


def test_a_bias_decides_beyond_the_digits_of_one():
    """1 - 2.1e-9 + 3e-9 is above 1 - 2e-22 + 1e-20, and that above 1 - 4e-18."""
    router = RouterConfig(scoring="sigmoid", bias_rule="sign")
    bias = jnp.asarray([3e-9, 0.0, 0.0, 1e-20])
    np.testing.assert_array_equal(
        chosen(router, [[[20.0, 30, 40, 50]]], 3, bias=bias), [[[0, 3, 2]]]
    )


def test_ties_go_to_the_lower_id_and_nan_is_no_reason_to_fail():
    for name, values in ROUTERS.items():
        tied = chosen(RouterConfig(**values), np.zeros((1, 1, 4)), bias=jnp.zeros(4))
        np.testing.assert_array_equal(tied[0, 0], [0, 1], err_msg=name)
        broken = chosen(RouterConfig(**values), np.full((1, 1, 4), np.nan), bias=jnp.zeros(4))
        assert len(set(broken[0, 0])) == 2 and set(broken[0, 0]) <= set(range(4)), name


def test_expert_choice_orders_tokens_whose_scores_are_all_one():
    """Three tokens for one place of each expert: all scores 1 or 0 in float32."""
    z = np.array([[[30.0, 0], [50, 0], [40, 0], [0, 30], [0, 60], [0, 40]]])
    router = RouterConfig(selection="expert_choice", renormalize=False)
    experts = np.asarray(route(router, jnp.asarray(z), 1).experts)[0]
    np.testing.assert_array_equal((experts != 2).sum(0), [3, 3])
    one_place = np.asarray(across_tokens("softmax", jnp.asarray(z)))[0]
    np.testing.assert_array_equal(np.argsort(-one_place[:, 0])[:3], [1, 2, 0])
    np.testing.assert_allclose(one_place[:, 0], z[0, :, 0] - z[0, :, 1], rtol=1e-6)


def test_low_rank_experts_are_chosen_by_logits():
    x = jnp.asarray([[0.0, -200.0, -150.0]])
    weights = xlora_weights(x, jnp.eye(3), 1.0, 2)
    np.testing.assert_array_equal(weights > 0, [[True, False, False]])
    hot = xlora_weights(x, jnp.eye(3), 100.0, 2)
    np.testing.assert_array_equal(hot > 0, [[True, False, True]])


PROBABILITIES = np.array([0.644, 0.237, 0.087, 0.032])


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("given", [None, 0.5])
def test_the_temperature_does_not_change_how_often_an_expert_is_drawn(temperature, given):
    """softmax((h + g) / tau): the largest is drawn by softmax(h), for a temperature of the
    configuration, or an annealed one. Weights are 1 going forward; going backward they are the
    relaxed sample's.
    """
    tau = given or temperature
    router = RouterConfig(
        selection="gumbel",
        temperature=temperature,
        final_temperature=temperature,
        renormalize=False,
    )
    h = jnp.log(PROBABILITIES).astype(jnp.float32)
    key = jax.random.key(1)
    draws = 20_000

    def weights(h):
        z = jnp.broadcast_to(h, (1, draws, 4)) / tau
        routing = route(router, z, 1, key=key, temperature=given)
        return jnp.sum(routing.weights * (1.0 + routing.experts)), routing

    gradient, routing = jax.jit(jax.grad(weights, has_aux=True))(h)
    drawn = np.bincount(np.ravel(routing.experts), minlength=4) / draws
    # Four standard deviations of a mean of so many.
    np.testing.assert_allclose(drawn, PROBABILITIES, atol=4 * 0.5 / draws**0.5)
    np.testing.assert_array_equal(routing.weights, 1.0)
    noise = np.asarray(jax.random.gumbel(key, (1, draws, 4)), np.float64)[0]
    relaxed = np.exp((np.log(PROBABILITIES) + noise) / tau)
    relaxed /= relaxed.sum(-1, keepdims=True)
    np.testing.assert_allclose(routing.router_probs[0], relaxed, atol=2e-5)
    best = relaxed.argmax(-1)
    of_best = relaxed.max(-1)[:, None] * (np.eye(4)[best] - relaxed) / tau
    expected = ((1.0 + best)[:, None] * of_best).sum(0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-3 * abs(expected).max())


@pytest.mark.parametrize("k", [True, 0, -1, 5, 2.0, np.float32(1), None, "2"])
def test_places_that_are_no_number_of_experts_are_refused(k):
    with pytest.raises(
        InputError, match=r"experts_per_token: got .*, expected an integer between 1"
    ):
        route(RouterConfig(), jnp.zeros((1, 1, 4)), k)


def test_places_of_any_integer_type_and_ids_that_are_none():
    z = jnp.asarray([[[0.0, 3, 1, 2]]])
    for k in (np.int64(2), np.uint8(2), np.int32(2)):
        np.testing.assert_array_equal(route(RouterConfig(), z, k).experts, [[[1, 3]]])
    hashing = RouterConfig(selection="hash")
    with pytest.raises(ValueError, match="tokens: got dtype float32, expected integers"):
        route(hashing, z, 1, tokens=jnp.zeros((1, 1)))
