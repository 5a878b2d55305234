"""The model of a run as a folder of the hub: its family, its config.json, its tensors.

`export_hf` is the command.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from gatedjax.config import Config
from gatedjax.data import load_tokenizer
from gatedjax.data.chat_template import CONFIG_NAME
from gatedjax.errors import InputError
from gatedjax.interop import safetensors
from gatedjax.interop.checkpoint import CONFIG
from gatedjax.interop.families import family_named, fitting_family, require_fits
from gatedjax.interop.families.base import Family
from gatedjax.interop.links import Link
from gatedjax.interop.on_mesh import tensor_of
from gatedjax.interop.record import CARRIED, FOLDER, Record
from gatedjax.interop.safetensors import DTYPES, Planned, read_json
from gatedjax.layers.tree import Path as ParameterPath
from gatedjax.training import identity

_LARGEST_CONFIG = 10_000_000
# Of a carried config.json: what `to_json` says in other words, and what does not hold any more.
_NOT_CARRIED = (
    "auto_map",
    "partial_rotary_factor",
    "quantization_config",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
    "transformers_version",
)


def family_of(
    config: Config,
    record: Record | None,
    name: str | None,
) -> Family:
    """The family to write.

    Args:
      config: of the run.
      record: of its import; None for a run that was not imported.
      name: that the user gives.

    Raises:
      InputError: no such family, or one that does not say all of the model.
    """
    if config.model.lora.rank:
        raise InputError(
            "--checkpoint: has low-rank updates (model.lora): python -m gatedjax.merge_lora first"
        )
    if name is None and record is None:
        return fitting_family(config.model)
    if name is not None:
        family = family_named(name, "--family")
    else:
        assert record is not None
        family = family_named(record.model_type, f"{FOLDER}: model_type")
    require_fits(family, config.model)
    return family


def write_tensors(
    folder: Path,
    family: Family,
    config: Config,
    parameters: Mapping[ParameterPath, Array],
    dtype: np.dtype,
    dtypes: Mapping[str, np.dtype],
    shard_bytes: int = safetensors.SHARD_BYTES,
) -> int:
    """Writes all tensors; on several processes all take part, and the first one writes.

    Args:
      folder: to write to.
      family: whose names and shapes they have.
      config: of the run.
      parameters: by path.
      dtype: of the tensors.
      dtypes: of those that have another one, by name.
      shard_bytes: of a file, at most.

    Returns:
      How many there are.
    """
    links: dict[str, list[Link]] = {}
    for link in family.links(config.model):
        if link.is_absent:
            continue
        links.setdefault(link.tensor, []).append(link)
    plan = []
    for name in sorted(links):
        plan.append(Planned(name, dtypes.get(name, dtype), links[name][0].shape))
    shards = safetensors.in_shards(plan, shard_bytes)
    files = dict(zip(safetensors.file_names(len(shards)), shards))
    for file, planned_here in files.items():
        path = folder / file if jax.process_index() == 0 else Path(os.devnull)
        with safetensors.FileWriter(path, planned_here) as writer:
            for planned in planned_here:
                writer.write(tensor_of(planned, links[planned.name], parameters))
    if len(files) > 1 and jax.process_index() == 0:
        index = json.dumps(safetensors.index_of(files), indent=2)
        (folder / safetensors.INDEX).write_text(index + "\n")
    return len(plan)


def carried_config(run_dir: Path, family: Family) -> dict[str, Any]:
    """config.json that a run was imported with; {} of another family, or of no import."""
    path = run_dir / FOLDER / CONFIG
    if not path.is_file():
        return {}
    values = read_json(path, _LARGEST_CONFIG)
    if values.get("model_type") not in (family.model_type, *family.also):
        return {}
    return {name: value for name, value in values.items() if name not in _NOT_CARRIED}


def config_json(
    family: Family,
    config: Config,
    carried: Mapping[str, Any],
    dtype: np.dtype,
) -> dict[str, Any]:
    """The config.json of the model.

    Args:
      family: that is written.
      config: of the run.
      carried: of the checkpoint that the run was imported from; what the model says wins.
      dtype: of the tensors.
    """
    defaults: dict[str, Any] = {"max_position_embeddings": config.data.seq_len}
    if not carried:
        tokenizer = load_tokenizer(config.data.tokenizer, config.data.end_of_document)
        defaults |= {"eos_token_id": tokenizer.eos_id, "pad_token_id": None}
        defaults["bos_token_id"] = tokenizer.eos_id
    return {
        **defaults,
        **carried,
        **family.to_json(config.model),
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "dtype": str(dtype),
    }


def dtypes_of(
    config: Config,
    record: Record | None,
    given: str | None,
) -> tuple[np.dtype, dict[str, np.dtype]]:
    """The dtype of the tensors, and those that have another one, by name.

    Args:
      config: of the run.
      record: of its import; None for a run that was not imported.
      given: by the user, for all of them.
    """
    if record is None or given is not None:
        name = given or config.model.dtype
        return DTYPES[{"float32": "F32", "bfloat16": "BF16"}[name]], {}
    others = {name: DTYPES[dtype] for name, dtype in record.others.items()}
    return DTYPES[record.dtype], others


def copy_texts(run_dir: Path, folder: Path) -> None:
    """The tokenizer, and what came with it."""
    sources = [run_dir / identity.TOKENIZER_FILE]
    sources += [run_dir / FOLDER / name for name in CARRIED]
    # Of a run that learned conversations: the template that it learned them by.
    sources.append(run_dir / CONFIG_NAME)
    for source in sources:
        # Not a link: it could lead to any file.
        if source.is_file() and not source.is_symlink():
            shutil.copyfile(source, folder / source.name)
