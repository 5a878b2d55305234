"""What travels from `api.py` to a backend: the arrays of a call, and its static arguments."""

from typing import NamedTuple

from jax import Array
from jaxtyping import Float, Int


class DeltaInputs(NamedTuple):
    """The arrays of one call of `delta_scan`, as a backend gets them.

    H counts states, as v does: query head h // (H / Hq) and key head h // (H / Hk) belong to state
    h. beta is given unless both `erase` and `write` are.

    Attributes:
      beta: how much of what a key finds in the state is replaced by its value.
      log_decay: natural logs of the decays, <= 0.
      erase: the key by which the state is read and erased, in place of beta k.
      write: the weight of each channel of v, in place of beta.
      initial_state: the state before the first token, in the dtype of the computation. None for
        zeros; only the kernels ("tpu", "gpu") get None.
      segment_ids: the packed document of every token; the state is reset where it changes.
    """

    q: Float[Array, "B T Hq K"]
    k: Float[Array, "B T Hk K"]
    v: Float[Array, "B T H V"]
    beta: Float[Array, "B T H"] | None
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None
    erase: Float[Array, "B T H K"] | None
    write: Float[Array, "B T H V"] | None
    initial_state: Float[Array, "B H K V"] | None
    segment_ids: Int[Array, "B T"] | None


class DeltaOptions(NamedTuple):
    """The static arguments of `delta_scan`, with every default filled in.

    Attributes:
      scale: what q is multiplied by, after its normalization.
      l2_norm: whether q and k are first divided by their length.
    """

    scale: float
    l2_norm: bool
    chunk_size: int | None
    return_final_state: bool


class DeltaStepInputs(NamedTuple):
    """The arrays of one call of `delta_scan_step`: one token a row, and the state before it."""

    q: Float[Array, "B Hq K"]
    k: Float[Array, "B Hk K"]
    v: Float[Array, "B H V"]
    beta: Float[Array, "B H"] | None
    log_decay: Float[Array, "B H"] | Float[Array, "B H K"] | None
    erase: Float[Array, "B H K"] | None
    write: Float[Array, "B H V"] | None
    state: Float[Array, "B H K V"]


class DeltaStepOptions(NamedTuple):
    """The static arguments of `delta_scan_step`, with every default filled in."""

    scale: float
    l2_norm: bool
