"""Block sizes of the TPU kernels, as data; a schedule changes only the time of a call."""

from kernels_pallas.common.device import device_kind
from kernels_pallas.linear_scan.tpu.plan import Schedule
from kernels_pallas.linear_scan.tpu.tuning import fitted

# 16 rows fill a bfloat16 register, and 128 scores a row of one.
MIN_CHUNK = 16
MAX_CHUNK = 128
MAX_D = 256
# heads * (K + V) that a step was tuned for; more would not fit into VMEM.
LANES_IN_STEP = 16 * (128 + 128)

# Device kind -> kind of decay -> (forward, backward). The device kind is what
# jax.Device.device_kind says.
TUNED = {
    "TPU v6 lite": {
        "vector": (
            Schedule(heads=16, chunks=1, lag=0, round_early=True),
            Schedule(heads=8, chunks=1, lag=0, round_early=True),
        ),
        "scalar": (
            Schedule(heads=16, chunks=1, lag=0, round_early=True),
            Schedule(heads=8, chunks=1, lag=0, round_early=True),
        ),
    },
}
# The nearest to later ones: a matrix unit of 256.
DEFAULT_KIND = "TPU v6 lite"


def schedules(
    decay: str,
    T: int,
    H: int,
    Hq: int,
    Hk: int,
    K: int,
    V: int,
    chunk: int,
) -> tuple[Schedule, Schedule]:
    """The forward and the backward schedule, on the device that the call is compiled for.

    Args:
      decay: "vector", "scalar" or "none".
      T: tokens.
      H, Hq, Hk: states, query heads and key heads.
      K, V: channels, padded to whole registers.
      chunk: tokens in a chunk.

    Returns:
      (forward, backward).
    """
    # The rule without decay takes the schedules of scalar decays.
    schedules_of_device = TUNED.get(device_kind(), TUNED[DEFAULT_KIND])
    forward, backward = schedules_of_device["vector" if decay == "vector" else "scalar"]
    max_heads = max(1, LANES_IN_STEP // (K + V))
    return (
        fitted(forward, T, H, Hq, Hk, max_heads, chunk),
        fitted(backward, T, H, Hq, Hk, max_heads, chunk),
    )
