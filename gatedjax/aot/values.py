"""The scalars of a replayed program: 32-bit integers, addresses, predicates, or UNKNOWN.

Addresses are plain numbers too. Symbols and operands are given ranges far above what a program
computes with, so a number above ADDRESS_FLOOR is an address and is never wrapped to 32 bits.
"""

import functools
from collections.abc import Callable
from typing import Any

ADDRESS_FLOOR = 1 << 39
ALLOCATIONS = 1 << 41  # the first address of `#allocation0`
ALLOCATION_BITS = 24  # of the addresses inside one allocation
OPERANDS = 1 << 50  # the first address of operand 0
OPERAND_BITS = 40
HBM_SHIFT = 4  # by which a program shifts an HBM operand's address before a DMA reads it

_WORD = 0xFFFFFFFF


class Unknown:
    """A value that depends on vector data; it absorbs every operation."""

    def _absorb(self, *_) -> "Unknown":
        return self

    __add__ = _absorb
    __radd__ = _absorb
    __sub__ = _absorb
    __rsub__ = _absorb
    __mul__ = _absorb
    __rmul__ = _absorb
    __and__ = _absorb
    __rand__ = _absorb
    __or__ = _absorb
    __ror__ = _absorb
    __xor__ = _absorb
    __rxor__ = _absorb
    __rshift__ = _absorb
    __rrshift__ = _absorb
    __neg__ = _absorb
    __lt__ = _absorb
    __le__ = _absorb
    __gt__ = _absorb
    __ge__ = _absorb


UNKNOWN = Unknown()

# What a scalar register holds: a bool is an int here.
type Value = int | Unknown


def signed(x: Value) -> Value:
    """Wraps to 32 bits; addresses pass."""
    if type(x) is not int or -(2**31) <= x < 2**31 or x >= ADDRESS_FLOOR:
        return x
    return _wrapped(x)


def unsigned(x):
    """A negative number as the hardware's unsigned word; addresses pass."""
    if type(x) is int and -ADDRESS_FLOOR < x < 0:
        return x & _WORD
    return x


def _wrapped(x: int) -> int:
    """32 bits of a number that is no address: a shift may take one as far as addresses begin."""
    return ((x + 2**31) & _WORD) - 2**31


def _absorbing(fn: Callable) -> Callable:
    """`fn`, but UNKNOWN as soon as an argument is."""

    @functools.wraps(fn)
    def absorbing(*args):
        if any(a is UNKNOWN for a in args):
            return UNKNOWN
        return fn(*args)

    return absorbing


def _or(a, b):
    if a is True or b is True:
        return True
    if a is UNKNOWN or b is UNKNOWN:
        return UNKNOWN
    return bool(a or b)


def _and(a, b):
    if a is False or b is False:
        return False
    if a is UNKNOWN or b is UNKNOWN:
        return UNKNOWN
    return bool(a and b)


def _select(predicate, a, b):
    if predicate is UNKNOWN:
        return UNKNOWN
    return a if predicate else b


def _quotient_and_remainder(a, b) -> list:
    """Of unsigned words, as the queue that two pops read."""
    if a is UNKNOWN or b is UNKNOWN or b == 0:
        return [UNKNOWN, UNKNOWN]
    return list(divmod(unsigned(a), unsigned(b)))


@_absorbing
def _not(a):
    return not a


@_absorbing
def _xor(a, b):
    return bool(a) != bool(b)


@_absorbing
def _equal(a, b):
    return a == b


@_absorbing
def _not_equal(a, b):
    return a != b


@_absorbing
def _shift_right(a, b):
    """Logical: zeros come in from the left."""
    if a >= ADDRESS_FLOOR:
        return a >> b
    return (a & _WORD) >> b


@_absorbing
def _shift_left(a, b):
    if a >= ADDRESS_FLOOR:
        return a << b
    return _wrapped(a << (b & 63))


@_absorbing
def _carry(a, b):
    return unsigned(a) + unsigned(b) > _WORD


# What the generated functions of `program.py` may call, by the names that they use.
NAMES: dict[str, Any] = {
    "UNKNOWN": UNKNOWN,
    "signed": signed,
    "unsigned": unsigned,
    "not_": _not,
    "or_": _or,
    "and_": _and,
    "xor": _xor,
    "select": _select,
    "eq": _equal,
    "ne": _not_equal,
    "min_": _absorbing(min),
    "max_": _absorbing(max),
    "divrem": _quotient_and_remainder,
    "shr": _shift_right,
    "shl": _shift_left,
    "carry": _carry,
}
