"""A folder of the hub as a run of ours: its configuration, its tokenizer, what it carries along.

`import_hf` is the command.
"""

import collections
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from gatedjax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from gatedjax.data import load_tokenizer
from gatedjax.data.tokenizer import FILE_NAME as TOKENIZER_FILE
from gatedjax.data.tokenizer import Tokenizer
from gatedjax.errors import InputError
from gatedjax.interop import checkpoint
from gatedjax.interop.hf_config import HFConfig, dtype_of
from gatedjax.interop.record import CARRIED, FOLDER, Record, write_record
from gatedjax.interop.safetensors import read_json
from gatedjax.training import identity
from gatedjax.training.memory import require_memory
from gatedjax.training.run import Run, prepare

# Layers that are traced one by one, at most; layers that repeat are traced once.
_MOST_TRACED_LAYERS = 1024
# Rows that evaluation takes, where the model allows them.
_LONGEST_ROWS = 1024
_LARGEST_TOKENIZER_CONFIG = 10_000_000


def run_of(
    described: checkpoint.Described,
    data: DataConfig,
    dtype: str | None,
    mesh: MeshConfig | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Run:
    """The run that the checkpoint becomes: shapes and places, nothing allocated.

    Args:
      described: config.json.
      data: with the tokenizer.
      dtype: of activations; None for that of config.json.
      mesh: to place the parameters on; None for copies everywhere.
      devices: that the mesh is of; None for all.

    Raises:
      InputError: a model that no device can hold, or with too many layers of their own.
    """
    model = described.model
    traced = model.period if model.scan_layers else model.num_layers
    if traced > _MOST_TRACED_LAYERS:
        raise InputError(
            f"--from: num_hidden_layers: got {traced:,} layers of their own, "
            f"expected at most {_MOST_TRACED_LAYERS:,}"
        )
    config = Config(
        model=_with_dtype(model, dtype or _dtype_of(described)),
        data=data,
        # No optimizer's state for a model that does not train here: the last norm stands for it.
        optim=OptimConfig(trainable=("final_norm.*",)),
        mesh=mesh or MeshConfig(),
        train=TrainConfig(),
    )
    run = prepare(config, devices)
    try:
        require_memory(run)
    except InputError as error:
        raise InputError(f"--from: {error}") from None
    return run


def _with_dtype(model: ModelConfig, dtype: str) -> ModelConfig:
    # Logits of a large vocabulary are made in pieces.
    changes: dict[str, Any] = {"dtype": dtype, "loss_chunk": _LONGEST_ROWS}
    return dataclasses.replace(model, **changes)


def _dtype_of(described: checkpoint.Described) -> str:
    name = dtype_of(HFConfig(described.values))
    # float16 overflows where bfloat16 does not; its numbers fit float32 to the bit.
    return "float32" if name == "float16" else name


def data_of(
    folder: Path,
    workdir: Path,
    described: checkpoint.Described,
    tokenizer: str | None,
) -> tuple[Tokenizer, DataConfig]:
    """The tokenizer, and the data section that names it where it will lie.

    Args:
      folder: of the checkpoint.
      workdir: of the run.
      described: config.json.
      tokenizer: that the user gives; None for that of the folder.

    Raises:
      InputError: there is none, or it has more entries than the model.
    """
    spec = tokenizer or str(folder / TOKENIZER_FILE)
    if tokenizer is None and not Path(spec).is_file():
        raise InputError(f"--from: {spec} is not there; --tokenizer=FILE names another one")
    found, end_of_document = _tokenizer_of(spec, folder)
    entries = described.model.vocab_size
    if found.vocab_size > entries:
        raise InputError(
            f"--tokenizer: got {found.vocab_size:,} entries, expected at most {entries:,}, "
            "the vocab_size of config.json"
        )
    longest = HFConfig(described.values).size("max_position_embeddings", default=_LONGEST_ROWS)
    return found, DataConfig(
        tokenizer="bytes" if spec == "bytes" else str(workdir / identity.TOKENIZER_FILE),
        end_of_document=end_of_document,
        seq_len=max(2, min(longest, _LONGEST_ROWS)),
    )


def _tokenizer_of(spec: str, folder: Path) -> tuple[Tokenizer, str]:
    """The tokenizer, and its end of a document where that is none of the usual ones."""
    try:
        return load_tokenizer(spec), ""
    except InputError:
        end = _end_token(folder)
        if not end:
            raise
        return load_tokenizer(spec, end), end


def _end_token(folder: Path) -> str:
    """`eos_token` of tokenizer_config.json; "" where there is none."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return ""
    token = read_json(path, _LARGEST_TOKENIZER_CONFIG).get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def carry(
    folder: Path,
    workdir: Path,
    described: checkpoint.Described,
    found: checkpoint.Found,
) -> None:
    """Copies what else is needed to write the model again, and to chat with it."""
    place = workdir / FOLDER
    place.mkdir(exist_ok=True)
    for name in CARRIED:
        source = folder / name
        if source.is_file() and not source.is_symlink():
            shutil.copyfile(source, place / name)
    text = json.dumps(described.values, indent=2, sort_keys=True)
    (place / checkpoint.CONFIG).write_text(text + "\n")
    write_record(place, record_of(described.family.model_type, found))


def record_of(model_type: str, found: checkpoint.Found) -> Record:
    """The family, and the dtypes of the tensors: most have the same one."""
    dtypes = {}
    for parts in found.parts.values():
        dtypes |= {link.tensor: tensor.dtype for link, tensor in parts if tensor is not None}
    counts = collections.Counter(dtypes.values())
    ((usual, _),) = counts.most_common(1)
    others = {name: dtype for name, dtype in dtypes.items() if dtype != usual}
    return Record(model_type, usual, others)
