"""Adaptive MLPs and the versatile one: each against its formula in float64 numpy, values and
gradients; what they are when everything runs; what does not run for one token; their FLOPs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_gradients, rel_rms, slow

from gatedjax.config import (
    AdaptiveMLPConfig,
    FrozenDict,
    GatedMLPConfig,
    MLPConfig,
    ModelConfig,
    VersatileMLPConfig,
)
from gatedjax.errors import InputError
from gatedjax.layers import MLP, AdaptiveMLP, GatedMLP, TokenInfo, VersatileMLP, gate_values
from gatedjax.layers.adaptive_mlp import parts_used, prefix_outputs
from gatedjax.layers.learner_losses import distance, gate_labels, learner_losses
from gatedjax.layers.moe.state import updated
from gatedjax.layers.norm import rms_norm
from gatedjax.layers.versatile_mlp import slices

M = 4
RNG = np.random.default_rng(5)
X = RNG.normal(size=(2, 3, M)).astype(np.float32)
INFO = TokenInfo(np.tile(np.arange(3), (2, 1)), segment_ids=np.array([[1, 1, 0], [1, 1, 1]]))


def gelu(x):
    return x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def parameters(module, std=0.7):
    shapes = jax.eval_shape(module.init, jax.random.key(0), X)["params"]
    return jax.tree.map(lambda s: (std * RNG.normal(size=s.shape)).astype(np.float32), shapes)


def learner(p, c, x, number):
    size = c.hidden // c.learners
    part = slice(number * size, (number + 1) * size)
    up = x @ p["up"]["kernel"][:, part]
    h = silu(x @ p["gate"]["kernel"][:, part]) * up if c.gated else gelu(up)
    return h @ p["down"]["kernel"][part]


def logits_of_gate(p, x):
    for number in range(3):
        layer = p["learner_gate"][f"layer_{number}"]
        x = x @ layer["kernel"] + layer["bias"]
    return x


@pytest.mark.parametrize("gated, least", [(False, 0), slow(True, 1)])
def test_adaptive_mlp(gated, least):
    """Without noise: sum_{i <= k} f_i(x), k the likeliest number; gradients of the learners."""
    c = AdaptiveMLPConfig(
        hidden=6, learners=3, least=least, gated=gated, activation="silu" if gated else "gelu"
    )
    module = AdaptiveMLP(c)
    given = parameters(module)
    number = least + logits_of_gate(given, X).argmax(-1)

    def formula(p):
        y = np.zeros(X.shape)
        for i in range(c.learners):
            y += np.where((number > i)[..., None], learner(p, c, X, i), 0.0)
        return y

    weights = RNG.normal(size=X.shape)
    apply = functools.partial(module.apply, x=X)
    y, gradient = value_and_gradient(apply, given, weights)
    assert rel_rms(y, formula(given)) < 1e-5
    check_gradients(lambda p: (weights * formula(p)).sum(), given, gradient)
    assert np.array_equal(gate_values(module, given, X)["learners"], number)
    padded = module.apply({"params": given}, X, INFO)
    assert np.all(padded[0, 2] == 0) and rel_rms(padded[1], formula(given)[1]) < 1e-5


def test_gradients_through_the_choice_of_learners():
    """With noise: forward the drawn number, backward sum_k d softmax_k / dlogits (dL, h_k)."""
    c = AdaptiveMLPConfig(hidden=6, learners=3, temperature=0.8)
    module = AdaptiveMLP(c, training=True)
    given = parameters(module)
    apply = functools.partial(module.apply, x=X, rngs={"router": jax.random.key(4)})
    sowing = functools.partial(apply, mutable=["added_losses"])
    _, sown = jax.jit(sowing)({"params": given})
    (choice,) = sown["added_losses"]["learner_choices"]
    outputs = np.asarray(jax.jit(lambda p: prefix_outputs(p, c, X))(given))
    # The noise, from the drawn numbers: any that gives the same soft choice would do.
    weights = RNG.normal(size=X.shape)
    key = module.apply({"params": given}, rngs={"router": jax.random.key(4)}, method=_key_of)
    noise = np.asarray(jax.random.gumbel(key, choice.shape), np.float64)

    def surrogate(gate):
        p = given | {"learner_gate": gate}
        soft = softmax((logits_of_gate(p, X) + noise) / c.temperature)
        return np.einsum("btm,btk,btkm->", weights, soft, outputs)

    assert np.array_equal(
        (logits_of_gate(given, X) + noise).argmax(-1), np.asarray(choice).argmax(-1)
    )
    y, gradient = value_and_gradient(apply, given, weights)
    assert rel_rms(y, np.einsum("btk,btkm->btm", choice, outputs)) < 1e-5
    check_gradients(surrogate, given["learner_gate"], gradient["learner_gate"])


def value_and_gradient(apply, given, weights):
    """Of sum(weights * y) by the parameters, in one program."""

    def loss(p):
        y = apply({"params": p})
        return jnp.sum(weights * y), y

    (_, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(given)
    return y, gradient


def _key_of(module):
    return module.make_rng("router")


def test_all_learners_are_the_plain_mlp_to_the_bit():
    for c, plain in [
        (AdaptiveMLPConfig(hidden=8, learners=2), MLP(MLPConfig(hidden=8, activation="gelu"))),
        (
            AdaptiveMLPConfig(hidden=8, learners=2, gated=True, activation="silu"),
            GatedMLP(GatedMLPConfig(hidden=8)),
        ),
    ]:
        given = parameters(AdaptiveMLP(c))
        given["learner_gate"]["layer_2"]["bias"] = np.array([0, 0, 1e6], np.float32)
        weights = {name: p for name, p in given.items() if name != "learner_gate"}
        expected = plain.apply({"params": weights}, X)
        assert np.array_equal(AdaptiveMLP(c).apply({"params": given}, X), expected)


def test_one_token_runs_its_own_learners():
    """Learners that it does not have may be NaN; its output is that within a row."""
    c = AdaptiveMLPConfig(hidden=6, learners=3)
    module = AdaptiveMLP(c)
    given = parameters(module)
    given["learner_gate"]["layer_2"]["bias"] = np.array([0, 0, 1e6, 0], np.float32)
    token = X[:1, :1]
    whole = module.apply({"params": given}, X)[:1, :1]
    broken = jax.tree.map(np.copy, given)
    broken["up"]["kernel"][:, 4:] = np.nan
    assert rel_rms(module.apply({"params": broken}, token), whole) < 1e-6
    assert np.isnan(module.apply({"params": broken}, X)).any()


def test_what_learners_and_gates_are_taught():
    c = AdaptiveMLPConfig(hidden=6, learners=3)
    given = parameters(AdaptiveMLP(c))
    target = RNG.normal(size=X.shape)

    def loss(p):
        pieces = [np.zeros(X.shape)] + [learner(p, c, X, i) for i in range(3)]
        return sum(((sum(pieces[: k + 1]) - target) ** 2).mean() for k in range(4)) / 4

    outputs = prefix_outputs(given, c, X)
    assert float(distance(outputs, target).mean()) == pytest.approx(loss(given), rel=1e-5)
    taught = jax.jit(jax.grad(lambda p: distance(prefix_outputs(p, c, X), target).mean()))
    gradient = taught(given)
    learners = {name: given[name] for name in ("up", "down")}
    check_gradients(loss, learners, {name: gradient[name] for name in learners})

    def detached(p):
        """Of each learner the squares of its own number alone."""
        fixed = [np.zeros(X.shape)] + [learner(given, c, X, i) for i in range(3)]
        total = 0.0
        for k in range(1, 4):
            total += ((sum(fixed[:k]) + learner(p, c, X, k - 1) - target) ** 2).mean()
        return total / 4

    gradient = jax.grad(lambda p: distance(prefix_outputs(p, c, X, detached=True), target).mean())(
        given
    )
    check_gradients(detached, learners, {name: gradient[name] for name in learners})
    # Errors with 0 ... 3 learners; the target is 0.
    errors = np.array([[8.0, 4, 3.9, 1], [8, 7.9, 2, 1], [8, 4, 2, 1], [8, 4, 2, 1.9]])
    labels = gate_labels(errors[..., None] * np.eye(4)[0], np.zeros((4, 4)), 1.2)
    np.testing.assert_array_equal(labels, [2, 3, 3, 3])
    labels = gate_labels(errors[..., None] * np.eye(4)[0], np.zeros((4, 4)), 1.2, least=1)
    np.testing.assert_array_equal(labels, [1, 2, 2, 2])


def test_losses_of_choices_by_loops():
    c = AdaptiveMLPConfig(hidden=6, learners=3, budget=0.25)
    choices = RNG.random((2, 3, 5, 4))
    choices /= choices.sum(-1, keepdims=True)
    choices[:, 0, 3:] = 0

    def formula(choices):
        used, entropies, by_row = [], [], []
        for b in range(3):
            length = 3 if b == 0 else 5
            own = []
            for layer in range(2):
                p = choices[layer, b].sum(0) / choices[layer, b].sum()
                entropies.append(-(p * np.log(p)).sum() / np.log(4))
                own.append((p * np.arange(4)).sum())
                used.append((own[-1], length))
            by_row.append(np.mean(own) / 4)
        fraction = sum(u * n for u, n in used) / sum(n for _, n in used) / 3
        pairs = [abs(a - b) for a in by_row for b in by_row]
        return np.array([abs(fraction - 0.25), -np.mean(entropies), -2 * np.mean(pairs)])

    def losses(choices):
        found = learner_losses(c, choices)
        return jnp.stack([found["budget"], found["entropy"], found["diversity"]])

    of_program = jax.jit(losses)
    np.testing.assert_allclose(of_program(jnp.asarray(choices)), formula(choices), rtol=1e-5)
    assert all(np.isfinite(of_program(jnp.zeros((2, 3, 5, 4)))))
    direction = RNG.normal(size=choices.shape) * (choices > 0)
    # Along it every token's choices still sum to 1.
    direction -= np.where(choices > 0, direction.mean(-1, keepdims=True), 0)
    _, found = jax.jvp(of_program, [jnp.asarray(choices)], [jnp.asarray(direction, jnp.float32)])
    slope = (formula(choices + 1e-5 * direction) - formula(choices - 1e-5 * direction)) / 2e-5
    np.testing.assert_allclose(found, slope, rtol=1e-3)


def mlp_of_stream(p, x, channels, eps):
    normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * p["norm_scale"]
    h = silu(normed @ p["gate"]["kernel"]) * (normed @ p["up"]["kernel"])
    return (h * channels) @ p["down"]["kernel"]


def test_versatile_mlp():
    c = VersatileMLPConfig(hidden=9, experts=3, expert_hidden=2, loops=3)
    module = VersatileMLP(c)
    given = parameters(module)
    given["router_state"]["temperature"] = np.float32(5.0)
    loops = 1 + (X @ given["loop_router"]["kernel"]).argmax(-1)
    assert len(np.unique(loops)) > 1
    # floor(0), floor(3.5), floor(7)
    starts = [0, 3, 7]
    best = np.argsort(-(X @ given["router"]["kernel"]), axis=-1)[..., :2]

    def formula(p):
        y = np.zeros(X.shape)
        logits = X @ p["router"]["kernel"]
        for at in np.ndindex(2, 3):
            x = np.asarray(X[at], np.float64)
            g = softmax(np.asarray([logits[at][e] for e in best[at]], np.float64))
            width = x.copy()
            for weight, e in zip(g, best[at]):
                channels = np.zeros(9)
                channels[starts[e] : starts[e] + 2] = 1
                width += weight * mlp_of_stream(p, x, channels, 1e-6)
            depth = x
            for _ in range(loops[at]):
                depth = depth + mlp_of_stream(p, depth, 1.0, 1e-6)
            of_width = (3 - loops[at]) / 3
            y[at] = of_width * width + (1 - of_width) * depth - x
        return y

    weights = RNG.normal(size=X.shape)
    apply = functools.partial(module.apply, x=X)
    y, gradient = value_and_gradient(apply, given, weights)
    assert rel_rms(y, formula(given)) < 1e-5
    check_gradients(lambda p: (weights * formula(p)).sum(), given, gradient)
    padded = module.apply({"params": given}, X, INFO)
    assert np.all(padded[0, 2] == 0) and rel_rms(padded[1], formula(given)[1]) < 1e-5
    # All loops, in training, are the same.
    trained = VersatileMLP(c, training=True).apply({"params": given}, X)
    assert rel_rms(trained, formula(given)) < 1e-5


def test_gradients_through_the_choice_of_loops():
    """Both ways: which state counts, and how much of it (lambda)."""
    c = VersatileMLPConfig(hidden=6, experts=3, loops=3, anneal_steps=0, temperature=2.0)
    module = VersatileMLP(c, training=True)
    given = parameters(module)
    rngs = {"router": jax.random.key(2)}
    apply = functools.partial(module.apply, x=X, rngs=rngs)
    key = module.apply({"params": given}, rngs=rngs, method=_key_of)
    noise = np.asarray(jax.random.gumbel(key, (2, 3, 3)), np.float64)
    weights = RNG.normal(size=X.shape)
    logits = X @ given["router"]["kernel"]
    lowest = logits == logits.min(-1, keepdims=True)
    share = softmax(np.where(lowest, -np.inf, logits))
    width = mlp_of_stream(given, X, share @ slices(c), 1e-6)
    states, x = [], X.astype(np.float64)
    for _ in range(3):
        x = x + mlp_of_stream(given, x, 1.0, 1e-6)
        states.append(x - X)

    def y_of(p):
        of_width = (3 - p @ np.arange(1, 4))[..., None] / 3
        depth = np.einsum("btl,lbtm->btm", p, np.asarray(states))
        return of_width * width + (1 - of_width) * depth

    def soft(kernel):
        return softmax((X @ kernel + noise) / 2.0)

    kernel = np.asarray(given["loop_router"]["kernel"], np.float64)
    hard = np.eye(3)[soft(kernel).argmax(-1)]
    y, gradient = value_and_gradient(apply, given, weights)
    assert rel_rms(y, y_of(hard)) < 1e-5
    # Straight through: the slope at the hard choice, along the soft one.
    slope_at = np.stack(
        [
            ((y_of(hard + 1e-5 * e) - y_of(hard - 1e-5 * e)) / 2e-5 * weights).sum(-1)
            for e in np.eye(3)
        ],
        axis=-1,
    )
    gradient = jax.grad(lambda p: jnp.sum(weights * apply({"params": p})))(given)
    check_gradients(lambda k: (slope_at * soft(k)).sum(), kernel, gradient["loop_router"]["kernel"])


def test_one_loop_is_the_plain_mlp_to_the_bit():
    module = VersatileMLP(VersatileMLPConfig(hidden=8, experts=2, loops=1))
    given = parameters(module)
    normed = rms_norm(jnp.asarray(X), given["norm_scale"], 1e-6)
    plain = {name: given[name] for name in ("gate", "up", "down")}
    expected = GatedMLP(GatedMLPConfig(hidden=8)).apply({"params": plain}, normed)
    assert np.array_equal(module.apply({"params": given}, X), expected)


def dot_flops(jaxpr) -> int:
    """FLOPs of all matrix products of a program; of a conditional the branch with the most."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [j for j in jax.tree.leaves(list(equation.params.values())) if hasattr(j, "eqns")]
        inner += [j.jaxpr for j in equation.params.get("branches", ())]
        if equation.primitive.name == "cond":
            total += max(dot_flops(j.jaxpr) for j in equation.params["branches"])
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inputs = equation.invars[0].aval.shape
            size = int(np.prod([inputs[axis] for axis in contracted]))
            total += 2 * size * int(np.prod(equation.outvars[0].aval.shape))
        else:
            closed = [v for v in equation.params.values() if hasattr(v, "jaxpr")]
            total += sum(dot_flops(j.jaxpr) for j in closed)
            total += sum(dot_flops(j) for j in inner if not hasattr(j, "jaxpr"))
    return total


