"""The manifest of a checkpoint: what a step says of itself, checked before its arrays are read.

The manifest is JSON: step, position in the data, what the data are (`identity`), configuration, and
for each array its shape, dtype and digest, under a checksum of the whole. A stranger may have made
it. Before any of it is trusted, its files are plain files of a sensible size, the manifest has the
shape that we give it, and the array store describes the same arrays as the manifest.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from gatedjax import buckets
from gatedjax.config import differing_keys
from gatedjax.errors import InputError
from gatedjax.files import kind_of
from gatedjax.paths import Place, is_bucket
from gatedjax.training.digests import Leaves, describe, digests_of
from gatedjax.training.run_directory import DamagedError

# Counts up with the meaning of a manifest. 1 (without this key): data_index counted batches.
FORMAT = 2

# Files of a step are parsed as a whole, except those of the array store's data. A leaf takes about
# 500 bytes in them.
_DATA_FOLDER = "d"
_LARGEST_DESCRIPTION = 1 << 28
# The array store compresses; what does not compress takes a little more than its bytes.
_STORE_OVERHEAD = 1 << 24

# Groups within groups of a configuration. Ours have six.
_DEEPEST_CONFIG = 32

# What a manifest holds, and of which type.
_BODY_TYPES = {"step": int, "data_index": int, "config": dict, "leaves": dict}
_LEAF_TYPES = {"shape": list, "dtype": str, "digest": str}


def make_manifest(step: int, contents: Mapping[str, Any], leaves: Leaves) -> dict[str, Any]:
    """The manifest of a step that is about to be saved.

    Args:
      step: optimizer steps done.
      contents: what else is saved with the step, as JSON has it: `data_index`, `config` and more.
      leaves: the arrays of the state by name.

    Returns:
      The manifest's body and its checksum.
    """
    digests = digests_of(leaves)
    described = {}
    for name, leaf in leaves.items():
        described[name] = {**describe(leaf), "digest": digests[name]}
    body = {
        "format": FORMAT,
        "step": step,
        **contents,
        "leaves": described,
    }
    return {"body": body, "sha256": _sha256(body)}


def verified_body(manifest: Any, step: int) -> dict[str, Any]:
    """The body of a manifest that was read.

    Raises:
      DamagedError: it is not what was saved, or has not the shape of a manifest. The checksum is no
        secret: it says nothing of who wrote it.
    """
    _require_types("the manifest", manifest, {"body": dict, "sha256": str})
    body = manifest["body"]
    if manifest["sha256"] != _sha256(body):
        raise DamagedError("the manifest does not match its checksum")
    _require_types("the manifest", body, _BODY_TYPES)
    if body["step"] != step:
        raise DamagedError(f"the manifest is of step {body['step']}")
    if body["data_index"] < 0:
        raise DamagedError(f"the manifest has data_index {body['data_index']}")
    if _depth(body["config"]) > _DEEPEST_CONFIG:
        raise DamagedError(f"the configuration is nested more than {_DEEPEST_CONFIG} deep")
    for name, leaf in body["leaves"].items():
        _require_types(f"leaf {name} of the manifest", leaf, _LEAF_TYPES)
        if not all(type(size) is int and size >= 0 for size in leaf["shape"]):
            raise DamagedError(f"leaf {name} of the manifest has no shape")
    return body


def _require_types(what: str, value: Any, types: Mapping[str, type]) -> None:
    if not isinstance(value, dict):
        raise DamagedError(f"{what} is {type(value).__name__}, expected an object")
    for key, expected in types.items():
        if key not in value:
            raise DamagedError(f"{what} has no {key!r}")
        # type(): a bool is an int in Python, but no step.
        if type(value[key]) is not expected:
            kind = type(value[key]).__name__
            raise DamagedError(f"{what} has {kind} under {key!r}, expected {expected.__name__}")


def _depth(value: Any) -> int:
    """How deep groups and lists are nested, counted to a little more than the deepest allowed."""
    level = [value]
    depth = 0
    while level and depth <= _DEEPEST_CONFIG:
        depth += 1
        inner = []
        for entry in level:
            if isinstance(entry, dict):
                inner.extend(entry.values())
            elif isinstance(entry, list):
                inner.extend(entry)
        level = [entry for entry in inner if isinstance(entry, dict | list)]
    return depth


def rows_taken(body: Mapping[str, Any]) -> int:
    """Rows that had been taken from the data, also of a manifest that counted batches."""
    if body.get("format", 1) != 1:
        return body["data_index"]
    train = body["config"].get("train")
    batch_size = train.get("batch_size", 1) if isinstance(train, dict) else 1
    return body["data_index"] * batch_size


def places(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where streams go on; {} of a manifest without them, or of one before there were any."""
    saved = body.get("places")
    return saved if isinstance(saved, dict) else {}


def require_plain_files(step_dir: Place) -> None:
    """DamagedError if a step holds anything but plain files, or a description too large.

    Called before anything of a step is opened: a pipe would never answer, a link leads elsewhere.
    """
    for name, size in _sizes(step_dir).items():
        if not _is_data(name) and size > _LARGEST_DESCRIPTION:
            raise DamagedError(f"{name} has {size:,} bytes")


def _is_data(name: str) -> bool:
    """Whether a file of a step is of the array store's data."""
    return name.split("/")[-2:-1] == [_DATA_FOLDER]


