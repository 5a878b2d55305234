"""Which parameters train. The others are frozen, to the bit: gradients are taken with respect to
those that train alone, and the optimizer knows of no others, nor keeps anything for them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from gatedjax.config import Config
from gatedjax.config.patterns import matches_any, sides, unmatched
from gatedjax.errors import require
from gatedjax.layers import low_rank
from gatedjax.layers.moe.shared_router import NAME as SHARED_ROUTER
from gatedjax.layers.tree import Path, divided, flatten_dict

# A parameter of this name never trains: the dense weights of a `LoRAMixture`. Nor do those of a
# router before all layers, whose choice has no gradient.
FROZEN = "frozen"
# Names in a message.
SHOWN = 5


def split(
    config: Config,
    params: Mapping[str, Any],
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """(those that train, those that are frozen) of a model's parameters; {} for none."""
    return divided(params, lambda path: is_trainable(config, path))


def is_trainable(config: Config, path: Path) -> bool:
    """Whether the parameter trains, by its name alone."""
    if _never_trains(path):
        return False
    patterns = config.optim.trainable
    has_updates = config.model.lora.rank > 0
    # Of mixtures the patterns say all: once experts have trained, what weights them trains alone.
    always = not (patterns and config.model.lora.num_experts)
    if has_updates and always and low_rank.is_update(path):
        return True
    if not patterns:
        return not has_updates
    return matches_any(patterns, ".".join(path))


def _never_trains(path: Path) -> bool:
    return path[-1] == FROZEN or path[0] == SHARED_ROUTER


def require_names(config: Config, params: Mapping[str, Any]) -> None:
    """InputError if a pattern of the configuration holds for nothing that it could be about.

    Args:
      config: of the run.
      params: of the model, without the state of routers: arrays or their shapes.
    """
    low_rank.require_targets(config.model.lora, params)
    names = [".".join(path) for path in flatten_dict(params) if not _never_trains(path)]
    _require_match("config.optim.trainable", config.optim.trainable, names)
    trained, _ = split(config, params)
    names = [".".join(path) for path in flatten_dict(trained)]
    rules = config.optim.lr_by_name
    _require_match("config.optim.lr_by_name", [sides(rule)[0] for rule in rules], names)


def _require_match(key: str, patterns: Iterable[str], names: list[str]) -> None:
    pattern = unmatched(patterns, names)
    known = ", ".join(names[:SHOWN])
    require(pattern is None, key, pattern, f"a pattern of parameters that train, such as {known}")
