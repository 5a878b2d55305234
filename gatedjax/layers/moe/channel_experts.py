"""Experts out of a dense model's channels, and a router before all layers (Read-ME, arXiv
2410.19123).

    kept_i    = the half of a layer's channels with the largest mean |activation| on texts i
    permanent = those that all texts keep,   expert_i = kept_i without them

A token's label for the router is the expert that holds most of the channels that are largest for
it. As all layers go by the same choice, known before the first of them, experts can be loaded ahead
of use, and of those in memory the one can go whose next use is farthest (Belady).
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from gatedjax.errors import require

# Fractions of a token's channels, largest first, that are looked for among the experts'.
FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5)
SHARPNESS = 10.0
# Of the two parts of the router's loss, and the smoothing of the first one's labels.
HARD, SOFT, SMOOTHING = 0.75, 0.25, 0.5

Policy = Literal["recent", "ahead"]


class Channels(NamedTuple):
    """The channels of a layer by who has them: everybody, or one of the experts."""

    permanent: Int[np.ndarray, " S"]
    own: Int[np.ndarray, "E O"]


def kept_channels(
    means: Float[np.ndarray, "E F"],
    fraction: float = 0.5,
) -> Bool[np.ndarray, "E F"]:
    """The channels with the largest means, the same number for each text.

    Args:
      means: of |activation|, on each text.
      fraction: of the channels.
    """
    count = round(fraction * means.shape[1])
    places = np.argsort(np.argsort(-means, axis=1, kind="stable"), axis=1, kind="stable")
    return places < count


def split_channels(kept: Bool[np.ndarray, "E F"]) -> Channels:
    """Who has which channels.

    Raises:
      InputError: all texts keep the same ones, so that there are no experts.
    """
    is_permanent = kept.all(axis=0)
    own = kept & ~is_permanent
    # As many for each: all keep the same number, and the permanent ones are theirs too.
    require(bool(own.any()), "texts", "the same channels for all", "texts that differ")
    return Channels(np.flatnonzero(is_permanent), np.stack([np.flatnonzero(row) for row in own]))


def expert_matrices(
    gate: Float[Array, "M F"],
    up: Float[Array, "M F"],
    down: Float[Array, "F M"],
    channels: Channels,
) -> dict[tuple[str, ...], Array]:
    """The parameters of a sparse layer whose shared expert has the permanent channels.

    Args:
      gate, up, down: of the gated MLP.
      channels: of the layer.
    """
    matrices: dict[tuple[str, ...], Array] = {
        ("gate",): jnp.moveaxis(gate[:, channels.own], 0, 1),
        ("up",): jnp.moveaxis(up[:, channels.own], 0, 1),
        ("down",): down[channels.own],
    }
    if channels.permanent.size:
        matrices |= {
            ("shared", "gate", "kernel"): gate[:, channels.permanent],
            ("shared", "up", "kernel"): up[:, channels.permanent],
            ("shared", "down", "kernel"): down[channels.permanent],
        }
    return matrices


def overlaps(
    activations: Float[Array, "... F"],
    kept: Bool[Array, "E F"],
) -> Float[Array, "... E"]:
    """How much of a token's largest channels each expert holds, centered, times 10.

    A mean over several fractions of the channels.
    """
    size = activations.shape[-1]
    order = jnp.argsort(-jnp.abs(activations), axis=-1)
    places = jnp.argsort(order, axis=-1)
    found = []
    for fraction in FRACTIONS:
        count = max(1, round(fraction * size))
        is_large = (places < count).astype(jnp.float32)
        found.append(is_large @ kept.T.astype(jnp.float32) / count)
    mean = sum(found) / len(found)
    return SHARPNESS * (mean - jnp.mean(mean, axis=-1, keepdims=True))


def router_loss(
    logits: Float[Array, "... E"],
    wanted: Float[Array, "... E"],
) -> Float[Array, "..."]:
    """Cross-entropy with the best expert, smoothed, and with the softmax of all.

    Args:
      logits: of the router.
      wanted: `overlaps` of a layer.
    """
    log_p = jax.nn.log_softmax(logits, axis=-1)
    count = logits.shape[-1]
    best = jax.nn.one_hot(jnp.argmax(wanted, axis=-1), count)
    smooth = (1 - SMOOTHING) * best + SMOOTHING / count
    targets = HARD * smooth + SOFT * jax.nn.softmax(wanted, axis=-1)
    return -jnp.sum(jax.lax.stop_gradient(targets) * log_p, axis=-1)


def prefetch_order(experts: Sequence[int]) -> list[tuple[int, int]]:
    """(token, expert) of each first use, in order: when which expert has to be there."""
    first: dict[int, int] = {}
    for place, expert in enumerate(experts):
        first.setdefault(int(expert), place)
    return [(place, expert) for expert, place in first.items()]


def loads(experts: Sequence[int], capacity: int, policy: Policy) -> int:
    """How often an expert is loaded, where so many have room.

    Args:
      experts: of the tokens, one after the other.
      capacity: experts in memory at once.
      policy: who goes: recent, who was used longest ago; ahead, whose next use is farthest.

    Raises:
      InputError: no room.
    """
    require(capacity > 0, "capacity", capacity, "at least 1")
    uses: Mapping[int, list[int]] = {int(e): [] for e in experts}
    for place, expert in enumerate(experts):
        uses[int(expert)].append(place)
    last: dict[int, int] = {}
    held: set[int] = set()
    count = 0

    def next_use(expert: int, place: int) -> float:
        return next((use for use in uses[expert] if use > place), float("inf"))

    for place, expert in enumerate(int(e) for e in experts):
        if expert not in held:
            count += 1
            if len(held) == capacity:
                if policy == "recent":
                    held.remove(min(held, key=lambda e: last[e]))
                else:
                    held.remove(max(held, key=lambda e: next_use(e, place)))
            held.add(expert)
        last[expert] = place
    return count