def _sizes(step_dir: Place) -> dict[str, int]:
    """Bytes of every file of a step, by relative name.

    Raises:
      DamagedError: one of them is no plain file.
    """
    if is_bucket(step_dir):
        return buckets.sizes(step_dir)
    mode = os.lstat(step_dir).st_mode
    if not stat.S_ISDIR(mode):
        raise DamagedError(f"the step is {kind_of(mode)}")
    found = {}
    for folder, folders, files in os.walk(step_dir):
        for name in [*folders, *files]:
            path = Path(folder, name)
            status = path.lstat()
            shown = path.relative_to(step_dir).as_posix()
            if stat.S_ISDIR(status.st_mode):
                continue
            if not stat.S_ISREG(status.st_mode):
                raise DamagedError(f"{shown} is {kind_of(status.st_mode)}")
            found[shown] = status.st_size
    return found


def require_orbax_metadata(step_dir: Place) -> None:
    """DamagedError if orbax could not read its own account of a step, which is a plain file."""
    metadata = json.loads((step_dir / "_CHECKPOINT_METADATA").read_bytes())
    if not isinstance(metadata, dict):
        raise DamagedError("_CHECKPOINT_METADATA is no object")
    handlers = metadata.get("item_handlers")
    if not isinstance(handlers, dict | str | None):
        raise DamagedError("_CHECKPOINT_METADATA has no item_handlers")
    for key in ("init_timestamp_nsecs", "commit_timestamp_nsecs"):
        if not isinstance(metadata.get(key), int | None):
            raise DamagedError(f"_CHECKPOINT_METADATA has no {key}")


def require_stored_sizes(step_dir: Place, described: Mapping[str, Any]) -> None:
    """DamagedError if the files of the arrays are larger than what the manifest describes."""
    expected = 0
    for name, leaf in described.items():
        expected += math.prod(leaf["shape"]) * _itemsize(name, leaf["dtype"])
    largest = 2 * expected + _STORE_OVERHEAD
    for name, size in _sizes(step_dir).items():
        if name.startswith("state/") and _is_data(name) and size > largest:
            raise DamagedError(f"{name} has {size:,} bytes, its arrays have {expected:,}")


def _itemsize(name: str, dtype: str) -> int:
    try:
        return jnp.dtype(dtype).itemsize
    except TypeError:
        raise DamagedError(f"leaf {name} of the manifest has no dtype: {dtype[:40]!r}") from None


def require_stored_as_described(stored: Mapping[str, Any], described: Mapping[str, Any]) -> None:
    """DamagedError if the array store does not describe the arrays of the manifest.

    Checked before any array is read: a file from elsewhere could name paths outside its directory,
    or sizes that fill the memory.

    Args:
      stored: by leaf name, what the array store says of itself (orbax's array metadata).
      described: by leaf name, what the manifest says.
    """
    disputed = set(stored) ^ set(described)
    if disputed:
        raise DamagedError(f"arrays and manifest disagree on {', '.join(disputed)}")
    for name, array in stored.items():
        chunk = tuple(array.storage.chunk_shape)
        actual = describe(array)
        expected = {key: described[name][key] for key in actual}
        # A chunk of an empty axis still has one element.
        largest_chunk = [max(length, 1) for length in array.shape]
        is_too_large = any(size > most for size, most in zip(chunk, largest_chunk))
        if array.name != name or actual != expected or is_too_large:
            stored_as = f"{array.name} {show(actual)} in chunks of {chunk}"
            raise DamagedError(f"{name} is stored as {stored_as}")


def require_same_leaves(
    step_dir: Place,
    body: Mapping[str, Any],
    target: Leaves,
    config: Mapping[str, Any],
) -> None:
    """Compares the arrays of a checkpoint with those that the configuration at hand asks for.

    Args:
      step_dir: the step's directory, for the message.
      body: the body of the step's manifest.
      target: by leaf name, the arrays that are asked for.
      config: the configuration at hand; {} if there is none to compare with.

    Raises:
      InputError: names the first leaf that differs, and the keys of the configuration that do.
    """
    saved = body["leaves"]
    for name in dict.fromkeys([*target, *saved]):
        there = show(saved[name]) if name in saved else "nothing"
        expected = show(describe(target[name])) if name in target else "nothing"
        if there == expected:
            continue
        differences = differing_keys(body["config"], config) if config else []
        reasons = [
            f"; {key}: {before!r} there, now {after!r}" for key, before, after in differences
        ]
        if differences:
            reasons.append("; give another --workdir, or --fresh to begin anew")
        raise InputError(
            f"{step_dir} does not fit this configuration: "
            f"{name} is {there} there, expected {expected}{''.join(reasons)}"
        )


def require_same_optimizer(
    step_dir: Place,
    body: Mapping[str, Any],
    config: Mapping[str, Any],
) -> None:
    """InputError if the state of another optimizer would be taken for this one's.

    Two optimizers can keep arrays of the same names and shapes (AdamW and AdaBelief do), and
    schedule-free's parameters lie between two averages by beta1: their numbers would be read, and
    mean something else.
    """
    before = body["config"].get("optim")
    now = config.get("optim")
    if not isinstance(before, dict) or not isinstance(now, dict):
        return
    keys = ["name"]
    if now.get("name") == "schedule_free":
        keys.append("beta1")
    for key in keys:
        if before.get(key) != now.get(key):
            raise InputError(
                f"config.optim.{key}: got {now.get(key)!r}, but the optimizer state in {step_dir} "
                f"is of {before.get(key)!r}; set it back, or give another --workdir"
            )


def require_same_digests(body: Mapping[str, Any], leaves: Leaves) -> None:
    """DamagedError if the bits of an array that was read are not those that were saved."""
    digests = digests_of(leaves)
    for name, digest in digests.items():
        saved = body["leaves"][name]["digest"]
        if digest != saved:
            raise DamagedError(f"{name} is not what was saved (digest {digest}, {saved})")


def show(description: Mapping[str, Any]) -> str:
    """A description in jax's notation, such as float32[8, 16]."""
    shape = ", ".join(map(str, description["shape"]))
    return f"{description['dtype']}[{shape}]"


def _sha256(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
