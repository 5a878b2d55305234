"""The manifest of a checkpoint: what a step says of itself, checked before its arrays are read.

The manifest is JSON: step, data position, configuration, and for each array its shape, dtype and
digest, under a checksum of the whole. A checkpoint may come from elsewhere: before any of it is
trusted, its files are plain files of a sensible size, and its array store describes the same arrays
as the manifest.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gatedjax.config import differing_keys
from gatedjax.errors import InputError
from gatedjax.training.digests import Leaves, describe, digests_of
from gatedjax.training.run_directory import DamagedError

# Files of a step that are parsed as a whole. A leaf takes about 500 bytes in them.
_DESCRIPTIONS = ("manifest/metadata", "state/_METADATA", "state/_sharding", "_CHECKPOINT_METADATA")
_LARGEST_DESCRIPTION = 1 << 28


def make_manifest(
    step: int,
    data_index: int,
    config: Mapping[str, Any],
    leaves: Leaves,
) -> dict[str, Any]:
    """The manifest of a step that is about to be saved.

    Args:
      step: optimizer steps done.
      data_index: batches taken from the data iterator.
      config: the resolved configuration, as JSON has it.
      leaves: the arrays of the state by name.

    Returns:
      The manifest's body and its checksum.
    """
    digests = digests_of(leaves)
    described = {}
    for name, leaf in leaves.items():
        described[name] = {**describe(leaf), "digest": digests[name]}
    body = {
        "step": step,
        "data_index": data_index,
        "config": config,
        "leaves": described,
    }
    return {"body": body, "sha256": _sha256(body)}


def verified_body(manifest: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The body of a manifest that was read. Raises DamagedError if it is not what was saved."""
    body = manifest["body"]
    if manifest["sha256"] != _sha256(body) or body["step"] != step:
        raise DamagedError("the manifest does not match its checksum")
    return body


def require_plain_files(step_dir: Path) -> None:
    """DamagedError if a step holds a link that leads elsewhere, or a description too large.

    Called before anything of a step is read.
    """
    for folder, folders, files in os.walk(step_dir):
        for name in [*folders, *files]:
            path = Path(folder, name)
            if path.is_symlink():
                raise DamagedError(f"{path.relative_to(step_dir)} is a link")
    for name in _DESCRIPTIONS:
        path = step_dir / name
        size = path.stat().st_size if path.is_file() else 0
        if size > _LARGEST_DESCRIPTION:
            raise DamagedError(f"{name} has {size:,} bytes")


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
    step_dir: Path,
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
        raise InputError(
            f"{step_dir} does not fit this configuration: "
            f"{name} is {there} there, expected {expected}{''.join(reasons)}"
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
