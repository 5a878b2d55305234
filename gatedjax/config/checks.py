"""Each dataclass of the configuration checks itself, however it is built: types, ranges, names.

A number's range is part of its annotation: `num_heads: Size = 4`. It is declared there, once;
`Checked` holds values to it and docs/config.md prints it.
"""

import dataclasses
import functools
import math
import numbers
import sys
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
from flax.core import FrozenDict

from gatedjax.errors import require

# Seeds go to jax, numpy and grain; this is the range that all of them take.
LARGEST_SEED = 2**32 - 1
# Of an axis of a parameter, of a row, of a batch: an order of magnitude above any that was built.
LARGEST_SIZE = 2**24
# Of a count that a step carries on the device, as int32.
LARGEST_COUNT = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a number of the configuration may have.

    low, high: its ends; infinity where there is none.
    includes_low, includes_high: whether an end is itself a value.
    words: what an error says is expected; made from the ends where it is empty.
    """

    low: float
    high: float = math.inf
    includes_low: bool = True
    includes_high: bool = True
    words: str = ""

    def __contains__(self, value: float) -> bool:
        low = self.low
        high = self.high
        if isinstance(value, float):
            value, low, high = as_float32(value), as_float32(low), as_float32(high)
        above = value >= low if self.includes_low else value > low
        below = value <= high if self.includes_high else value < high
        return above and below

    def __str__(self) -> str:
        """In words, for an error."""
        if self.words:
            return self.words
        from_low = "at least" if self.includes_low else "above"
        to_high = "at most" if self.includes_high else "below"
        text = f"{from_low} {self.low}"
        if self.high < math.inf:
            text += f" and {to_high} {self.high}"
        return text


def as_float32(value: float) -> float:
    """What becomes of a number on a device: rounded to float32, 0 where that is subnormal.

    A range holds for this: a beta of 1 - 1e-9 is 1 there, an eps of 1e-50 is 0.
    """
    with np.errstate(over="ignore"):
        rounded = np.float32(value)
    if abs(rounded) < np.finfo(np.float32).tiny:
        return 0.0
    return float(rounded)


# The ranges that several keys have. A key with one of its own writes Annotated[int, Range(...)].
Size = Annotated[int, Range(1, LARGEST_SIZE)]
SizeOrZero = Annotated[int, Range(0, LARGEST_SIZE)]
Count = Annotated[int, Range(1, LARGEST_COUNT)]
CountOrZero = Annotated[int, Range(0, LARGEST_COUNT)]
Seed = Annotated[int, Range(0, LARGEST_SEED, words=f"between 0 and {LARGEST_SEED}")]
Positive = Annotated[float, Range(0, includes_low=False)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1, words="a fraction between 0 and 1")]
BelowOne = Annotated[
    float,
    Range(0, 1, includes_high=False, words="a fraction from 0 to below 1"),
]


class Checked:
    """Base of the configuration's dataclasses. A value of a wrong type or range raises InputError.

    An int is accepted for a float, a list for a tuple, a dict for a mapping. They are converted,
    so that two configurations that say the same are equal and can be hashed.
    """

    def __post_init__(self) -> None:
        ranges = field_ranges(type(self))
        for name, hint in field_types(type(self)).items():
            value = converted(hint, getattr(self, name), name)
            if name in ranges:
                _require_in_range(ranges[name], value, name)
            # The dataclasses are frozen; this is how their own __init__ assigns, too.
            object.__setattr__(self, name, value)
        self.check()

    def check(self) -> None:
        """Which values go together. Called when all types and ranges are right."""


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """The annotation of each field of a dataclass, in order."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def field_ranges(cls: type) -> dict[str, Range]:
    """The range of each number of a dataclass: of its value, or of each element of a tuple."""
    hints = get_type_hints(cls, include_extras=True)
    ranges = {}
    for field in dataclasses.fields(cls):
        found = _range_in(hints[field.name])
        if found is not None:
            ranges[field.name] = found
    return ranges


def _range_in(hint: Any) -> Range | None:
    """The range in the annotation `N`, `N | None` or `tuple[N, ...]`; None where there is none."""
    if get_origin(hint) is Annotated:
        _, *extras = get_args(hint)
        return next((extra for extra in extras if isinstance(extra, Range)), None)
    if not is_union(hint) and get_origin(hint) is not tuple:
        return None
    found = [_range_in(member) for member in get_args(hint)]
    return next((member for member in found if member is not None), None)


def _require_in_range(allowed: Range, value: Any, name: str) -> None:
    if value is None:
        return
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            require(item in allowed, f"{name}[{i}]", item, str(allowed))
        return
    require(value in allowed, name, value, str(allowed))


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
        # Anything but a string may not even be comparable: a list, an array.
        is_choice = isinstance(value, str) and value in choices
        require(is_choice, name, value, f"one of {', '.join(map(str, choices))}")
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
    is_bool = isinstance(value, bool | np.bool_)
    if hint is float and isinstance(value, numbers.Real) and not is_bool:
        # An int of any size is Real, but not always a float.
        magnitude: Any = abs(value)
        is_finite = magnitude <= sys.float_info.max and math.isfinite(as_float32(float(value)))
        require(is_finite, name, value, "a finite float32 number")
        return float(value)
    if hint is int and isinstance(value, numbers.Integral) and not is_bool:
        return int(value)
    is_fine = hint not in (int, float) and isinstance(value, hint)
    require(is_fine, name, value, hint.__name__)
    return value


def divides(name: str, part: int, whole: int) -> None:
    """InputError unless `part` divides `whole`."""
    require(part >= 1 and whole % part == 0, name, part, f"a divisor of {whole}")