@pytest.mark.parametrize(
    "module, not_counted",
    [
        (AdaptiveMLP(AdaptiveMLPConfig(hidden=12, learners=3), training=True), 0),
        (AdaptiveMLP(AdaptiveMLPConfig(hidden=12, gated=True), training=True), 0),
        # Which channels a token's slices have, and the number of its loops.
        (VersatileMLP(VersatileMLPConfig(hidden=12, experts=3), training=True), 2 * 3 * 12 + 2 * 4),
    ],
)
def test_flops_are_those_of_the_program(module, not_counted):
    given = parameters(module)
    found = dot_flops(jax.make_jaxpr(lambda p: module.apply({"params": p}, X))(given).jaxpr)
    assert found / 6 == module.forward_flops_per_token(M, 3) + not_counted
    c = module.config
    if isinstance(c, AdaptiveMLPConfig):
        less = module.flops_with(M, 1)
        of_learner = 2 * (3 if c.gated else 2) * M * c.hidden / c.learners
        assert module.flops_with(M, c.learners) - less == (c.learners - 1) * of_learner


def test_the_temperature_falls():
    ffn = VersatileMLPConfig(anneal_steps=10)
    model = ModelConfig(vocab_size=8, ffns=FrozenDict(mlp=ffn))
    path = ("periods", "layer_0", "ffn")
    state = {"periods": {"layer_0": {"ffn": {"router_state": {"temperature": jnp.full(2, 5.0)}}}}}
    new = updated(model, state, {}, jnp.int32(5))
    for name in (*path, "router_state"):
        new = new[name]
    np.testing.assert_allclose(new["temperature"], 5.0 * (0.1 / 5.0) ** 0.5, rtol=1e-6)


