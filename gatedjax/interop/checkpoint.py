"""A folder as the hub has it: its family, its model, and its tensors held to the family's links.

All of it is decided from config.json and the headers of the files: no tensor is read, nothing of a
model's size is allocated. `auto_map`, and code that lies in the folder, is not looked at.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gatedjax.config import ModelConfig
from gatedjax.config.patterns import matches_any, renamed
from gatedjax.errors import InputError, shown
from gatedjax.interop.families import family_named
from gatedjax.interop.families.base import Family
from gatedjax.interop.hf_config import HFConfig
from gatedjax.interop.links import Link, part_shape
from gatedjax.interop.safetensors import DTYPES, Tensor, read_json
from gatedjax.layers.tree import Path as ParameterPath

CONFIG = "config.json"
_LARGEST_CONFIG = 10_000_000
# Names of tensors that an error lists.
_MOST_LISTED = 8
# Tensors of other precisions than numbers of their own: what packs them stands elsewhere.
_EXPECTED_DTYPES = f"one of {', '.join(DTYPES)} (a quantized checkpoint has to be converted first)"

HEAD = "lm_head.weight"


class Described(NamedTuple):
    """What a config.json says.

    values: of the language model; those of a model that sees images too stand in a group.
    """

    family: Family
    model: ModelConfig
    values: Mapping[str, Any]


class Part(NamedTuple):
    """A link, and the tensor that it was found to be; None of one that is not on disk."""

    link: Link
    tensor: Tensor | None


class Found(NamedTuple):
    """The parts of every parameter, and what of the folder is not needed.

    names: tensors that parameters are made of, with the names that they have on disk.
    left_out: names of tensors that are no part of the language model.
    """

    parts: dict[ParameterPath, list[Part]]
    names: dict[str, Tensor]
    left_out: list[str]


def described(folder: Path) -> Described:
    """The family and the model of a folder.

    Raises:
      InputError: no config.json there, an unknown model type, or a value that is not known here.
    """
    path = folder / CONFIG
    values = read_json(path, _LARGEST_CONFIG)
    family = family_named(values.get("model_type", ""), f"{path}: model_type")
    text = values.get("text_config")
    if isinstance(text, dict):
        whole = {"tie_word_embeddings": values.get("tie_word_embeddings")}
        dtype = values.get("dtype") or values.get("torch_dtype")
        values = whole | {"dtype": dtype} | text
    if values.get("quantization_config") is not None:
        expected = "none: a quantized checkpoint has to be converted first"
        raise InputError(f"{path}: quantization_config: expected {expected}")
    config = HFConfig(values, str(path))
    try:
        model = family.to_model(config)
    except InputError as error:
        raise InputError(_of_file(path, str(error))) from None
    return Described(family, model, values)


def _of_file(path: Path, message: str) -> str:
    """The message of a wrong value, with the file that it stands in."""
    return message if message.startswith(str(path)) else f"{path}: makes no model: {message}"


def found(
    family: Family,
    model: ModelConfig,
    tensors: Mapping[str, Tensor],
    wanted: Mapping[ParameterPath, jax.ShapeDtypeStruct],
) -> Found:
    """Every parameter's parts among the tensors of a folder.

    Args:
      family: of the folder.
      model: of the folder.
      tensors: of the folder, by their names on disk.
      wanted: the parameters.

    Raises:
      InputError: a tensor that is missing, has another shape, or that nobody knows, by name.
    """
    on_disk = {renamed(family.renamed, name): name for name in tensors}
    parts: dict[ParameterPath, list[Part]] = {path: [] for path in wanted}
    used = {}
    missing = []
    links = family.links(model)
    if family.links_as_saved is not None:
        shapes = {name: tensors[disk_name].shape for name, disk_name in on_disk.items()}
        links = family.links_as_saved(model, shapes)
    for link in links:
        if link.is_absent:
            parts[link.path].append(Part(link, None))
            continue
        name = next((name for name in (link.tensor, *link.also) if name in on_disk), None)
        if name is None:
            missing.append(link.tensor)
            # Of a config.json that asks for a million experts, not all are looked for.
            if len(missing) > _MOST_LISTED:
                break
            continue
        tensor = tensors[on_disk[name]]
        _require_fits(on_disk[name], tensor, link)
        used[on_disk[name]] = tensor
        parts[link.path].append(Part(link, tensor))
    if missing:
        raise InputError(f"--from: tensors are missing: {_listed(dict.fromkeys(missing))}")
    left_out = []
    unknown = []
    for name, disk_name in on_disk.items():
        if disk_name in used:
            continue
        is_tied_head = name == HEAD and model.tie_embeddings
        is_known = is_tied_head or matches_any(family.left_out, name)
        (left_out if is_known else unknown).append(disk_name)
    if unknown:
        kind = family.model_type
        raise InputError(f"--from: tensors that no {kind} has: {_listed(sorted(unknown))}")
    _require_whole(parts, wanted)
    return Found(parts, used, sorted(left_out))


def _require_fits(name: str, tensor: Tensor, link: Link) -> None:
    if tensor.dtype not in DTYPES:
        expected = _EXPECTED_DTYPES
        raise InputError(f"--from: {shown(name)}: got {tensor}, expected {expected}")
    if tensor.shape != link.shape:
        expected = f"{list(link.shape)} by config.json"
        raise InputError(f"--from: {shown(name)}: got {tensor}, expected {expected}")


def _require_whole(
    parts: Mapping[ParameterPath, list[Part]],
    wanted: Mapping[ParameterPath, jax.ShapeDtypeStruct],
) -> None:
    """InputError unless the parts of every parameter are all of it."""
    for path, parameter in wanted.items():
        covered = 0
        for part in parts[path]:
            covered += math.prod(part_shape(part.link, parameter.shape))
        if covered != parameter.size:
            name = ".".join(path)
            got = f"{covered:,} of its {parameter.size:,} numbers"
            raise InputError(f"--from: {name}: got {got} from the tensors, expected all")


def _listed(names: Iterable[str]) -> str:
    all_names = [shown(name) for name in names]
    text = ", ".join(all_names[:_MOST_LISTED])
    return f"{text} and more" if len(all_names) > _MOST_LISTED else text
