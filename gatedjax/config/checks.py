"""Each dataclass of the configuration checks itself, however it is built: types, ranges, names."""

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from flax.core import FrozenDict

from gatedjax.errors import InputError, require

# Seeds go to jax, numpy and grain; this is the range that all of them take.
LARGEST_SEED = 2**32 - 1


class Checked:
    """Base of the configuration's dataclasses. A value of a wrong type or range raises InputError.

    An int is accepted for a float, a list for a tuple, a dict for a mapping. They are converted,
    so that two configurations that say the same are equal and can be hashed.
    """

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():
            value = converted(hint, getattr(self, name), name)
            # The dataclasses are frozen; this is how their own __init__ assigns, too.
            object.__setattr__(self, name, value)
        self.check()

    def check(self) -> None:
        """Ranges, and which values go together. Called when all types are right."""


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """The annotation of each field of a dataclass, in order."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def is_optional(hint: Any) -> bool:
    """Whether the annotation is `T | None`."""
    return is_union(hint) and types.NoneType in get_args(hint)


def is_union(hint: Any) -> bool:
    """Whether the annotation is `A | B`, however it was written."""
    return get_origin(hint) in (types.UnionType, typing.Union)


def not_none(hint: Any) -> Any:
    """T of the annotation `T | None`."""
    return next(member for member in get_args(hint) if member is not types.NoneType)


def converted(hint: Any, value: Any, name: str) -> Any:
    """The value in the type that its annotation asks for.

    Args:
      hint: the annotation: a scalar type, Literal, tuple[T, ...], Mapping[str, T], a dataclass,
        `T | None` or a union of dataclasses.
      value: what was given.
      name: what the error calls it.

    Returns:
      The value; a list as a tuple, a mapping as a FrozenDict, an int as a float.

    Raises:
      InputError: the value is not of that type.
    """
    if is_optional(hint):
        return None if value is None else converted(not_none(hint), value, name)
    if is_union(hint):
        expected = " or ".join(member.__name__ for member in get_args(hint))
        require(isinstance(value, get_args(hint)), name, value, expected)
        return value
    origin = get_origin(hint)
    if origin is Literal:
        choices = get_args(hint)
        require(value in choices, name, value, f"one of {', '.join(map(str, choices))}")
        return value
    if origin is tuple:
        return _tuple(get_args(hint)[0], value, name)
    if origin is not None:
        return _mapping(get_args(hint)[1], value, name)
    return _scalar(hint, value, name)


def _tuple(hint: Any, value: Any, name: str) -> tuple:
    # A string is a sequence too, but `pattern="attention"` is a mistake.
    is_sequence = isinstance(value, list | tuple)
    require(is_sequence, name, value, f"a tuple of {hint.__name__}")
    return tuple(converted(hint, item, f"{name}[{i}]") for i, item in enumerate(value))


def _mapping(hint: Any, value: Any, name: str) -> FrozenDict:
    require(isinstance(value, Mapping), name, value, "named entries")
    entries = {}
    for key, item in value.items():
        require(isinstance(key, str), name, key, "names that are strings")
        entries[key] = converted(hint, item, f"{name}.{key}")
    return FrozenDict(entries)


def _scalar(hint: type, value: Any, name: str) -> Any:
    # bool is an int in Python, but `steps=True` is a mistake; an int is a fine float.
    is_bool = isinstance(value, bool)
    if hint is float and isinstance(value, numbers.Real) and not is_bool:
        require(math.isfinite(value), name, value, "a finite float")
        return float(value)
    if hint is int and isinstance(value, numbers.Integral) and not is_bool:
        return int(value)
    if hint in (int, float) or not isinstance(value, hint):
        raise InputError(f"{name}: got {value!r}, expected {hint.__name__}")
    return value


def at_least(config: Any, minimum: float, *names: str) -> None:
    """InputError unless each of these fields is `minimum` or more."""
    for name in names:
        value = getattr(config, name)
        require(value >= minimum, name, value, f"at least {minimum}")


def above_zero(config: Any, *names: str) -> None:
    """InputError unless each of these fields is above 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, name, value, "above 0")


def none_or_at_least(config: Any, minimum: float, *names: str) -> None:
    """InputError unless each of these fields is None, or `minimum` or more."""
    for name in names:
        value = getattr(config, name)
        is_fine = value is None or value >= minimum
        require(is_fine, name, value, f"at least {minimum}, or None")


def fractions(config: Any, *names: str) -> None:
    """InputError unless each of these fields is between 0 and 1, both included."""
    for name in names:
        value = getattr(config, name)
        require(0.0 <= value <= 1.0, name, value, "a fraction between 0 and 1")


def below_one(config: Any, *names: str) -> None:
    """InputError unless each of these fields is 0 or more and below 1."""
    for name in names:
        value = getattr(config, name)
        require(0.0 <= value < 1.0, name, value, "a fraction from 0 to below 1")


def divides(name: str, part: int, whole: int) -> None:
    """InputError unless `part` divides `whole`."""
    require(part >= 1 and whole % part == 0, name, part, f"a divisor of {whole}")


def seed(config: Any) -> None:
    """InputError unless the field `seed` is one that all random generators take."""
    value = config.seed
    require(0 <= value <= LARGEST_SEED, "seed", value, f"between 0 and {LARGEST_SEED}")
