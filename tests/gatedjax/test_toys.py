"""The toys: their formulas by numpy, their command, and that they learn what they are there for."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_gradients, rel_rms

from gatedjax.errors import InputError
from gatedjax.layers.hash_experts import HashExperts, balance_loss, interpolated, resolutions
from gatedjax.layers.two_streams import FinalMLP
from gatedjax.toys import click_through, continual, customization, families, scene
from gatedjax.toys.__main__ import main

RNG = np.random.default_rng(0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


@pytest.mark.slow
def test_finalmlp_is_its_formula():
    sizes, contexts = (5, 4, 3), ((1,), ())
    fields = np.stack([RNG.integers(0, n, 6) for n in sizes], axis=1)
    model = FinalMLP(sizes, 4, (6, 4), 3, 2, contexts)
    shapes = jax.eval_shape(model.init, jax.random.key(0), fields)["params"]
    params = jax.tree.map(lambda s: RNG.normal(size=s.shape), shapes)

    def formula(p):
        e = np.concatenate([p[f"embedding_{f}"][fields[:, f]] for f in range(3)], axis=1)
        streams = []
        for n in range(2):
            seen = p["context_1"][None] if n else p["context_0_1"][fields[:, 1]]
            h = np.maximum(dense(seen, p[f"gate_{n}_hidden"]), 0)
            x = e * 2 * sigmoid(dense(h, p[f"gate_{n}"]))
            for i in range(2):
                x = np.maximum(dense(x, p[f"stream_{n}_{i}"]), 0)
            streams.append(x)
        x, y = streams
        linear = (x @ p["of_x"] + y @ p["of_y"])[:, 0] + p["bias"]
        heads = [(x[:, h : h + 2] @ p["of_both"][h // 2] * y[:, h : h + 2]).sum(1) for h in (0, 2)]
        return linear + heads[0] + heads[1]

    narrow = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    run = jax.jit(jax.value_and_grad(lambda p: jnp.sum(model.apply({"params": p}, fields))))
    value, gradient = run(narrow)
    assert np.isclose(value, formula(params).sum(), rtol=1e-4)
    check_gradients(lambda p: formula(p).sum(), params, gradient)
    with pytest.raises(InputError, match=r"fields: got \(6, 2\), expected 3 of each row"):
        jax.eval_shape(model.init, jax.random.key(0), fields[:, :2])


def test_interpolation_is_between_eight_corners():
    points, table = RNG.uniform(size=(5, 3)), RNG.normal(size=(7, 2))
    wanted = np.zeros((5, 2))
    for n, corner in itertools.product(range(5), itertools.product((0, 1), repeat=3)):
        low = np.floor(points[n] * 4).astype(int)
        inside = points[n] * 4 - low
        x, y, z = (int(c) for c in low + np.asarray(corner))
        row = (x ^ (y * 2_654_435_761 % 2**32) ^ (z * 805_459_861 % 2**32)) % 7
        weight = np.prod([i if c else 1 - i for c, i in zip(corner, inside)])
        wanted[n] += weight * table[row]
    got = interpolated(jnp.asarray(points, jnp.float32), jnp.asarray(table, jnp.float32), 4)
    assert rel_rms(got, wanted) < 1e-5
    assert resolutions(2, 16, 4) == [2, 4, 8, 16] and resolutions(3, 9, 1) == [3]


@pytest.mark.slow
def test_a_point_goes_to_its_likeliest_expert():
    model = HashExperts(experts=((2, 4), (4, 8)), gate=(2, 4), levels=2)
    points = jnp.asarray(RNG.uniform(size=(9, 3)), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), points)["params"]
    params = jax.tree.map(lambda s: RNG.normal(size=s.shape).astype(np.float32), shapes)
    values, probs = jax.jit(model.apply)({"params": params}, points)
    chosen = np.argmax(np.asarray(probs), axis=1)
    assert set(chosen) == {0, 1}
    for n, i in enumerate(chosen):
        p = params[f"expert_{i}"]
        features = [
            interpolated(points[n : n + 1], p[f"table_{level}"], side)
            for level, side in enumerate(((2, 4), (4, 8))[i])
        ]
        h = np.maximum(dense(np.concatenate(features, axis=1), p["hidden"]), 0)
        assert np.allclose(values[n], probs[n, i] * dense(h, p["out"])[0], rtol=1e-4, atol=1e-5)
    counts = np.bincount(chosen, minlength=2) / 9
    assert np.isclose(balance_loss(probs), 2 * (counts * np.asarray(probs).mean(0)).sum())


def test_ranking_quality():
    clicks = np.asarray([0, 1, 0, 1.0])
    assert click_through.ranking_quality([0.1, 0.4, 0.2, 0.9], clicks) == 1.0
    assert click_through.ranking_quality([0.9, 0.4, 0.2, 0.1], clicks) == 0.25


@pytest.mark.slow
def test_clicks_are_learned():
    lines = click_through.run(steps=1500)
    best, *learned = (float(line.rpartition(" ")[2]) for line in lines)
    assert best - 0.1 < min(learned) and max(learned) <= best + 0.01


@pytest.mark.slow
def test_experts_share_a_scene():
    lines = scene.run(steps=400)
    errors = [float(line.split("RMS error ")[1].split(";")[0]) for line in lines]
    assert errors[2] < errors[0]


@pytest.mark.slow
def test_masks_keep_earlier_tasks():
    """With masks no task is forgotten; without them the first one is."""
    kept, forgotten = (
        [float(x) for x in re.findall(r"(\d+)%", line)] for line in continual.run(steps=400)
    )
    assert all(abs(kept[i] - kept[i + 1]) <= 2 and kept[i] > 60 for i in (0, 2, 4))
    assert forgotten[0] - forgotten[1] > 5


def test_systems_and_their_families():
    """A step of the Runge-Kutta rule on x' = x, to fourth order; what agreement counts."""
    step = families.runge_kutta(lambda x: x, np.ones(1), 0.1)
    assert abs(step[0] - np.exp(0.1)) < 1e-7
    family = np.array([0, 0, 1, 1])
    assert families.agreement(np.array([1, 2, 0, 0]), family) == 1.0
    assert families.agreement(np.array([0, 0, 0, 1]), family) == 0.75


@pytest.mark.slow
def test_a_fitted_gate_tells_families_apart():
    lines = families.run(1000)
    errors = [float(x) for line in lines for x in re.findall(r"(?:field|systems) (0\.\d+)", line)]
    assert max(errors) < 0.2
    assert int(re.findall(r"apart (\d+)%", lines[1])[0]) >= 75


@pytest.mark.slow
def test_a_local_network_helps_a_frozen_one():
    everybody, user, _ = customization.run(600)
    accuracies = [[float(x) for x in re.findall(r"([\d.]+)%", line)] for line in (everybody, user)]
    for of_global, _, fresh, _ in accuracies:
        assert fresh == of_global
    assert accuracies[0][3] > accuracies[0][0] - 10
    assert accuracies[1][3] > accuracies[1][0] + 50


def test_the_command_says_what_it_wants(capsys):
    assert main(["clicks"]) == 2
    known = "click_through, scene, continual, families, customization"
    assert capsys.readouterr().err == f"error: name: got 'clicks', expected one of {known}\n"
    assert main(["scene", "--steps=0"]) == 2
    assert capsys.readouterr().err == "error: --steps: got 0, expected at least 1\n"
