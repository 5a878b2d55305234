"""The low-rank experts of several runs on one model: its configuration and its parameters."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax import Array

from gatedjax.config import Config, LoRAMixtureConfig
from gatedjax.errors import InputError, require
from gatedjax.layers.tree import Path as ParameterPath

# Of an expert's parameter, where the axis of experts is, from the end.
_AXES = {"lora_a": -3, "lora_b": -3, "gates": -2}


def stacked_config(configs: Sequence[Config], places: Sequence[Path], top: int) -> Config:
    """The configuration of the model with all experts.

    Args:
      configs: of the runs.
      places: of the runs, for messages.
      top: experts of a token.

    Raises:
      InputError: models that differ, no experts, gates that were not trained as PHATGOOSE's.
    """
    first = configs[0].model
    counts: dict[str, int] = {}
    for config, place in zip(configs, places):
        for name, ffn in config.model.ffns.items():
            if isinstance(ffn, LoRAMixtureConfig):
                key = f"--runs: {place}: config.model.ffns.{name}.gate"
                require(ffn.gate == "sigmoid", key, ffn.gate, "sigmoid, as configs/phatgoose.py")
                counts[name] = counts.get(name, 0) + ffn.num_experts
        alike = _with_experts(config, dict.fromkeys(counts, 1), "sigmoid", 0).model
        expected = _with_experts(configs[0], dict.fromkeys(counts, 1), "sigmoid", 0).model
        if alike != expected:
            raise InputError(f"--runs: got another model in {place}, expected that of {places[0]}")
    require(bool(counts), "--runs", sorted(first.ffns), "feed-forwards of kind lora_mixture")
    fewest = min(counts.values())
    require(top <= fewest, "--top", top, f"at most {fewest}, the experts of these runs")
    config = _with_experts(configs[0], counts, "phatgoose", top)
    train = dataclasses.replace(config.train, init_from="", init_rename=(), init_fresh=())
    optim = dataclasses.replace(config.optim, trainable=(), lr_by_name=(), ema_decay=0.0)
    return dataclasses.replace(config, train=train, optim=optim)


def _with_experts(config: Config, counts: Mapping[str, int], gate: Any, top: int) -> Config:
    """With so many experts in each mixture.

    Args:
      config: of a run.
      counts: experts by the name of the feed-forward.
      gate: their gate.
      top: experts of a token; 0 for all.
    """
    ffns = dict(config.model.ffns)
    for name, count in counts.items():
        ffn = ffns.get(name)
        if isinstance(ffn, LoRAMixtureConfig):
            changed = {"num_experts": count, "gate": gate, "experts_per_token": top}
            ffns[name] = dataclasses.replace(ffn, **changed)
    model = dataclasses.replace(config.model, ffns=FrozenDict(ffns))
    return dataclasses.replace(config, model=model)


def stacked(
    parameters: Sequence[Mapping[ParameterPath, Array]],
    places: Sequence[Path],
) -> dict[ParameterPath, Array]:
    """The parameters of the model with all experts.

    Args:
      parameters: of the runs, by path.
      places: of the runs, for messages.

    Raises:
      InputError: what is no expert's differs.
    """
    result = {}
    for path, first in parameters[0].items():
        others = [own[path] for own in parameters[1:]]
        if path[-1] in _AXES:
            result[path] = jnp.concatenate([first, *others], axis=_AXES[path[-1]])
            continue
        for other, place in zip(others, places[1:]):
            if not np.array_equal(np.asarray(first), np.asarray(other)):
                name = ".".join(path)
                raise InputError(
                    f"--runs: got another {name} in {place}, expected that of {places[0]}: "
                    "experts are of one frozen model"
                )
        result[path] = first
    return result
