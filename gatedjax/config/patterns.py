"""Patterns of names: of parameters, of projections. In a pattern `*` stands for any text.

A name is the path to a parameter, such as `periods.layer_0.mixer.query.kernel`: dots are text like
any other, so `*.mixer.*` holds for everything inside of a mixer. A rule is one string with an
arrow, `*.lora.b -> 16`: where several rules hold for a name, the first one counts.
"""

import re
from collections.abc import Iterable

from gatedjax.errors import require

ARROW = "->"


def matches(pattern: str, name: str) -> bool:
    """Whether the pattern holds for the whole name."""
    return _stars(pattern, name) is not None


def matches_any(patterns: Iterable[str], name: str) -> bool:
    """Whether one of the patterns holds for the name."""
    return any(matches(pattern, name) for pattern in patterns)


def unmatched(patterns: Iterable[str], names: Iterable[str]) -> str | None:
    """The first pattern that holds for none of the names; None if there is no such pattern."""
    names = list(names)
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            return pattern
    return None


def sides(rule: str) -> tuple[str, str]:
    """What stands before and behind the arrow of a rule."""
    before, _, behind = rule.partition(ARROW)
    return before.strip(), behind.strip()


def renamed(rules: Iterable[str], name: str) -> str:
    """The name after the first rule that holds for it: `OLD -> NEW`.

    Each `*` of NEW is what the `*` of OLD at the same place stood for.
    """
    for rule in rules:
        old, new = sides(rule)
        found = _stars(old, name)
        if found is not None:
            parts = new.split("*")
            return "".join(part + text for part, text in zip(parts, (*found, "")))
    return name


def check_renaming(name: str, rules: Iterable[str]) -> None:
    """InputError unless every rule is `OLD -> NEW`, with as many `*` on both sides.

    Args:
      name: of the key, for the message.
      rules: its value.
    """
    for rule in rules:
        old, new = sides(rule)
        is_rule = bool(old and new) and ARROW not in new and old.count("*") == new.count("*")
        require(is_rule, name, rule, "'OLD -> NEW', with as many * on both sides")


def factor(rule: str) -> float:
    """The number of a rule `PATTERN -> FACTOR`; NaN if there is none."""
    try:
        return float(sides(rule)[1])
    except ValueError:
        return float("nan")


def check_factors(name: str, rules: Iterable[str]) -> None:
    """InputError unless every rule is `PATTERN -> FACTOR`, with a factor above 0.

    Args:
      name: of the key, for the message.
      rules: its value.
    """
    for rule in rules:
        is_rule = bool(sides(rule)[0]) and 0.0 < factor(rule) < 1e6
        require(is_rule, name, rule, "'PATTERN -> FACTOR', with a number above 0 and below 1e6")


def _stars(pattern: str, name: str) -> tuple[str, ...] | None:
    """What each `*` of the pattern stands for in the name; None if the pattern does not hold.

    Each takes as little as it can; the last one takes what is left.
    """
    first, *others = [re.escape(part) for part in pattern.split("*")]
    # Atomic groups: a pattern of many stars, out of a stranger's file, takes no time.
    between = [f"(?>(.*?){part})" for part in others[:-1]]
    last = [f"(.*){part}" for part in others[-1:]]
    found = re.fullmatch("".join([first, *between, *last]), name)
    return None if found is None else found.groups()
