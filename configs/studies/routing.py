"""What keeps experts in use, and what it costs: routers and rules of balance on the same small
model.

    python -m gatedjax.study configs/studies/routing.py [--small]

Every second layer has 8 experts of which 2 work on a token. load_max_over_mean is 1 at perfect
balance and 4 if two experts do everything. Published: a loss over the global batch leaves experts
freer to specialize than one over a shard's tokens (arXiv 2501.11873); a bias balances without any
loss (2408.15664).
"""

from gatedjax.config import from_config_dict, layer
from gatedjax.study import Cell, Picture, Study
from gatedjax.study.base import attention, text_config

# (weight of the balance loss, values of the router)
ROUTERS = {
    "softmax, nothing": (0.0, {}),
    "softmax, loss": (0.01, {}),
    "softmax, sign bias": (0.0, dict(bias_rule="sign", bias_rate=0.01)),
    "sigmoid, nothing": (0.0, dict(scoring="sigmoid")),
    "sigmoid, loss": (0.01, dict(scoring="sigmoid")),
    "sigmoid, sign bias": (0.0, dict(scoring="sigmoid", bias_rule="sign", bias_rate=0.01)),
    "sigmoid, PID bias": (0.0, dict(scoring="sigmoid", bias_rule="pid")),
    "selected logits, loss": (0.01, dict(weighting="selected")),
    "annealed, loss": (0.01, dict(temperature=4.0, final_temperature=1.0, anneal_steps=200)),
}
IN_SMALL = ("softmax, nothing", "softmax, loss", "sigmoid, sign bias")


def get_study(small: bool) -> Study:
    cells = []
    for name in IN_SMALL if small else ROUTERS:
        weight, values = ROUTERS[name]
        c = text_config({"attention": attention()}, 250)
        c.model.ffns = {
            "mlp": c.model.ffns.mlp,
            "moe": layer(
                "sparse_moe", num_experts=8, experts_per_token=2, hidden=96, balance_loss=weight
            ),
        }
        c.model.ffns.moe.router.update(values)
        c.model.ffn_pattern = ("mlp", "moe")
        cells.append(Cell({"router": name}, from_config_dict(c)))
    return Study(
        title="Routers: loss and balance",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1),
        measures=("validation", "routing"),
        columns=("bits_per_byte", "load_max_over_mean", "balance_loss"),
        pictures=(Picture("router", "bits_per_byte"), Picture("router", "load_max_over_mean")),
    )
