"""Block sizes of the TPU kernels of `attention`, as data.

`benchmarks/tune_attention.py` fills the table by model time. A schedule changes only the time of a
call.
"""

from kernels_pallas.attention.tpu.plan import LANES, Schedule
from kernels_pallas.common.device import device_kind
from kernels_pallas.common.padding import round_up

MAX_D = 256

# device kind -> lanes of the larger of K and V -> (forward, backward). The device kind is that of
# jax.Device.device_kind.
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
# For chips without a row of their own: later ones have a matrix unit of 256, as v6e has.
DEFAULT_KIND = "TPU v6 lite"
# Of VMEM, for the float32 sums of dk and dv of a span of keys.
SPAN_BYTES = 16 * 2**20


def schedules(
    T: int,
    K: int,
    V: int,
    window: int | None,
    num_keys: int | None = None,
) -> dict[str, Schedule]:
    """The schedules of a call on the device that it is compiled for.

    Args:
      T: tokens in a row.
      K: channels of a query and a key, in whole lanes.
      V: channels of a value, in whole lanes.
      window: of the call.
      num_keys: tokens in a row of keys; None if they are those of the queries.

    Returns:
      {"forward": ..., "backward": ...}
    """
    table = TUNED.get(device_kind(), TUNED[DEFAULT_KIND])
    forward, backward = table[max(K, V)]
    # A row of dk and a row of dv, in float32.
    bytes_per_key = 4 * (K + V)
    backward = backward._replace(span=SPAN_BYTES // bytes_per_key)
    of_queries = {
        "forward": _fitted(forward, T, window),
        "backward": _fitted(backward, T, window),
    }
    if num_keys is None:
        return of_queries
    of_keys = {
        "forward": _fitted(forward, num_keys, window),
        "backward": _fitted(backward, num_keys, window),
    }
    return {way: across_sequences(way, of_queries[way], of_keys[way]) for way in of_queries}


def across_sequences(
    way: str,
    of_queries: Schedule,
    of_keys: Schedule,
) -> Schedule:
    """The schedule of a kernel whose keys are of another sequence than its queries.

    Args:
      way: "forward" or "backward".
      of_queries: fitted to the queries.
      of_keys: fitted to the keys.

    Returns:
      Tiles with as many queries as the one has, and as many keys as the other.
    """
    # Groups of rows are of queries forward, and of keys backward, as spans are.
    fitted = of_queries if way == "forward" else of_keys
    return fitted._replace(block=of_queries.block, key_block=of_keys.block)


def _fitted(schedule: Schedule, T: int, window: int | None) -> Schedule:
    """The schedule for T tokens, with blocks not much larger than the window."""
    if window is not None:
        # A larger block would mostly compute what the mask hides.
        most = max(2 * LANES, round_up(window, LANES))
        schedule = schedule._replace(
            block=min(schedule.block, most),
            rows=min(schedule.rows, most),
        )
    return schedule.fitted(T)
