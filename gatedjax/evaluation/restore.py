"""From a run directory back to a configuration and parameters: for eval.py and generate."""

import math
import os

import jax
from jaxtyping import PyTree

from gatedjax.config import from_config_dict
from gatedjax.data import load_tokenizer
from gatedjax.errors import InputError
from gatedjax.training.checkpoint import Checkpointer, read_config
from gatedjax.training.run import Run, prepare
from gatedjax.training.step import params_for_evaluation


def restore_params(directory: str | os.PathLike) -> tuple[Run, PyTree]:
    """A run, as its checkpoint describes it, and the parameters of its newest intact checkpoint.

    The mesh is this machine's (all devices on the data axis), not the one that it was trained on.

    Raises:
      InputError: no checkpoint there, none intact, or a vocabulary that is not the tokenizer's.
    """
    saved = {**read_config(directory), "mesh": {}}
    config = from_config_dict(saved)
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise InputError(
            f"config.model.vocab_size: the checkpoint has {config.model.vocab_size} entries, "
            f"the tokenizer {config.data.tokenizer!r} has {tokenizer.vocab_size}"
        )
    run = prepare(config)
    require_memory(run)
    with Checkpointer(directory, read_only=True) as checkpointer, jax.set_mesh(run.mesh):
        restored = checkpointer.restore_latest(run.abstract)
    if restored is None:
        raise InputError(f"--checkpoint: {directory} holds no checkpoint")
    return run, jax.jit(params_for_evaluation)(restored.state)


def require_memory(run: Run) -> None:
    """InputError if a device could not hold the state: a checkpoint may claim any size.

    Compressed on disk, a terabyte of zeros is small. Nothing has been read when this is asked.
    """
    needed = sum(_bytes_on_a_device(x) for x in jax.tree.leaves(run.abstract))
    available = _device_memory()
    if available is None or needed <= available:
        return
    state = f"its state takes {needed / 2**30:,.1f} GiB a device"
    raise InputError(f"--checkpoint: {state}, there are {available / 2**30:,.1f} GiB")


def _bytes_on_a_device(x: jax.ShapeDtypeStruct) -> int:
    assert x.sharding is not None, "the abstract state is placed"
    shard = x.sharding.shard_shape(x.shape)
    return math.prod(shard) * x.dtype.itemsize


def _device_memory() -> int | None:
    """Bytes of a device, None if it does not say."""
    device = jax.local_devices()[0]
    statistics = device.memory_stats() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"]
    if device.platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
