"""A permuted model computes the same and is found again; transport is Sinkhorn's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gatedjax
from gatedjax.config import config_dict, from_config_dict, layer
from gatedjax.evidence import rebasin
from gatedjax.layers.tree import flatten_dict, unflatten_dict
from gatedjax.training.state import init_params, param_axes


def model_config(**options):
    c = config_dict()
    c.model.vocab_size = 11
    c.model.width = 8
    c.model.num_layers = 2
    c.model.mixers = {
        "a": layer("gated_attention", **dict(num_heads=3, num_kv_heads=3, head_dim=4) | options)
    }
    c.model.pattern = ("a",)
    c.model.ffns = {
        "mlp": layer("gated_mlp", hidden=6),
        "moe": layer("sparse_moe", num_experts=3, experts_per_token=2, hidden=5),
    }
    c.model.ffn_pattern = ("mlp", "moe")
    c.model.dtype = "float32"
    return from_config_dict(c).model


@functools.cache
def groups():
    shapes = jax.eval_shape(functools.partial(init_params, model_config()), jax.random.key(0))
    axes = flatten_dict(param_axes(shapes))
    rng = np.random.default_rng(0)
    sizes = flatten_dict(
        jax.tree.map(lambda x: x.shape, jax.tree.map(np.asarray, _unboxed(shapes)))
    )
    arrays = {path: rng.normal(size=size) for path, size in sizes.items()}
    return rebasin.groups_of(axes), arrays


def _unboxed(shapes):
    leaves = jax.tree.map(
        lambda x: np.zeros(x.value.shape),
        shapes,
        is_leaf=lambda x: hasattr(x, "names"),
    )
    return leaves


def random_maps(found, arrays, seed=1):
    rng = np.random.default_rng(seed)
    maps = {}
    for name, of_group in rebasin.identity(found, arrays).items():
        size = len(of_group.units)
        hidden = of_group.hidden
        if hidden is not None:
            width = hidden.shape[-1]
            shuffled = [np.eye(width)[rng.permutation(width)] for _ in range(size * size)]
            hidden = np.stack(shuffled).reshape(hidden.shape)
        maps[name] = rebasin.Map(np.eye(size)[rng.permutation(size)], hidden)
    return maps


def test_groups_are_the_axes_without_an_order():
    found, _ = groups()
    parts = {name.rsplit("/", 1)[-1] for name in found}
    assert parts == {"residual", "heads", "units", "experts"} and len(found) == 5
    residual = {place.path for place in found["residual"]}
    assert ("embedding",) in residual and ("final_norm", "scale") in residual


def test_a_permuted_model_is_found_again():
    found, arrays = groups()
    moved = rebasin.moved(arrays, found, random_maps(found, arrays))
    assert any(not np.array_equal(moved[path], arrays[path]) for path in arrays)
    back = rebasin.moved(moved, found, rebasin.matched(arrays, moved, found))
    for path in arrays:
        np.testing.assert_allclose(back[path], arrays[path], atol=1e-12)
    # Transport with little softness is the same permutation.
    soft = rebasin.moved(moved, found, rebasin.matched(arrays, moved, found, 0.02))
    for path in arrays:
        np.testing.assert_allclose(soft[path], arrays[path], atol=1e-3)


@pytest.mark.slow
def test_a_permuted_model_computes_the_same():
    found, arrays = groups()
    moved = rebasin.moved(arrays, found, random_maps(found, arrays))
    model = gatedjax.LanguageModel(model_config())
    tokens = jnp.arange(8)[None] % 11

    def output(of):
        params = unflatten_dict({path: np.float32(x) for path, x in of.items()})
        hidden = model.apply({"params": params}, tokens)[0]
        return hidden @ params["embedding"].T

    np.testing.assert_allclose(output(moved), output(arrays), rtol=2e-4, atol=2e-4)


def test_grouped_heads_are_refused():
    config = model_config(num_kv_heads=1)
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    arrays = flatten_dict(_unboxed(shapes))
    found = rebasin.groups_of(flatten_dict(param_axes(shapes)))
    with pytest.raises(ValueError, match=r"heads: got .*, expected axes of one size"):
        rebasin.identity(found, arrays)


def test_sinkhorn_is_the_closed_form_of_two_units():
    """Of [[a, b], [c, d]]: P = [[p, 1 - p], [1 - p, p]], p / (1 - p) = exp((a + d - b - c) / 2)."""
    logits = np.array([[1.0, 0.3], [-0.2, 0.7]])
    p = 1 / (1 + np.exp(-(1.0 + 0.7 - 0.3 + 0.2) / 2))
    np.testing.assert_allclose(rebasin.sinkhorn(logits), [[p, 1 - p], [1 - p, p]], rtol=1e-12)
    plan = rebasin.sinkhorn(np.random.default_rng(0).normal(size=(5, 5)))
    np.testing.assert_allclose(plan.sum(axis=0), 1)
    np.testing.assert_allclose(plan.sum(axis=1), 1)


def test_a_barrier_is_what_is_above_the_line():
    a, b = {("w",): np.array([-1.0])}, {("w",): np.array([1.0])}
    height, losses = rebasin.barrier(a, b, lambda of: float(1 - of[("w",)][0] ** 2 + of[("w",)][0]))
    assert height == pytest.approx(1.0) and losses[0] == -1 and losses[-1] == 1
