"""Checks of the arguments of `delta_scan` and `delta_scan_step`.

A failed check is a ValueError that names op and argument, what was got and what was expected.
"""

from jax import Array

from kernels_pallas.common.checks import check_axes, check_float, check_shape


def check_tokens(
    op: str,
    q: Array,
    k: Array,
    v: Array,
    has_time: bool,
) -> None:
    """q, k and v: number of axes, sizes and dtypes."""
    leading = "B, T" if has_time else "B"
    expected_axes = {
        "q": f"[{leading}, Hq, K]",
        "k": f"[{leading}, Hk, K]",
        "v": f"[{leading}, H, V]",
    }
    for name, x in {"q": q, "k": k, "v": v}.items():
        check_axes(op, name, x, expected_axes[name])

    # rows are B, or B and T: the same for all three.
    *rows, H, _ = v.shape
    K = q.shape[-1]
    for name, x in {"q": q, "k": k}.items():
        if [*x.shape[:-2]] != rows or H % x.shape[-2] or x.shape[-1] != K:
            expected = [*rows, f"a divisor of {H}", K]
            raise ValueError(
                f"{op}: {name}: got shape {x.shape}, expected {expected} for v of shape {v.shape}"
            )


def check_weights(
    op: str,
    q: Array,
    v: Array,
    beta: Array | None,
    log_decay: Array | None,
    erase: Array | None,
    write: Array | None,
) -> None:
    """beta, or both erase and write; log_decay with one decay a head or one a channel."""
    *rows, H, V = v.shape
    K = q.shape[-1]
    if beta is None and (erase is None or write is None):
        missing = "erase" if erase is None else "write"
        raise ValueError(
            f"{op}: beta: got None with {missing}=None, expected beta, or both erase and write"
        )
    if beta is not None and erase is not None and write is not None:
        raise ValueError(
            f"{op}: beta: got shape {beta.shape} with erase and write, expected None: "
            "each of them stands in its place"
        )
    expected_shapes = {
        "beta": (beta, (*rows, H)),
        "erase": (erase, (*rows, H, K)),
        "write": (write, (*rows, H, V)),
    }
    for name, (x, shape) in expected_shapes.items():
        if x is not None:
            check_shape(op, name, x, shape)
            check_float(op, name, x)
    if log_decay is None:
        return
    shapes = ((*rows, H), (*rows, H, K))
    if log_decay.shape not in shapes:
        raise ValueError(f"{op}: log_decay: got shape {log_decay.shape}, expected one of {shapes}")
    check_float(op, "log_decay", log_decay)


def check_state(
    op: str,
    name: str,
    q: Array,
    v: Array,
    state: Array | None,
) -> None:
    """The state of every row and head: K rows, V columns."""
    if state is None:
        return
    H, V = v.shape[-2:]
    check_shape(op, name, state, (v.shape[0], H, q.shape[-1], V))
    check_float(op, name, state)
