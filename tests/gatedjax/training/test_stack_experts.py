"""PHATGOOSE's experts of several runs, stacked."""

from pathlib import Path

import numpy as np
import pytest
from tiny_run import plain, replace

from gatedjax.config import LoRAMixtureConfig
from gatedjax.errors import InputError
from gatedjax.layers.moe.lora import phatgoose_weights
from gatedjax.training.stacked_experts import stacked, stacked_config

RNG = np.random.default_rng(0)
PLACES = [Path("a"), Path("b"), Path("c")]


def config(**changes):
    mixture = LoRAMixtureConfig(hidden=8, num_experts=1, rank=2, gate="sigmoid", **changes)
    return plain(model__ffns__mlp=mixture)


def parameters(base: float = 1.0):
    shapes = {"lora_a": (3, 1, 4, 2), "lora_b": (3, 1, 2, 8), "gates": (3, 1, 4)}
    flat = {
        ("periods", "layer_0", "ffn", "up", name): RNG.normal(size=s) for name, s in shapes.items()
    }
    return flat | {("periods", "layer_0", "ffn", "up", "frozen"): np.full((3, 4, 8), base)}


def test_experts_keep_their_order():
    runs = [parameters() for _ in PLACES]
    result = stacked(runs, PLACES)
    for path, x in result.items():
        if path[-1] == "frozen":
            np.testing.assert_array_equal(x, runs[0][path])
            continue
        assert x.shape[1] == 3
        for i, run in enumerate(runs):
            np.testing.assert_array_equal(x[:, i], run[path][:, 0].astype(np.float32))


def test_another_base_is_refused():
    with pytest.raises(InputError, match=r"got another periods\.layer_0\.ffn\.up\.frozen in b"):
        stacked([parameters(), parameters(2.0)], PLACES[:2])


def test_the_configuration_of_all():
    whole = stacked_config([config()] * 3, PLACES, top=2).model.ffns["mlp"]
    assert (whole.num_experts, whole.gate, whole.experts_per_token) == (3, "phatgoose", 2)
    with pytest.raises(InputError, match="--top: got 4, expected at most 3"):
        stacked_config([config()] * 3, PLACES, top=4)
    with pytest.raises(InputError, match="another model in b"):
        stacked_config([config(), replace(config(), model__width=48)], PLACES[:2], top=2)
    with pytest.raises(InputError, match="gate: got 'xlora'"):
        other = LoRAMixtureConfig(hidden=8, num_experts=1, rank=2)
        stacked_config([plain(model__ffns__mlp=other)], PLACES[:1], top=1)


def test_routing_of_stacked_gates():
    """The best two by standardized products, a softmax over them: a loop in float64."""
    x, gates = RNG.normal(size=(5, 6)), RNG.normal(size=(3, 6))

    def standard(y):
        return (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)

    found = np.asarray(phatgoose_weights(x, gates, 2))
    for token, row in zip(standard(x), found):
        products = np.array([token @ v for v in standard(gates)]) / np.sqrt(6)
        best = np.argsort(-products)[:2]
        right = np.zeros(3)
        right[best] = np.exp(products[best]) / np.exp(products[best]).sum()
        np.testing.assert_allclose(row, right, atol=1e-6)
