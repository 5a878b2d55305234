"""delta_scan's kernels on the GPU of this machine: values and gradients (gpu_device.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_cases import make, outputs_and_gradients, weights_for
from gpu_device import INTERPRET, TOLERANCE, needs_gpu, only_some_interpreted
from helpers import rel_rms

pytestmark = needs_gpu


def compare(inputs, dtype: str, **options) -> None:
    """The kernels against the recurrence in float64, on the same rounded inputs."""
    weights = weights_for(inputs, dtype)
    low = {n: jnp.asarray(x, dtype if n in "qkv" else jnp.float32) for n, x in inputs.items()}
    got = outputs_and_gradients(
        low,
        options.get("segment_ids"),
        tuple(map(jnp.float32, weights)),
        implementation="gpu",
        interpret=INTERPRET,
    )
    with jax.enable_x64(True):
        high = {n: jnp.asarray(np.asarray(x, np.float64)) for n, x in low.items()}
        want = outputs_and_gradients(
            high,
            options.get("segment_ids"),
            weights,
            implementation="reference",
        )
    errors = {name: rel_rms(got[name], want[name]) for name in want}
    # What is found under a key is rounded too.
    assert max(errors.values()) <= 2 * TOLERANCE[dtype], errors


@pytest.mark.parametrize("T", [65, 129, 150])
@pytest.mark.parametrize("rank", [0, 3, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_lengths_that_cross_into_another_chunk(dtype, rank, T):
    """By one token, and a third one. K and V of two blocks and a part, grouped heads."""
    only_some_interpreted((dtype, rank, T) == ("float32", 4, 65))
    compare(make(B=1, T=T, H=2, Hq=1, Hk=1, K=144, V=80, rank=rank), dtype)


@pytest.mark.parametrize("K, V", [(64, 64), (128, 256), (256, 128)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sizes_of_heads_and_documents(dtype, K, V):
    only_some_interpreted(False)
    segment_ids = np.repeat(np.arange(10), 20)[None]
    compare(make(B=1, T=200, H=2, K=K, V=V, decay="mixture"), dtype, segment_ids=segment_ids)