def test_bad_input():
    for config, key, values in [
        (AdaptiveMLPConfig, "learners", dict(hidden=8, learners=9)),
        (AdaptiveMLPConfig, "learners", dict(hidden=8, learners=3)),
        (AdaptiveMLPConfig, "least", dict(learners=4, least=4)),
        (AdaptiveMLPConfig, "activation", dict(gated=True, activation="identity")),
        (VersatileMLPConfig, "experts_per_token", dict(experts=2, experts_per_token=3)),
        (VersatileMLPConfig, "expert_hidden", dict(hidden=16, experts=4, expert_hidden=5)),
        (VersatileMLPConfig, "expert_hidden", dict(hidden=4, experts=8)),
    ]:
        with pytest.raises(InputError, match=f"^{key}: got .*, expected"):
            config(**values)
    with pytest.raises(InputError, match="ffns: got 'versatile_mlp', expected norm_placement"):
        ModelConfig(vocab_size=8, residual_weight=0.5, ffns=FrozenDict(mlp=VersatileMLPConfig()))


def test_parts_used():
    choice = jnp.asarray([[0.1, 0.2, 0.7]])
    np.testing.assert_allclose(parts_used(choice, 0), [[0.9, 0.7]], rtol=1e-6)
    np.testing.assert_allclose(parts_used(choice, 1), [[1.0, 0.9, 0.7]], rtol=1e-6)
