"""What travels from `api.py` to a backend: the arrays of a call, and its static arguments."""

from typing import Literal, NamedTuple

from jax import Array
from jaxtyping import Float, Int

type DecayKind = Literal["vector", "scalar", "none"]


def decay_kind(log_decay: Array | None, segment_ids: Array | None) -> DecayKind:
    """Segments without decays are scalar decays: 0 where a document begins, else 1."""
    if log_decay is not None and log_decay.ndim == 4:
        return "vector"
    if log_decay is None and segment_ids is None:
        return "none"
    return "scalar"


class ScanInputs(NamedTuple):
    """The arrays of one call of `linear_scan`, as a backend gets them.

    log_decay is None, [B, T, H] or [B, T, H, K], where B may be 1. With `normalize` the state has
    Vs = V + 1 columns.

    Attributes:
      log_decay: natural logs of the decays, <= 0.
      bonus: the weight of a token's own write in its exclusive read (RWKV-6).
      initial_state: the state before the first token, in the dtype of the computation. None for
        zeros; only the kernels ("tpu", "gpu") get None.
      segment_ids: the packed document of every token; the state is reset where it changes.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T Hk K"]
    v: Float[Array, "B T Hv V"]
    log_decay: Float[Array, "#B T H"] | Float[Array, "#B T H K"] | None
    bonus: Float[Array, "H K"] | None
    initial_state: Float[Array, "B H K Vs"] | None
    segment_ids: Int[Array, "B T"] | None


class ScanOptions(NamedTuple):
    """The static arguments of `linear_scan`, with every default filled in.

    Attributes:
      scale: what q is multiplied by; 1.0 with `normalize`, which divides it out.
    """

    inclusive: bool
    scale: float
    reverse: bool
    normalize: bool
    chunk_size: int | None
    return_final_state: bool


class StepInputs(NamedTuple):
    """The arrays of one call of `linear_scan_step`: one token a row, and the state before it."""

    q: Float[Array, "B H K"]
    k: Float[Array, "B Hk K"]
    v: Float[Array, "B Hv V"]
    log_decay: Float[Array, "#B H"] | Float[Array, "#B H K"] | None
    bonus: Float[Array, "H K"] | None
    state: Float[Array, "B H K Vs"]


class StepOptions(NamedTuple):
    """The static arguments of `linear_scan_step`, with every default filled in.

    Attributes:
      scale: what q is multiplied by; 1.0 with `normalize`, which divides it out.
    """

    inclusive: bool
    scale: float
    normalize: bool
