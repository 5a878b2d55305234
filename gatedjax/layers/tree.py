"""Nested dicts as flat ones, by path."""

from collections.abc import Mapping
from typing import Any

Path = tuple[str, ...]


def flatten_dict(tree: Mapping[str, Any], path: Path = ()) -> dict[Path, Any]:
    """The leaves of nested dicts, by the keys that lead to them. Empty dicts leave no trace."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten_dict(value, (*path, name))
        else:
            flat[(*path, name)] = value
    return flat


def unflatten_dict(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """Nested dicts: the inverse of `flatten_dict`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *outer, last = path
        inner = tree
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return tree
