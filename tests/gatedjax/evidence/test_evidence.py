"""The formulas of `gatedjax.evidence`, in float64 where they are closed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_gradients

from gatedjax.evidence import (
    dynamics,
    in_context,
    kernel_dynamics,
    opposing,
    outliers,
    superiority,
)
from gatedjax.evidence import support_vectors as svm
from gatedjax.layers.gaussian import distances_as_channels
from kernels_pallas import ops


def rng(seed=0):
    return np.random.default_rng(seed)


# In-context regression.


def heads(omega, mu, width):
    """A layer with W_Q W_K^T = omega I on x, and W_V W_O = (0, mu)."""
    size = width + 1
    eye = np.diag([1.0] * width + [0.0])
    query = np.stack([w * size**0.5 * eye for w in omega])
    key = np.stack([eye] * len(omega))
    value = np.stack([np.eye(size)] * len(omega))
    out = np.zeros((len(omega), size))
    out[:, -1] = mu
    return in_context.Layer(query, key, value, out)


def normal_rows(num_rows, length, width):
    r = rng()
    shapes = ((num_rows, length, width), (num_rows, length), (num_rows, width), (num_rows,))
    return in_context.Rows(*(r.normal(size=shape) for shape in shapes))


def test_two_opposite_heads_are_a_step_of_descent_on_centered_inputs():
    """The difference falls with the cube of omega: of the prediction, with its square."""
    with jax.enable_x64(True):
        rows = normal_rows(6, 9, 3)
        errors = []
        for omega in (0.04, 0.02):
            layer = heads([omega, -omega], [5.0, -5.0], 3)
            expected = 2 * omega * 5.0 * in_context.debiased(rows)
            errors.append(np.max(np.abs(in_context.predict(layer, rows) - expected)))
        assert errors[0] < 1e-2 and errors[0] / errors[1] == pytest.approx(8, rel=0.05)


@pytest.mark.slow
def test_the_approximate_loss_is_near_that_of_many_rows():
    omega, mu = np.array([0.05, -0.05]), np.array([4.0, -4.0])
    rows = in_context.draw_rows(jax.random.key(0), 20_000, 40, 5, 0.1)
    loss = np.mean((in_context.predict(heads(omega, mu, 5), rows) - rows.answer) ** 2)
    expected = in_context.approximate_loss(omega, mu, width=5, length=40, noise=0.1)
    assert float(expected) == pytest.approx(float(loss), rel=0.03)


def test_patterns_are_told():
    exact = in_context.pattern(heads([0.1, -0.1], [3.0, -3.0], 4))
    assert exact == pytest.approx(dict(kq_diagonal=1, ov_last=1, zero_sum=0, unequal=0), abs=1e-6)
    lone = in_context.pattern(heads([0.1, -0.3], [3.0, 1.0], 4))
    assert lone["zero_sum"] == 1 and lone["unequal"] > 0.1
    layer = heads([0.1, -0.1], [3.0, -3.0], 4)
    mixed = layer._replace(query=layer.query + 0.2 * rng().normal(size=layer.query.shape))
    assert in_context.pattern(mixed)["kq_diagonal"] < 0.9


def test_ridge_is_bayes():
    """By the normal equations, in float64."""
    with jax.enable_x64(True):
        rows = normal_rows(2, 7, 3)
        for b in range(2):
            x, y = np.asarray(rows.x[b]), np.asarray(rows.y[b])
            # The posterior of a slope of variance 1 / d.
            slope = np.linalg.inv(x.T @ x / 0.2 + 3 * np.eye(3)) @ x.T @ y / 0.2
            assert slope @ rows.query[b] == pytest.approx(float(in_context.ridge(rows, 0.2)[b]))


# The needle's sign.


@pytest.mark.slow
def test_the_needles_weight_and_linear_attentions_bound():
    n = 50
    rows = superiority.draw_rows(jax.random.key(0), 4000, n)
    c = np.asarray(rows.tokens[..., 0], np.float64)
    s = np.asarray(rows.tokens[..., 1])
    place = c.argmax(axis=1)
    every = np.arange(len(c))
    np.testing.assert_array_equal(s[every, place], rows.answer)
    logits = c * c.max()
    weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert weights[every, place].min() >= superiority.least_softmax_weight(n)
    # The best linear reading of the two sums, fitted to these rows: no better than the bound.
    sums = np.stack([s.sum(axis=1), (c * s).sum(axis=1)], axis=1)
    direction = np.linalg.lstsq(sums, np.asarray(rows.answer), rcond=None)[0]
    accuracy = np.mean((sums @ direction) * rows.answer > 0)
    assert accuracy == pytest.approx(superiority.best_linear_accuracy(n), abs=0.025)
    assert superiority.best_linear_accuracy(10**6) < 0.503
    assert superiority.least_softmax_weight(10**6) > 0.97


# Support vector machines.


def problem(seed=0):
    rows = svm.draw_rows(rng(seed), 4, 3, 5)
    return rows, svm.constraints(rows, rows.goodness.argmax(axis=1))


def test_gradient_of_attention():
    rows, _ = problem()
    W = rng(1).normal(size=(5, 5))
    gradient = svm.loss_and_gradient(W, rows)[1] * svm.gradient_scale(W, rows)
    step = 1e-6 * rng(2).normal(size=W.shape)
    difference = svm.loss_and_gradient(W + step, rows)[0] - svm.loss_and_gradient(W - step, rows)[0]
    assert difference == pytest.approx(2 * np.sum(gradient * step), rel=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_margins_are_optimal(seed):
    """Both machines by their dual problems: the bound that proves them is met."""
    _, A = problem(seed)
    flat = A.reshape(len(A), -1)
    W = svm.hard_margin(A)
    margins = flat @ W.reshape(-1)
    # Karush-Kuhn-Tucker: W is a sum of the A on the margin, with no negative factor.
    support = margins < 1 + 1e-7
    factors = np.linalg.lstsq(flat[support].T, W.reshape(-1), rcond=None)[0]
    assert margins.min() > 1 - 1e-9 and factors.min() > -1e-9
    np.testing.assert_allclose(flat[support].T @ factors, W.reshape(-1), atol=1e-9)
    nuclear = svm.nuclear_margin(A)
    assert (flat @ nuclear.reshape(-1)).min() > 1 - 1e-6
    norm = np.linalg.svd(nuclear, compute_uv=False).sum()
    assert norm < np.linalg.svd(W, compute_uv=False).sum() + 1e-9
    # Dual: sum b_j for b >= 0 and spectral norm of sum b_j A_j at most 1. At K Q^T the factors
    # follow from K = G Q, where G is that sum.
    u, s, vt = np.linalg.svd(nuclear)
    rank = int(np.sum(s > 1e-5 * s[0]))
    on_margin = flat @ nuclear.reshape(-1) < 1 + 1e-4
    wanted = (u[:, :rank] @ vt[:rank]).reshape(-1)
    # Of G, what is in the spaces of W: the rest is bounded only.
    left, right = u[:, :rank] @ u[:, :rank].T, vt[:rank].T @ vt[:rank]
    inside = np.stack([(left @ a @ right).reshape(-1) for a in A[on_margin]])
    b = np.linalg.lstsq(inside.T, wanted, rcond=None)[0]
    G = np.tensordot(b, A[on_margin], axes=1)
    assert b.min() > -1e-3 and b.sum() == pytest.approx(norm, rel=1e-3)
    assert np.linalg.norm(left @ G @ right - wanted.reshape(5, 5)) < 1e-2


def test_what_cannot_be_separated_is_said():
    A = np.stack([np.eye(2), -np.eye(2)])
    with pytest.raises(ValueError, match=r"A: got a margin of .*, expected tokens"):
        svm.hard_margin(A)


def test_descent_points_to_the_machine():
    values = svm.AttentionSVM("W", norms=(3, 30), num_rows=3, num_tokens=3, lr=0.1)(0)
    assert values["frobenius@30"] > max(0.95, values["frobenius@3"], values["nuclear@30"])


# Mixers as dynamical systems.

T, N, V = 7, 3, 4


def inputs(seed=0):
    r = rng(seed)
    q, k = r.normal(size=(2, T, N))
    return q, k / np.linalg.norm(k, axis=1, keepdims=True), r.normal(size=(T, V))


def head(x):
    """[T, ...] -> [1, T, 1, ...] in float32, as the ops take it."""
    return jnp.asarray(x, jnp.float32)[None, :, None]


def same(system, v, y):
    np.testing.assert_allclose(dynamics.run(system, v), y[0, :, 0], rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(dynamics.mixing_matrix(system) @ v, dynamics.run(system, v))


REFERENCE = dict(scale=1.0, implementation="reference")


def test_linear_mixers_are_systems():
    q, k, v = inputs()
    scalar = -rng(1).random((T, 1))
    vector = -rng(2).random((T, N))
    for decay in (None, scalar, vector):
        of_op = None
        if decay is not None:
            of_op = head(decay[:, 0] if decay is scalar else decay)
        y = ops.linear_scan(head(q), head(k), head(v), of_op, **REFERENCE)
        same(dynamics.linear(q, k, decay), v, y)
    bonus = rng(3).random(N)
    y = ops.linear_scan(
        head(q), head(k), head(v), head(vector), bonus=jnp.asarray(bonus, jnp.float32)[None],
        inclusive=False, **REFERENCE,
    )  # fmt: skip
    same(dynamics.linear(q, k, vector, bonus), v, y)


def test_delta_rules_are_systems():
    q, k, v = inputs()
    beta = rng(1).random(T)
    decays = {"none": None, "scalar": -rng(2).random((T, 1)), "vector": -rng(3).random((T, N))}
    for kind, decay in decays.items():
        of_op = None
        if decay is not None:
            of_op = head(decay[:, 0] if kind == "scalar" else decay)
        y = ops.delta_scan(head(q), head(k), head(v), head(beta), of_op, **REFERENCE)
        same(dynamics.delta(q, k, beta, decay), v, y)


def test_softmax_is_a_system_of_a_channel_a_token_or_of_all_powers():
    q, k, v = inputs()
    q = q / 2
    y = ops.attention(head(q), head(k), head(v), **REFERENCE)
    same(dynamics.slots(q, k), v, y)
    errors = []
    for order in (1, 2, 4):
        system = dynamics.softmax(q, k, order)
        errors.append(np.max(np.abs(dynamics.run(system, v) - np.asarray(y[0, :, 0]))))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 2e-2


def test_state_spaces_are_linear_attention_with_a_forget_gate():
    """S6 with A = -1 has the decay sigmoid(-x), and keys that grow as it forgets."""
    q, k, v = inputs()
    x = rng(1).normal(size=T)
    dt = np.log1p(np.exp(x))
    system = dynamics.state_space(dt, -1.0, k, q, D=0.5)
    gated = dynamics.linear(q, dt[:, None] * k, np.log(1 / (1 + np.exp(x)))[:, None])
    np.testing.assert_allclose(dynamics.run(system, v), dynamics.run(gated, v) + 0.5 * v)
    rows = dynamics.mixing_matrix(dynamics.normalized(dynamics.linear(q**2, k**2)))
    np.testing.assert_allclose(rows.sum(axis=1), 1)


# Kernels and groups.


def test_the_gaussian_kernel_is_the_layers_without_its_sum():
    q, k, _ = inputs()
    wide_q, wide_k = distances_as_channels(head(q), head(k), 1.0)
    weights = np.asarray(kernel_dynamics.weights(jnp.asarray(q), jnp.asarray(k), "gaussian"))
    distances = np.sum((q[:, None] - k[None]) ** 2, axis=-1)
    np.testing.assert_allclose(weights, np.exp(-distances / (2 * N**0.5)), rtol=1e-5)
    # The layer's logits differ in the scale: -|q - k|^2 / 2.
    logits = np.asarray(wide_q[0, :, 0] @ wide_k[0, :, 0].T)
    shifted = logits - logits.max(axis=1, keepdims=True)
    expected = -distances / 2 + distances.min(axis=1, keepdims=True) / 2
    np.testing.assert_allclose(shifted, expected, atol=1e-4)


def test_groups_and_their_gradients():
    groups = opposing.opposing_groups(np.zeros(5), np.array([0.0, 3.0, -2.0, 1.0, -1.0]), 2)
    assert set(groups.falling) == {2, 4} and set(groups.rising) == {1, 3}
    with pytest.raises(ValueError, match="size: got 3, expected at most half of 5"):
        opposing.opposing_groups(np.zeros(5), np.zeros(5), 3)
    # The same example with either label: with weights of 0, exactly opposite gradients.
    x = np.ones((2, 3), np.float32)
    examples = opposing.Examples(x, np.array([1.0, -1.0]), np.array([True, True]))
    params = {"in": np.zeros((3, 2), np.float32), "out": np.ones(2, np.float32)}
    pair = opposing.Groups(np.array([0]), np.array([1]))
    assert opposing.group_cosine(params, examples, pair) == pytest.approx(-1)


@pytest.mark.slow
def test_sharpness_is_the_largest_eigenvalue():
    examples = opposing.draw_examples(jax.random.key(0), 8, 3, 0.5, 4.0)
    params = {"in": jnp.ones((3, 1)) * 0.2, "out": jnp.ones(1)}
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    hessian = jax.hessian(lambda p: jnp.mean(opposing.losses(unravel(p), examples)))(flat)
    largest = np.linalg.eigvalsh(np.asarray(hessian)).max()
    assert float(opposing.sharpness(params, examples)) == pytest.approx(largest, rel=1e-3)


# In-context learning with outliers.


def test_a_mamba_head_is_its_sum_over_examples_and_a_scan():
    """Values and gradients; the head is `linear_scan` of gated keys."""
    r = rng()
    shapes = {"key": (3, 5), "query": (3, 5), "gate": (5,), "tokens": (2, 6, 5), "asked": (2, 5)}
    given = {name: r.normal(size=shape) for name, shape in shapes.items()}

    def formula(given):
        total = 0.0
        for tokens, asked in zip(given["tokens"], given["asked"]):
            s = 1 / (1 + np.exp(-np.vstack([tokens, asked]) @ given["gate"]))
            answer = 0.0
            for i, token in enumerate(tokens):
                weight = s[i] * np.prod(1 - s[i + 1 :])
                product = (given["key"] @ token) @ (given["query"] @ asked)
                answer += weight * product * token[-1]
            total += np.sin(answer)
        return total

    def predicted(given):
        layer = outliers.Layer(given["key"], given["query"], given["gate"])
        unused = jnp.zeros(2)
        prompts = outliers.Prompts(given["tokens"], given["asked"], unused, unused)
        return outliers.predict(layer, prompts)

    with jax.enable_x64(True):
        loss = lambda given: jnp.sum(jnp.sin(predicted(given)))
        value, gradient = jax.value_and_grad(loss)(given)
        assert value == pytest.approx(formula(given), rel=1e-9)
        check_gradients(formula, given, gradient)
    whole = np.concatenate([given["tokens"], given["asked"][:, None]], axis=1)
    gate = 1 / (1 + np.exp(-whole @ given["gate"]))
    gate[:, -1] = 1 / (1 + np.exp(-given["asked"] @ given["gate"]))
    of_head = lambda x: jnp.asarray(x[:, :, None], jnp.float32)
    o = ops.linear_scan(
        of_head(whole @ given["query"].T),
        of_head(gate[..., None] * (whole @ given["key"].T)),
        # The query has no label.
        of_head(whole[..., -1:] * (np.arange(7) < 6)[:, None]),
        of_head(np.log1p(-gate)),
        scale=1.0,
        implementation="reference",
    )
    np.testing.assert_allclose(o[:, -1, 0, 0], predicted(given), rtol=1e-4)


def test_prompts_with_outliers():
    """Labels are right but for outliers, whose are wrong in a test; no task is in both halves."""
    known, new = (outliers.tasks_of(8, is_known) for is_known in (True, False))
    assert not {*map(tuple, known)} & {*map(tuple, new)} and len(known) + len(new) == 8 * 7
    for tasks in (known, new):
        assert len(np.unique(np.bincount(tasks[:, 0]))) == 1
        assert len(np.unique(np.bincount(tasks[:, 1]))) == 1
    patterns = outliers.patterns_of(8, 4, 3, 20)
    prompts = outliers.OutliersInContext("mamba", 0.4).prompts(
        jax.random.key(0), 64, 0.4, is_test=True
    )
    assert prompts.tokens.shape == (64, 20, 21) and np.all(prompts.query[:, -1] == 0)
    assert np.mean(prompts.is_outlier) == pytest.approx(0.4, abs=0.05)
    found = np.argmax(prompts.tokens[..., :-1] @ patterns.relevant.T, axis=-1)
    asked = np.argmax(prompts.query[:, :-1] @ patterns.relevant.T, axis=-1)
    expected = np.where(found == asked[:, None], 1, -1) * prompts.answer[:, None]
    flipped = np.where(prompts.is_outlier, -1, 1)
    np.testing.assert_array_equal(prompts.tokens[..., -1], expected * flipped)
    seen = prompts.tokens[..., :-1] @ patterns.outliers.T
    np.testing.assert_allclose(np.sum(seen, axis=-1), 2.0 * prompts.is_outlier, atol=1e-5)
