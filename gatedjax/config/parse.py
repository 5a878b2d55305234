"""From ConfigDict, flags and JSON to the frozen dataclasses, and back. ConfigDict stops here.

A file in `configs/` returns `config_dict()` with some values changed, absl flags override single
values (`--config.optim.lr=3e-4`), and `from_config_dict` turns the result into a `Config` or names
the key that is wrong.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, get_args, get_origin

from ml_collections import ConfigDict
from ml_collections import config_dict as ml_config_dict

from gatedjax.config.checks import field_types, is_optional, is_union, not_none
from gatedjax.config.layers import FEED_FORWARDS, MIXERS
from gatedjax.config.router import RouterConfig
from gatedjax.config.run import Config
from gatedjax.errors import InputError, require, shown


class Difference(NamedTuple):
    """A dotted key at which two configurations differ."""

    key: str
    before: Any
    after: Any


def config_dict(config: Config | None = None) -> ConfigDict:
    """A configuration as the ConfigDict that a file in `configs/` changes and returns.

    Args:
      config: to begin with; None for all defaults.
    """
    return _to_config_dict(config or Config())


def layer(kind: str, **values: Any) -> ConfigDict:
    """A mixer or a feed-forward of this kind, as an entry of `model.mixers` or `model.ffns`.

    Args:
      kind: a key of `MIXERS` or `FEED_FORWARDS`.
      **values: what differs from the defaults. A group of values is a dict over the defaults of the
        group: `layer("sparse_moe", router={"scoring": "sigmoid"})`.

    Raises:
      InputError: an unknown kind or name, with the nearest known one.
    """
    kinds = MIXERS | FEED_FORWARDS
    if kind not in kinds:
        raise InputError(f"kind: {kind!r} is unknown{_nearest(kind, kinds)}")
    result = _to_config_dict(kinds[kind]())
    _update(result, values, kind)
    return result


def _update(group: ConfigDict, values: Mapping[str, Any], path: str) -> None:
    for name, value in values.items():
        if name not in group:
            raise InputError(f"{path}.{name}: unknown key{_nearest(name, group)}")
        if isinstance(group[name], ConfigDict):
            _update(group[name], value, f"{path}.{name}")
        else:
            group[name] = value


def from_config_dict(raw: Mapping[str, Any] | ConfigDict) -> Config:
    """Checks every key and value and returns the frozen configuration.

    Raises:
      InputError: one line naming the key, what was got and what was expected; for an unknown key,
        the nearest known one.
    """
    return _build(Config, raw, "config")


def to_dict(config: Any) -> Any:
    """A configuration as plain dicts, lists and scalars, ready for JSON.

    `from_config_dict` is its inverse.
    """
    if dataclasses.is_dataclass(config):
        names = [field.name for field in dataclasses.fields(config)]
        return {name: to_dict(getattr(config, name)) for name in names}
    if isinstance(config, Mapping):
        return {name: to_dict(value) for name, value in config.items()}
    return list(config) if isinstance(config, tuple) else config


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of a `to_dict` result with their values; an empty group is a value."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def differing_keys(before: Any, after: Any, path: str = "config") -> list[Difference]:
    """The dotted keys at which two `to_dict` results differ."""
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return [] if before == after else [Difference(path, before, after)]
    differences = []
    for name in dict.fromkeys([*before, *after]):
        differences += differing_keys(before.get(name), after.get(name), f"{path}.{name}")
    return differences


def nearest_key(key: str) -> str:
    """For a dotted key that the configuration does not have, such as `model.widht`.

    Returns: "; did you mean ...?", or "; known: ..." if no key is close.
    """
    group, _, name = key.rpartition(".")
    if not group.startswith(("model.mixers.", "model.ffns.")):
        return _nearest(key, [known for known, _ in flat(to_dict(Config()))])
    # A layer's kind is not known here: its key may be one of any kind.
    kinds = [*MIXERS.values(), *FEED_FORWARDS.values(), RouterConfig]
    known = [field_name for kind in kinds for field_name in field_types(kind)]
    return _nearest(name, dict.fromkeys(known))


def _readable(name: Any) -> str:
    """A key as it is, unless a terminal would act on it: then as Python writes it."""
    if isinstance(name, str) and name.isprintable() and len(name) <= 100:
        return name
    return shown(name)


def _nearest(name: Any, known: Iterable[str]) -> str:
    names = list(known)
    # difflib takes quadratic time; no key is so long.
    name = str(name)[:100]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}"


def _to_config_dict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ConfigDict({name: _to_config_dict(entry) for name, entry in value.items()})
    if not dataclasses.is_dataclass(value):
        return value
    result = ConfigDict()
    for name, hint in field_types(type(value)).items():
        entry = getattr(value, name)
        if entry is None:
            # It keeps its type for the flags: --config....window=128 parses as int.
            result[name] = ml_config_dict.placeholder(not_none(hint))
        else:
            result[name] = _to_config_dict(entry)
    return result


def _build(cls: type, raw: Any, path: str) -> Any:
    """A dataclass from a group of keys. The dataclass checks the values; errors get their path."""
    if not _is_group(raw):
        raise InputError(f"{path}: got {shown(raw)}, expected a group of keys")
    hints = field_types(cls)
    values = {}
    for name in raw:
        if name not in hints:
            raise InputError(f"{path}.{_readable(name)}: unknown key{_nearest(name, hints)}")
        values[name] = _build_groups(hints[name], raw[name], f"{path}.{name}")
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{path}.{error}") from None


def _build_groups(hint: Any, raw: Any, path: str) -> Any:
    """Groups of keys inside a value become dataclasses; anything else stays as it is."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, raw, path)
    if is_union(hint) and not is_optional(hint):
        return _build_kind(get_args(hint), raw, path)
    # Mapping[str, T]. ConfigDict is not a Mapping, so this also makes it one.
    if get_origin(hint) is Mapping and _is_group(raw):
        entry_hint = get_args(hint)[1]
        return {
            name: _build_groups(entry_hint, raw[name], f"{path}.{_readable(name)}") for name in raw
        }
    return raw


def _build_kind(classes: Iterable[Any], raw: Any, path: str) -> Any:
    """One of several dataclasses, by the key `kind`."""
    kinds = {cls.kind: cls for cls in classes}
    kind = raw.get("kind") if _is_group(raw) else None
    # A kind may be anything that JSON can say, a list that has no hash included.
    is_known = isinstance(kind, str) and kind in kinds
    require(is_known, f"{path}.kind", kind, f"one of {', '.join(kinds)}")
    return _build(kinds[kind], raw, path)


def _is_group(raw: Any) -> bool:
    return isinstance(raw, Mapping | ConfigDict)
