"""A configuration that goes on from a run: its model, its tokenizer and its weights."""

from ml_collections import ConfigDict

from gatedjax.config import config_dict, from_config_dict
from gatedjax.errors import InputError, require
from gatedjax.paths import expand_place
from gatedjax.training import identity
from gatedjax.training.checkpoint import read_config
from gatedjax.training.step_folders import named_step


def config_from_run(init_from: str) -> ConfigDict:
    """All defaults, with the model, the tokenizer and the row length of a run, which
    `train.init_from` names.

    A file in `configs/` changes the rest.

    Args:
      init_from: a run directory, or one step of it, as `train.init_from` takes it.

    Raises:
      InputError: no run there, or low-rank updates in it that are not merged.
    """
    key = "config.train.init_from"
    run_dir, step = named_step(expand_place(init_from, key))
    try:
        saved = from_config_dict({**read_config(run_dir, step), "mesh": {}})
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
    require(
        saved.model.lora.rank == 0,
        key,
        init_from,
        "a run without low-rank updates; gatedjax.merge_lora merges them",
    )
    own = identity.tokenizer_of_run(run_dir, saved.data.tokenizer)
    template = identity.chat_template_of_run(run_dir)
    c = config_dict()
    c.model = config_dict(saved).model
    c.data.tokenizer = own or saved.data.tokenizer
    c.data.end_of_document = saved.data.end_of_document
    c.data.seq_len = saved.data.seq_len
    if template is not None:
        c.data.chat_template = template
    c.train.init_from = init_from
    return c
