"""Block sizes of the TPU kernels, as data; `benchmarks/tune_linear_scan.py` fills the table by model time.

A schedule changes only the time of a call. Where a call has fewer heads or tokens, or larger ones, than the row was
tuned for, it is cut down to what divides and fits.
"""

from kernels_pallas.common.device import device_kind
from kernels_pallas.linear_scan.tpu.plan import Schedule

MIN_CHUNK, MAX_CHUNK = 16, 128  # 16 rows fill a bfloat16 register, 128 scores a row of one
MAX_D = 512
LANES_IN_STEP = 8 * (
    128 + 256
)  # heads * (K + V) that a step was tuned for; more would not fit into VMEM

# device kind -> kind of decay -> (forward, backward). The device kind is what jax.Device.device_kind says.
TUNED = {
    "TPU v5 lite": {
        "vector": (Schedule(heads=8, chunks=2, lag=None), Schedule(heads=8, chunks=1, lag=6)),
        "scalar": (Schedule(heads=8, chunks=2, lag=0), Schedule(heads=8, chunks=2, lag=0)),
    },
    "TPU v5": {
        "vector": (Schedule(heads=8, chunks=2, lag=None), Schedule(heads=8, chunks=1, lag=6)),
        "scalar": (Schedule(heads=8, chunks=2, lag=0), Schedule(heads=8, chunks=2, lag=0)),
    },
    "TPU v6 lite": {
        "vector": (
            Schedule(heads=8, chunks=2, lag=6, round_early=True, stack=True),
            Schedule(heads=8, chunks=1, lag=4, round_early=True),
        ),
        "scalar": (
            Schedule(heads=8, chunks=4, lag=0),
            Schedule(heads=8, chunks=2, lag=0, round_early=True),
        ),
    },
}
DEFAULT_KIND = "TPU v6 lite"  # the nearest to later ones: a matrix unit of 256


def schedules(
    decay: str, T: int, H: int, Hk: int, Hv: int, K: int, V: int, chunk: int
) -> dict[str, Schedule]:
    """{"forward", "backward"} for a call on the device that it is compiled for."""
    row = TUNED.get(device_kind(), TUNED[DEFAULT_KIND])
    forward, backward = row["vector" if decay == "vector" else "scalar"]
    return {
        "forward": _fitted(forward, T, H, Hk, Hv, K, V, chunk),
        "backward": _fitted(backward, T, H, Hk, Hv, K, V, chunk),
    }


def _fitted(
    schedule: Schedule, T: int, H: int, Hk: int, Hv: int, K: int, V: int, chunk: int
) -> Schedule:
    most = max(1, min(schedule.heads, LANES_IN_STEP // (K + V)))
    fits = lambda n: H % n == 0 and all(max(n, H // h) % min(n, H // h) == 0 for h in (Hk, Hv))
    heads = max(n for n in range(1, most + 1) if fits(n))
    chunks = schedule.chunks
    while chunks > 1 and chunks // 2 * chunk >= T:
        chunks //= 2
    return schedule._replace(heads=heads, chunks=chunks)
