"""linear_scan's GPU kernels with NaN and Inf among the numbers, interpreted: they reach the tokens
that see them and no other, forward and backward. The recurrence is the oracle.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import slow
from scan_cases import fast_jit
from test_linear_scan_nonfinite import CASES, PLACES, SEGMENTS, T, numbers, spoiled

from kernels_pallas.common.two_paths import Paths, with_careful_path
from kernels_pallas.linear_scan.gpu import careful
from kernels_pallas.linear_scan.gpu import op as gpu
from kernels_pallas.linear_scan.xla import OUT_NAME, STATES_NAME
from kernels_pallas.ops import linear_scan


@partial(fast_jit, static_argnames=("segments", "implementation", "options", "trace"))
def run(x, segments, implementation, options=(), trace=None):
    """Every output and gradient, by name."""
    cotangents = x["do"], x["dstate"]
    x = {name: value for name, value in x.items() if name not in ("do", "dstate")}

    def scan(x):
        return linear_scan(
            **x,
            segment_ids=SEGMENTS if segments else None,
            return_final_state=True,
            implementation=implementation,
            interpret=implementation == "gpu",
            chunk_size=None if implementation == "reference" else 16,
            **dict(options),
        )

    (o, state), vjp = jax.vjp(scan, x)
    (gradients,) = vjp(cotangents)
    return {"o": o, "final_state": state} | {f"d{name}": g for name, g in gradients.items()}


def check(got, want, clean, clean_want):
    """The same rows are finite as in the recurrence; those that it leaves as they were are so."""
    for name in got:
        arrays = [np.asarray(x[name]) for x in (got, want, clean, clean_want)]
        rows = T if arrays[0].shape[1] == T else 1  # of a token, all heads together
        ours, theirs, before, theirs_before = (a.reshape(rows, -1) for a in arrays)
        np.testing.assert_array_equal(
            np.isfinite(ours).all(1), np.isfinite(theirs).all(1), err_msg=name
        )
        same = (theirs == theirs_before).all(1)
        # Two ways to the same number: the kernels' and, where they met NaN, the recurrence.
        np.testing.assert_allclose(ours[same], before[same], 1e-5, 4e-6, err_msg=name)


def runs(name, trace=None):
    rank, segments, options = CASES[name]
    x = numbers(rank, bonus=name == "exclusive", normalize=name == "normalize")
    want = partial(run, segments=segments, implementation="reference", options=options)
    got = partial(run, segments=segments, implementation="gpu", options=options, trace=trace)
    return x, got, want


SLOW = ("no decay", "one segment", "reverse", "normalize")


@pytest.mark.parametrize("name", [slow(name) if name in SLOW else name for name in CASES])
def test_what_sees_it_and_nothing_else(name):
    x, got, want = runs(name)
    clean, clean_want = got(x), want(x)
    for i, spoiled_name in enumerate(x):
        for value in (np.nan, np.inf):
            y = spoiled(x, spoiled_name, PLACES[i % len(PLACES)], value)
            if spoiled_name == "log_decay" and value == np.inf:
                continue  # the recurrence may stay finite where a state of zeros grows
            check(got(y), want(y), clean, clean_want)


@pytest.mark.parametrize("rank", [slow(0), slow(3), 4])
def test_an_overflow_ends_with_its_segment(rank):
    """Finite inputs whose state overflows."""
    x = numbers(rank)
    clean = run(x, True, "gpu")
    got = run(spoiled(x, "overflow", 3), True, "gpu")
    for name in got.keys() - {"final_state", "dinitial_state"}:
        np.testing.assert_allclose(got[name][:, 17:], clean[name][:, 17:], 1e-5, 4e-6)
    np.testing.assert_allclose(got["o"][:, :3], clean["o"][:, :3], 1e-5)
    assert not np.isfinite(got["o"][:, 3:17]).all()


def test_vmap_keeps_one_flag():
    """With a flag a row the loop of the careful path would take its step for all of them."""
    x = numbers(3)
    both = {name: np.stack([x[name]] * 2) for name in ("q", "k", "v")}

    def scan(x):
        return linear_scan(**x, implementation="gpu", interpret=True)

    text = str(jax.make_jaxpr(jax.vmap(scan))(both))
    conditions = re.findall(r"cond_jaxpr=\{ lambda ;[^}]*\}", text)
    assert conditions and not any("reduce_or" in condition for condition in conditions)


# --- are these tests able to fail?


def forgetful_backward(*args):
    return gpu._backward(*args)[0], jnp.zeros((), bool)


FORGETFUL = with_careful_path(
    gpu.OP,
    Paths(gpu._forward, forgetful_backward, careful.outputs, careful.gradients),
    OUT_NAME,
    STATES_NAME,
)


PLANTED = {
    "nothing is counted": (gpu, "any_counted", lambda *counts: jnp.zeros((), bool)),
    "segments are forgotten": (
        careful,
        "_scan",
        lambda plan, x, floats, f=careful._scan: f(plan, x._replace(starts=None), floats),
    ),
    "the way back is not looked at": (gpu, "_scan", FORGETFUL),
}


@pytest.mark.slow
@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_found(error, monkeypatch):
    monkeypatch.setattr(*PLANTED[error])
    x, got, want = runs("vector", trace=error)
    clean, clean_want = got(x), want(x)
    # Of the way back, only a cotangent tells.
    y = spoiled(x, "do" if "way back" in error else "v", PLACES[0])
    with pytest.raises(AssertionError):
        check(got(y), want(y), clean, clean_want)
