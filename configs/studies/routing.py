"""What keeps experts in use, and what it costs: routers and rules of balance on one small model.

    python -m gatedjax.study configs/studies/routing.py [--small]

Every second layer has 8 experts of which 2 work on a token. load_max_over_mean is 1 at perfect
balance and 4 if two experts do everything. Published: a loss over the global batch leaves experts
freer to specialize than one over a shard's tokens (arXiv 2501.11873); a bias balances without any
loss (2408.15664).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from gatedjax.config import FrozenDict, from_config_dict, layer
from gatedjax.study import Cell, Picture, Study
from gatedjax.study.base import attention, text_config

STEPS = 250


class Variant(NamedTuple):
    """balance_loss: its weight. router: options of the router."""

    balance_loss: float = 0.0
    router: Mapping[str, Any] = FrozenDict()


VARIANTS = {
    "softmax, nothing": Variant(),
    "softmax, loss": Variant(balance_loss=0.01),
    "softmax, sign bias": Variant(router={"bias_rule": "sign", "bias_rate": 0.01}),
    "sigmoid, nothing": Variant(router={"scoring": "sigmoid"}),
    "sigmoid, loss": Variant(balance_loss=0.01, router={"scoring": "sigmoid"}),
    "sigmoid, sign bias": Variant(
        router={"scoring": "sigmoid", "bias_rule": "sign", "bias_rate": 0.01}
    ),
    "sigmoid, PID bias": Variant(router={"scoring": "sigmoid", "bias_rule": "pid"}),
    "selected logits, loss": Variant(balance_loss=0.01, router={"weighting": "selected"}),
    "annealed, loss": Variant(
        balance_loss=0.01,
        router={"temperature": 4.0, "final_temperature": 1.0, "anneal_steps": 200},
    ),
}
IN_SMALL = ("softmax, nothing", "softmax, loss", "sigmoid, sign bias")


def get_study(small: bool) -> Study:
    """A cell for each variant."""
    cells = []
    for name in IN_SMALL if small else VARIANTS:
        config = from_config_dict(moe_config(VARIANTS[name]))
        cells.append(Cell({"router": name}, config))
    return Study(
        title="Routers: loss and balance",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1),
        measures=("validation", "routing"),
        columns=("bits_per_byte", "load_max_over_mean", "balance_loss"),
        pictures=(Picture("router", "bits_per_byte"), Picture("router", "load_max_over_mean")),
    )


def moe_config(variant: Variant) -> ConfigDict:
    """The text model, with experts in every second layer."""
    c = text_config({"attention": attention()}, STEPS)
    moe = layer(
        "sparse_moe",
        num_experts=8,
        experts_per_token=2,
        hidden=96,
        balance_loss=variant.balance_loss,
    )
    moe.router.update(variant.router)
    c.model.ffns = {"mlp": c.model.ffns.mlp, "moe": moe}
    c.model.ffn_pattern = ("mlp", "moe")
    return c
