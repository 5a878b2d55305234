"""Block sizes of the TPU kernels, as data.

`benchmarks/tune_linear_scan.py` fills the table by model time. A schedule changes only the time of
a call. Where a call has fewer heads or tokens, or larger ones, than the row was tuned for, it is
reduced to what divides and fits.
"""

from kernels_pallas.common.device import device_kind
from kernels_pallas.linear_scan.tpu.plan import Schedule

# 16 rows fill a bfloat16 register, and 128 scores a row of one.
MIN_CHUNK = 16
MAX_CHUNK = 128
MAX_D = 512
# heads * (K + V) that a step was tuned for; more would not fit into VMEM.
LANES_IN_STEP = 8 * (128 + 256)

# Device kind -> kind of decay -> (forward, backward). The device kind is what
# jax.Device.device_kind says.
TUNED = {
    "TPU v5 lite": {
        "vector": (
            Schedule(heads=8, chunks=2, lag=None),
            Schedule(heads=8, chunks=2, lag=7),
        ),
        "scalar": (
            Schedule(heads=8, chunks=2, lag=0),
            Schedule(heads=8, chunks=2, lag=0),
        ),
    },
    "TPU v5": {
        "vector": (
            Schedule(heads=8, chunks=2, lag=None),
            Schedule(heads=8, chunks=2, lag=6, keep_scores=True),
        ),
        "scalar": (
            Schedule(heads=8, chunks=2, lag=0),
            Schedule(heads=8, chunks=2, lag=0),
        ),
    },
    "TPU v6 lite": {
        "vector": (
            Schedule(heads=8, chunks=2, lag=6, round_early=True, stack=True),
            Schedule(heads=8, chunks=2, lag=2, round_early=True, keep_scores=True),
        ),
        "scalar": (
            Schedule(heads=8, chunks=4, lag=0),
            Schedule(heads=8, chunks=2, lag=0, round_early=True),
        ),
    },
}
# The nearest to later ones: a matrix unit of 256.
DEFAULT_KIND = "TPU v6 lite"


def schedules(
    decay: str,
    T: int,
    H: int,
    Hk: int,
    Hv: int,
    K: int,
    V: int,
    chunk: int,
) -> tuple[Schedule, Schedule]:
    """The forward and the backward schedule, on the device that the call is compiled for.

    Args:
      decay: "vector", "scalar" or "none".
      T: tokens.
      H, Hk, Hv: query, key and value heads.
      K, V: channels, padded to whole registers.
      chunk: tokens in a chunk.

    Returns:
      (forward, backward).
    """
    # Linear attention without decay takes the schedules of scalar decays.
    schedules_of_device = TUNED.get(device_kind(), TUNED[DEFAULT_KIND])
    forward, backward = schedules_of_device["vector" if decay == "vector" else "scalar"]
    max_heads = max(1, LANES_IN_STEP // (K + V))
    return (
        fitted(forward, T, H, Hk, Hv, max_heads, chunk),
        fitted(backward, T, H, Hk, Hv, max_heads, chunk),
    )


def fitted(
    schedule: Schedule,
    T: int,
    H: int,
    Hk: int,
    Hv: int,
    max_heads: int,
    chunk: int,
) -> Schedule:
    """The schedule with as many heads and chunks in a step as the call has."""
    heads = 1
    for candidate in range(1, min(schedule.heads, max_heads) + 1):
        if _heads_fit(candidate, H, Hk, Hv):
            heads = candidate
    # No step of chunks that lie beyond T altogether.
    chunks = schedule.chunks
    while chunks > 1 and chunks // 2 * chunk >= T:
        chunks //= 2
    return schedule._replace(heads=heads, chunks=chunks)


def _heads_fit(heads: int, H: int, Hk: int, Hv: int) -> bool:
    """Whether blocks of `heads` query heads divide H, and divide or are divided by every group."""
    if H % heads != 0:
        return False
    for num_heads in (Hk, Hv):
        group_size = H // num_heads
        larger = max(heads, group_size)
        smaller = min(heads, group_size)
        # A block holds whole groups, or lies inside one.
        if larger % smaller != 0:
            return False
    return True
