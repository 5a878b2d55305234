"""A run directory of parameters that were not made by a run of their own: its step 0."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gatedjax.config import Config, ModelConfig, TeacherConfig, to_dict
from gatedjax.data import load_tokenizer
from gatedjax.errors import InputError
from gatedjax.layers.tree import Path
from gatedjax.paths import Place
from gatedjax.training import given_weights, identity
from gatedjax.training.checkpoint import Checkpointer
from gatedjax.training.run import fresh_state, prepare
from gatedjax.training.step_folders import has_steps


def require_new(workdir: Place, flag: str = "--workdir") -> None:
    """InputError if a run is there already."""
    if has_steps(workdir):
        raise InputError(f"{flag}: got {workdir}, which holds a run, expected a new folder")


def with_model(config: Config, model: ModelConfig) -> Config:
    """The configuration with another model, in a run that starts from no weights but its own."""
    train = dataclasses.replace(
        config.train,
        init_from="",
        init_rename=(),
        init_fresh=(),
        teacher=TeacherConfig(),
    )
    return dataclasses.replace(config, model=model, train=train)


def save(
    workdir: Place,
    config: Config,
    given: Mapping[Path, Any],
    source: str | os.PathLike,
) -> None:
    """Writes it. eval.py, generate and another run's train.init_from take it like any other.

    Args:
      workdir: where to.
      config: of the run.
      given: all parameters, and the state of routers, by path.
      source: a run with the same text and tokenizer, whose record of them is kept.
    """
    run = prepare(config)
    wanted = given_weights.parameters(run)
    with Checkpointer(source, read_only=True) as checkpointer:
        data = checkpointer.manifest().get("data")
    with jax.set_mesh(run.mesh):
        # Copies: the state takes their memory over.
        placed = {
            path: jax.device_put(np.asarray(x), wanted[path].sharding) if path in wanted else x
            for path, x in given.items()
        }
        state = fresh_state(run, placed)
        same = data if isinstance(data, dict) else None
        with Checkpointer(workdir, to_dict(run.config), data=same) as checkpointer:
            checkpointer.save(0, state, data_index=0, wait=True)
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.end_of_document)
    identity.keep_tokenizer(workdir, tokenizer)
    identity.keep_chat_template(workdir, config.data)
