"""Block sizes of the TPU kernels of `attention`, as data.

`benchmarks/tune_attention.py` fills the table by model time. A schedule changes only the time of a call.
"""

from kernels_pallas.attention.tpu.plan import LANES, Schedule
from kernels_pallas.common.device import device_kind

MAX_D = 256

# device kind -> lanes of the larger of K and V -> (forward, backward). The device kind is jax.Device.device_kind's.
TUNED = {
    "TPU v5 lite": {
        128: (Schedule(block=2048, rows=128), Schedule(block=2048, rows=128)),
        256: (Schedule(block=1024, rows=128), Schedule(block=1024, rows=256)),
    },
    "TPU v5": {
        128: (Schedule(block=2048, rows=128), Schedule(block=2048, rows=256)),
        256: (Schedule(block=1024, rows=128), Schedule(block=1024, rows=256)),
    },
    "TPU v6 lite": {
        128: (Schedule(block=2048, rows=128), Schedule(block=1024, rows=128)),
        256: (Schedule(block=1024, rows=256), Schedule(block=1024, rows=256)),
    },
}
DEFAULT_KIND = "TPU v6 lite"  # the nearest to later ones: a matrix unit of 256
SPAN_BYTES = 16 * 2**20  # of float32 sums of dk and dv in VMEM


def schedules(T: int, K: int, V: int, window: int | None) -> dict[str, Schedule]:
    """{"forward", "backward"} for a call on the device that it is compiled for."""
    forward, backward = TUNED.get(device_kind(), TUNED[DEFAULT_KIND])[max(K, V)]
    backward = backward._replace(span=SPAN_BYTES // (4 * (K + V)))
    return {"forward": _fitted(forward, T, window), "backward": _fitted(backward, T, window)}


def _fitted(schedule: Schedule, T: int, window: int | None) -> Schedule:
    """A block much larger than the window would mostly compute what the mask hides."""
    if window is not None:
        most = max(2 * LANES, -(-window // LANES) * LANES)
        schedule = schedule._replace(block=min(schedule.block, most), rows=min(schedule.rows, most))
    return schedule.fitted(T)
