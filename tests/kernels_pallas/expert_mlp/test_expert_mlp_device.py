"""expert_mlp's kernels on the GPU of this machine: values and gradients (gpu_device.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_device import INTERPRET, TOLERANCE, needs_gpu, only_some_interpreted
from helpers import rel_rms

from kernels_pallas.ops import expert_mlp

pytestmark = needs_gpu

# A tile and one row, two tiles, none, one row; and rows that belong to no group.
GROUP_SIZES = [129, 256, 0, 1, 65]
SPARE = 7
NAMES = ("rows", "gate", "up", "down", "weights")


def draw(M: int, F: int, dtype: str) -> dict[str, jax.Array]:
    """By name, and the cotangent of the result."""
    random = np.random.default_rng(M + F)
    R = sum(GROUP_SIZES) + SPARE
    G = len(GROUP_SIZES)
    scale = M**-0.5
    drawn = {
        "rows": random.normal(size=(R, M)),
        "gate": scale * random.normal(size=(G, M, F)),
        "up": scale * random.normal(size=(G, M, F)),
        "down": scale * random.normal(size=(G, F, M)),
        "weights": random.random(R),
        "cotangent": random.normal(size=(R, M)),
    }
    return {name: jnp.asarray(array, dtype) for name, array in drawn.items()}


def results(arrays: dict[str, jax.Array], **options) -> dict[str, jax.Array]:
    sizes = jnp.asarray(GROUP_SIZES, jnp.int32)

    def call(inputs):
        *matrices, weights = (inputs[name] for name in NAMES)
        return expert_mlp(*matrices, sizes, weights, **options)

    out, vjp = jax.vjp(call, {name: arrays[name] for name in NAMES})
    (gradients,) = vjp(arrays["cotangent"])
    return {"out": out} | gradients


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("M, F", [(64, 128), (65, 130), (300, 200)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_and_gradients(dtype, M, F, activation):
    """Widths that no block divides, groups that cross into another tile."""
    only_some_interpreted((dtype, M, activation) == ("float32", 65, "silu"))
    arrays = draw(M, F, dtype)
    got = results(arrays, activation=activation, implementation="gpu", interpret=INTERPRET)
    with jax.enable_x64(True):
        exact = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in arrays.items()}
        want = results(exact, activation=activation, implementation="reference")
    errors = {name: rel_rms(got[name], want[name]) for name in want}
    # Hidden activations are rounded too.
    assert max(errors.values()) <= 2 * TOLERANCE[dtype], errors
