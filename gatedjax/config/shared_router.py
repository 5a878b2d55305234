"""The configuration of one router for all sparse layers, which stands before the first of them."""

from dataclasses import dataclass

from gatedjax.config.checks import Checked, Size, SizeOrZero


@dataclass(frozen=True)
class SharedRouterConfig(Checked):
    """A small causal model of the tokens alone, which chooses one expert for all layers (Read-ME,
    arXiv 2410.19123).

    It is of layers with `router.selection` "given". The choice has no gradient: it never trains
    (python -m gatedjax.split_experts learns it). Off without layers.
    """

    num_layers: SizeOrZero = 0
    # of its attention, as many of queries as of keys
    num_heads: Size = 4
    head_dim: Size = 16
    # of its gated MLPs
    hidden: Size = 128
