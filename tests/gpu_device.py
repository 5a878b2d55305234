"""The mark of tests that run on the GPU of this machine (make test-gpu); elsewhere they are
skipped. With DEVICE_TESTS=interpret a few cases of each file run interpreted on the CPU, to try
the files themselves.
"""

import os

import jax
import pytest

INTERPRET = os.environ.get("DEVICE_TESTS") == "interpret"
needs_gpu = pytest.mark.skipif(
    jax.default_backend() != "gpu" and not INTERPRET,
    reason="there is no GPU here (make test-gpu)",
)
# float32: three passes of TF32 and the chip's exponential. 16 bits: what is multiplied is rounded
# to them.
TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 6e-3}


def only_some_interpreted(is_one_of_them: bool) -> None:
    """Skips a case that is not one of those that run interpreted."""
    if INTERPRET and not is_one_of_them:
        pytest.skip("one case of each kind when interpreted")
