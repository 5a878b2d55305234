"""ConfigDict, flags and JSON on one side, the frozen dataclasses on the other. ConfigDict stops here.

A file in `configs/` returns `config_dict()` with some values changed, absl flags override single values
(`--config.optim.lr=3e-4`), and `from_config_dict` turns the result into a `Config` or names the key that is wrong.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from flax.core import FrozenDict
from ml_collections import ConfigDict
from ml_collections import config_dict as ml_config_dict

from gatedjax.config.layers import FEED_FORWARDS, MIXERS, FeedForwardConfig, MixerConfig
from gatedjax.config.moe import RouterConfig
from gatedjax.config.run import Config
from gatedjax.errors import InputError


def config_dict() -> ConfigDict:
    """All defaults, as the ConfigDict that a file in `configs/` changes and returns."""
    return _to_config_dict(Config())


def layer(kind: str, **values: Any) -> ConfigDict:
    """A mixer or a feed-forward of this kind, with `values` over its defaults: an entry of `mixers` or `ffns`.

    A group of values is a dict over the group's defaults: `layer("sparse_moe", router={"scoring": "sigmoid"})`.
    """
    kinds = MIXERS | FEED_FORWARDS
    if kind not in kinds:
        raise InputError(f"kind: {kind!r} is unknown{_nearest(kind, kinds)}")
    result = _to_config_dict(kinds[kind]())
    for name, value in values.items():
        if name not in result:
            raise InputError(f"{kind}.{name}: unknown key{_nearest(name, result)}")
        if isinstance(result[name], ConfigDict):
            for inner, v in value.items():
                if inner not in result[name]:
                    raise InputError(
                        f"{kind}.{name}.{inner}: unknown key{_nearest(inner, result[name])}"
                    )
                result[name][inner] = v
        else:
            result[name] = value
    return result


def from_config_dict(raw: Mapping[str, Any]) -> Config:
    """Checks every key and type and returns the frozen configuration.

    Raises:
      InputError: one line naming the key, what came and what was expected; for an unknown key, the nearest known one.
    """
    return _build(Config, raw, "config")


def to_dict(config: Any) -> Any:
    """A configuration as plain dicts, lists and scalars, ready for JSON; `from_config_dict` is its inverse."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {name: to_dict(value) for name, value in config.items()}
    return list(config) if isinstance(config, tuple) else config


def differing_keys(a: Any, b: Any, path: str = "config") -> list[str]:
    """The dotted keys at which two `to_dict` results differ."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        names = list(a) + [n for n in b if n not in a]
        return [key for n in names for key in differing_keys(a.get(n), b.get(n), f"{path}.{n}")]
    return [] if a == b else [f"{path}: {a!r} and {b!r}"]


def nearest_key(key: str) -> str:
    """For a dotted key such as `model.widht` that the configuration does not have: "; did you mean ...?", or ""."""
    group, _, name = key.rpartition(".")
    if group.startswith(("model.mixers.", "model.ffns.")):
        kinds = [*MIXERS.values(), *FEED_FORWARDS.values(), RouterConfig]
        return _nearest(
            name, dict.fromkeys(f.name for kind in kinds for f in dataclasses.fields(kind))
        )
    return _nearest(key, [k for k, _ in _leaves(to_dict(Config()))])


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _leaves(tree: Any, path: str = ""):
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _leaves(value, f"{path}.{name}" if path else name)
    else:
        yield path, tree


def _to_config_dict(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        hints = get_type_hints(type(value))
        result = ConfigDict()
        for f in dataclasses.fields(value):
            v = getattr(value, f.name)
            # A value that may be None keeps its type for the flags: --config....window=128 parses as int.
            typed_none = ml_config_dict.placeholder
            result[f.name] = (
                typed_none(_optional_of(hints[f.name])) if v is None else _to_config_dict(v)
            )
        return result
    if isinstance(value, Mapping):
        return ConfigDict({name: _to_config_dict(v) for name, v in value.items()})
    return value


def _optional_of(hint: Any) -> type:
    return next(t for t in get_args(hint) if t is not types.NoneType)


def _build(cls: type, raw: Any, path: str) -> Any:
    if not isinstance(raw, Mapping | ConfigDict):
        raise InputError(f"{path}: got {raw!r}, expected a group of keys")
    hints = get_type_hints(cls)
    for name in raw:
        if name not in hints:
            raise InputError(f"{path}.{name}: unknown key{_nearest(name, hints)}")
    values = {name: _convert(hints[name], raw[name], f"{path}.{name}") for name in raw}
    try:
        return cls(**values)
    except InputError as e:
        raise InputError(f"{path}.{e}" if not str(e).startswith("config.") else str(e)) from None


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as the annotation `hint` wants it, or InputError."""
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path)
    if origin is Literal:
        if value not in args:
            raise InputError(f"{path}: got {value!r}, expected one of {', '.join(map(str, args))}")
        return value
    if hint in (MixerConfig, FeedForwardConfig):
        return _build_kind({c.kind: c for c in args}, value, path)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(_optional_of(hint), value, path)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise InputError(f"{path}: got {value!r}, expected a tuple of {args[0].__name__}")
        return tuple(_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping | ConfigDict):
            raise InputError(f"{path}: got {value!r}, expected named entries")
        return FrozenDict(
            {name: _convert(args[1], value[name], f"{path}.{name}") for name in value}
        )
    return _scalar(hint, value, path)


def _build_kind(kinds: Mapping[str, type], raw: Any, path: str) -> Any:
    kind = raw.get("kind") if isinstance(raw, Mapping | ConfigDict) else None
    if kind not in kinds:
        raise InputError(f"{path}.kind: got {kind!r}, expected one of {', '.join(kinds)}")
    return _build(kinds[kind], raw, path)


def _scalar(hint: type, value: Any, path: str) -> Any:
    # bool is an int in Python, but `steps=True` is a mistake; an int is a fine float.
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise InputError(f"{path}: {value!r} is {type(value).__name__}, expected {hint.__name__}")
    return value
