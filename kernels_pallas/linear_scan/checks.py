"""Checks of the arguments of `linear_scan` and `linear_scan_step`.

A failed check is a ValueError that names op and argument, what was got and what was expected.
"""

from typing import NoReturn

from jax import Array

from kernels_pallas.common.checks import (
    as_integer,
    check_axes,
    check_float,
    check_integer,
    check_shape,
)
from kernels_pallas.linear_scan.tile import MAX_CHUNK


def check_tokens(
    op: str,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    has_time: bool,
) -> None:
    """q, k, v and log_decay: number of axes, sizes and dtypes."""
    leading = "B, T" if has_time else "B"
    expected_axes = {
        "q": f"[{leading}, H, K]",
        "k": f"[{leading}, Hk, K]",
        "v": f"[{leading}, Hv, V]",
    }
    for name, x in {"q": q, "k": k, "v": v}.items():
        check_axes(op, name, x, expected_axes[name])

    # rows are B, or B and T: the same for all three.
    *rows, H, K = q.shape
    if [*k.shape[:-2]] != rows or H % k.shape[-2] or k.shape[-1] != K:
        _raise_for_q(op, "k", k, q, [*rows, f"a divisor of {H}", K])
    if [*v.shape[:-2]] != rows or H % v.shape[-2]:
        _raise_for_q(op, "v", v, q, [*rows, f"a divisor of {H}", "V"])
    if log_decay is not None:
        # RetNet; Mamba-2; GLA.
        shapes = ((H,), (*rows, H), (*rows, H, K))
        if log_decay.shape not in shapes:
            raise ValueError(
                f"{op}: log_decay: got shape {log_decay.shape}, expected one of {shapes}"
            )
        check_float(op, "log_decay", log_decay)


def _raise_for_q(
    op: str,
    name: str,
    x: Array,
    q: Array,
    expected: list,
) -> NoReturn:
    """For a shape that does not go with q's."""
    raise ValueError(
        f"{op}: {name}: got shape {x.shape}, expected {expected} for q of shape {q.shape}"
    )


def check_bonus(
    op: str,
    q: Array,
    bonus: Array | None,
    inclusive: bool,
) -> None:
    """bonus: only for exclusive reads, [H, K]."""
    if bonus is None:
        return
    if inclusive:
        raise ValueError(
            f"{op}: bonus: got shape {bonus.shape} with inclusive=True, "
            "expected inclusive=False or no bonus"
        )
    check_shape(op, "bonus", bonus, q.shape[-2:])
    check_float(op, "bonus", bonus)


def check_state(
    op: str,
    name: str,
    q: Array,
    v: Array,
    state: Array | None,
    normalize: bool,
) -> None:
    """The state of every row and head; with `normalize` it has a column for the sum of weights."""
    if state is None:
        return
    B = q.shape[0]
    H, K = q.shape[-2:]
    # normalize appends a column of ones to v.
    num_columns = v.shape[-1] + normalize
    check_shape(op, name, state, (B, H, K, num_columns))
    check_float(op, name, state)


def check_segment_ids(op: str, q: Array, segment_ids: Array | None) -> None:
    """segment_ids: one integer for every token."""
    if segment_ids is None:
        return
    check_shape(op, "segment_ids", segment_ids, q.shape[:2])
    check_integer(op, "segment_ids", segment_ids)


def checked_chunk_size(op: str, chunk_size: int | None) -> int | None:
    """chunk_size: a power of two, because blocks are merged in pairs."""
    if chunk_size is None:
        return None
    chunk_size = as_integer(op, "chunk_size", chunk_size)
    # A power of two has one bit.
    is_power_of_two = chunk_size > 0 and chunk_size & (chunk_size - 1) == 0
    if not is_power_of_two or chunk_size > MAX_CHUNK:
        raise ValueError(
            f"{op}: chunk_size: got {chunk_size}, expected a power of two from 1 to {MAX_CHUNK}"
        )
    return chunk_size
