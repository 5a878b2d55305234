"""Nested dicts as flat ones, by path."""

from collections.abc import Callable, Mapping
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


def divided(
    tree: Mapping[str, Any],
    belongs: Callable[[Path], bool],
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """(the leaves whose path belongs, all others): two nested dicts, {} for no leaves."""
    flat = flatten_dict(tree)
    first = {path: leaf for path, leaf in flat.items() if belongs(path)}
    if len(first) == len(flat):
        return tree, {}
    if not first:
        return {}, tree
    second = {path: leaf for path, leaf in flat.items() if path not in first}
    return unflatten_dict(first), unflatten_dict(second)


def united(*trees: Mapping[str, Any]) -> Mapping[str, Any]:
    """The leaves of all: the inverse of `divided`. Of leaves with the same path, the last one."""
    filled = [tree for tree in trees if tree]
    if len(filled) == 1:
        return filled[0]
    flat = {}
    for tree in filled:
        flat |= flatten_dict(tree)
    return unflatten_dict(flat)
