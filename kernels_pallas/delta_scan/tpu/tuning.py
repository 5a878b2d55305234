"""Block sizes of the TPU kernels, as data; a schedule changes only the time of a call.

Tuned by model time at B1 T8192 H32 K128 V128. Heads go in step (lag 0), and many of them: the
inverse is a chain of small matmuls, each of which waits for the one before.
"""

from kernels_pallas.common.device import device_kind
from kernels_pallas.linear_scan.tpu.plan import Schedule
from kernels_pallas.linear_scan.tpu.tuning import fitted

# 16 rows fill a bfloat16 register, and 128 scores a row of one.
MIN_CHUNK = 16
MAX_CHUNK = 128
MAX_K = 256
# For the maps of `delta_scan_sharded` too, states of V + K columns.
MAX_V = 512
# heads * (K + V) that a step was tuned for; more would not fit into VMEM. The backward kernel keeps
# twice as much for each head.
LANES_IN_FORWARD_STEP = 16 * (128 + 128)
LANES_IN_BACKWARD_STEP = 8 * (128 + 128)

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
    rounds: bool,
) -> tuple[Schedule, Schedule]:
    """The forward and the backward schedule, on the device that the call is compiled for.

    Args:
      decay: "vector", "scalar" or "none".
      T: tokens.
      H, Hq, Hk: states, query heads and key heads.
      K, V: channels, padded to whole registers.
      chunk: tokens in a chunk.
      rounds: whether operands are kept in bfloat16; in float32 they take twice the VMEM.

    Returns:
      (forward, backward).
    """
    # The rule without decay takes the schedules of scalar decays.
    schedules_of_device = TUNED.get(device_kind(), TUNED[DEFAULT_KIND])
    forward, backward = schedules_of_device["vector" if decay == "vector" else "scalar"]
    lanes_of_head = (K + V) if rounds else 2 * (K + V)

    def fitted_to(schedule: Schedule, lanes_in_step: int) -> Schedule:
        max_heads = max(1, lanes_in_step // lanes_of_head)
        return fitted(schedule, T, H, Hq, Hk, max_heads, chunk)

    return (
        fitted_to(forward, LANES_IN_FORWARD_STEP),
        fitted_to(backward, LANES_IN_BACKWARD_STEP),
    )
