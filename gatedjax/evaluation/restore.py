"""From a run directory back to a configuration and parameters: what eval.py and generate share."""

import math
import os

import jax

from gatedjax.config import from_config_dict
from gatedjax.data import load_tokenizer
from gatedjax.errors import InputError
from gatedjax.training.checkpoint import Checkpointer, read_config
from gatedjax.training.run import Run, prepare
from gatedjax.training.step import params_for_evaluation


def restore_params(directory: str) -> tuple[Run, dict]:
    """A run, as its checkpoint describes it, and the parameters of its newest intact checkpoint.

    The mesh is this machine's (all devices on the data axis), not the one that it was trained on.

    Raises:
      InputError: no checkpoint there, none intact, or a vocabulary that is not the tokenizer's.
    """
    config = from_config_dict({**read_config(directory), "mesh": {}})
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise InputError(
            f"config.model.vocab_size: the checkpoint has {config.model.vocab_size} entries, "
            f"the tokenizer {config.data.tokenizer!r} has {tokenizer.vocab_size}"
        )
    run = prepare(config)
    require_room(run)
    with Checkpointer(directory, read_only=True) as checkpointer, jax.set_mesh(run.mesh):
        restored = checkpointer.restore_latest(run.abstract)
    if restored is None:
        raise InputError(f"--checkpoint: {directory} holds no checkpoint")
    return run, jax.jit(params_for_evaluation)(restored.state)


def require_room(run: Run) -> None:
    """InputError if a device could not hold the state: a checkpoint from elsewhere may claim any size.

    Compressed on disk, a terabyte of zeros is small. Nothing has been read when this is asked.
    """
    size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    needed = sum(map(size, jax.tree.leaves(run.abstract)))
    device = jax.local_devices()[0]
    there = (device.memory_stats() or {}).get("bytes_limit")
    if there is None and device.platform == "cpu":
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if there is not None and needed > there:
        raise InputError(
            f"--checkpoint: its state takes {needed / 2**30:,.1f} GiB a device, there are {there / 2**30:,.1f} GiB"
        )
