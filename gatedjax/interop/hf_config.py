"""config.json, key by key: every value that counts is checked, and named where it does not fit.

Nothing of it is executed: `auto_map` and what else asks for code of the checkpoint is not looked
at. Keys that no family reads (dropout, caches, versions) are ignored.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gatedjax.config.checks import LARGEST_SIZE
from gatedjax.errors import InputError, require

# Of a list in a config.json, such as the kinds of all layers.
_MOST_ENTRIES = 4096


class HFConfig:
    """The values of a config.json, or of a group inside of it."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json"):
        self.values = values
        self._where = where

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def refuse(self, name: str, expected: str) -> InputError:
        """The error for the value of a key."""
        try:
            require(False, f"{self._where}: {name}", self.values.get(name), expected)
        except InputError as error:
            return error
        raise AssertionError

    def size(self, *names: str, default: int | None = None) -> int:
        """An integer of at least 1, under the first of the names that is there."""
        name = self._first(names)
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 1 <= value <= LARGEST_SIZE:
            raise self.refuse(name, f"an integer from 1 to {LARGEST_SIZE:,}")
        return value

    def optional_size(self, name: str) -> int | None:
        """As `size`; None where there is none."""
        return self.size(name) if name in self else None

    def count(self, name: str, default: int) -> int:
        """An integer of at least 0."""
        value = self.values.get(name, default)
        value = default if value is None else value
        if type(value) is not int or not 0 <= value <= LARGEST_SIZE:
            raise self.refuse(name, f"an integer from 0 to {LARGEST_SIZE:,}")
        return value

    def number(self, *names: str, default: float | None = None) -> float:
        """A finite number."""
        name = self._first(names)
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise self.refuse(name, "a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def text(self, name: str, default: str = "") -> str:
        """A string."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.refuse(name, "a string")
        return value

    def texts(self, name: str) -> tuple[str, ...] | None:
        """A list of strings; None where there is none."""
        values = self.values.get(name)
        if values is None:
            return None
        is_list = isinstance(values, list) and len(values) <= _MOST_ENTRIES
        if not is_list or not all(isinstance(value, str) for value in values):
            raise self.refuse(name, "a list of strings")
        return tuple(values)

    def counts(self, name: str) -> tuple[int, ...]:
        """A list of integers; () where there is none."""
        values = self.values.get(name)
        if values is None:
            return ()
        is_list = isinstance(values, list) and len(values) <= _MOST_ENTRIES
        if not is_list or not all(type(value) is int for value in values):
            raise self.refuse(name, "a list of integers")
        return tuple(values)

    def group(self, name: str) -> "HFConfig":
        """A group of keys; an empty one where there is none."""
        values = self.values.get(name)
        if values is None:
            return HFConfig({}, f"{self._where}: {name}")
        if not isinstance(values, dict):
            raise self.refuse(name, "a group of keys")
        return HFConfig(values, f"{self._where}: {name}")

    def require(self, name: str, expected: Sequence[Any]) -> None:
        """InputError unless the value is absent or one of those that this package can express."""
        value = self.values.get(name)
        if value is None or any(
            value == known and type(value) is type(known) for known in expected
        ):
            return
        words = " or ".join(repr(known) for known in expected)
        raise self.refuse(name, f"{words}: nothing else of it is known here")

    def _first(self, names: Sequence[str]) -> str:
        return next((name for name in names if name in self), names[0])


class Rope(NamedTuple):
    """Positions, as `GatedAttentionConfig` has them."""

    base: float
    fraction: float = 1.0
    yarn_factor: float = 1.0
    yarn_original_length: int = 4096
    yarn_truncate: bool = True
    llama3_factor: float = 1.0
    llama3_low: float = 1.0
    llama3_high: float = 4.0
    llama3_original_length: int = 8192


def rope_of(
    config: HFConfig,
    base: float,
    fraction: float = 1.0,
) -> Rope:
    """The rotation of a config.json, in the words of transformers 5 or of those before it.

    Args:
      config: the whole.
      base: of the family, where the file names none.
      fraction: of a head's channels that rotate, likewise.
    """
    name = "rope_parameters" if "rope_parameters" in config else "rope_scaling"
    rope = config.group(name)
    kind = rope.text("rope_type") or rope.text("type") or "default"
    base = rope.number("rope_theta", default=config.number("rope_theta", default=base))
    partial = "partial_rotary_factor"
    fraction = rope.number(partial, default=config.number(partial, default=fraction))
    if kind in ("default", "mrope"):
        # Sections of image positions: text has one position, and they are all the same.
        return Rope(base, fraction)
    if kind == "llama3":
        return Rope(
            base,
            fraction,
            llama3_factor=rope.number("factor"),
            llama3_low=rope.number("low_freq_factor", default=1.0),
            llama3_high=rope.number("high_freq_factor", default=4.0),
            llama3_original_length=rope.size("original_max_position_embeddings"),
        )
    if kind != "yarn":
        expected = "'default', 'yarn' or 'llama3': no other scaling is known here"
        raise rope.refuse("rope_type", expected)
    rope.require("beta_fast", (32, 32.0))
    rope.require("beta_slow", (1, 1.0))
    rope.require("attention_factor", ())
    rope.require("mscale", ())
    length = config.size("max_position_embeddings", default=4096)
    original = rope.size("original_max_position_embeddings", default=length)
    return Rope(
        base,
        fraction,
        rope.number("factor"),
        original,
        rope.flag("truncate", True),
    )


def rope_to_json(rope: Rope, with_fraction: bool = False) -> dict[str, Any]:
    """The rotation, in the words of transformers 5."""
    values: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.base}
    if with_fraction:
        values["partial_rotary_factor"] = rope.fraction
    if rope.yarn_factor > 1:
        values["rope_type"] = "yarn"
        values["factor"] = rope.yarn_factor
        values["original_max_position_embeddings"] = rope.yarn_original_length
        values["truncate"] = rope.yarn_truncate
    if rope.llama3_factor > 1:
        values["rope_type"] = "llama3"
        values["factor"] = rope.llama3_factor
        values["low_freq_factor"] = rope.llama3_low
        values["high_freq_factor"] = rope.llama3_high
        values["original_max_position_embeddings"] = rope.llama3_original_length
    return values


def dtype_of(config: HFConfig) -> str:
    """The dtype that the file names: float32, bfloat16 or float16."""
    name = "dtype" if "dtype" in config else "torch_dtype"
    config.require(name, ("float32", "bfloat16", "float16"))
    return config.text(name, "float32")
