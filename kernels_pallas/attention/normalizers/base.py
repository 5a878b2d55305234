"""How a row of logits becomes weights on values: one small object per normalizer.

    o_i = sum_j W_ij v_j,   W_i = a normalizer of the logits s_i of the keys that row i sees

Every backend uses these objects. They work on tiles, R rows against C keys, as pure functions of
arrays; backends differ in which tiles they compute and where they keep the sums. The forward pass
over the keys of some rows:

    row = normalizer.start(zero, known, sink)        the statistics of a row: a tuple of [R, 1]
    for every tile of keys:
        row, keep, weights = normalizer.add(row, s, seen, keys)
        sums[n] = keep * sums[n] + weights[n] @ v    for n < normalizer.sums; keep None is 1
    row, sums = normalizer.merge(row, sums)          only where the keys were split among programs
    outputs, saved = normalizer.finish(row, sums)    outputs[0] is o; saved is a tuple of [R, 1]

Some have learned numbers, one a head each (`parameters`): `prepare` gets them as [R, 1], hands them
on in what it found, and `finish` saves what their gradient needs.

and the backward pass:

    deltas = [sum(do * outputs[n]) for n in normalizer.deltas]      [R, 1] each
    for every tile of keys:
        weights, ds = normalizer.gradient(s, seen, keys, do @ v^T, deltas, saved)
        dv += weights^T @ do;  dq and dk come from ds

Of the outputs, o and those in `deltas` are kept for the backward pass.

`seen` is the mask of the tile, None if every key is seen. `keys` [1, C] are the keys' positions,
for normalizers that single out one key. `gradient` works element by element, so that it also takes
transposed tiles: [C, R] with statistics [1, R] and keys [C, 1]. `zero` is zeros [R, 1]; everything
has its dtype, float32 or float64. Reductions keep their axis, and nothing is gathered: kernels can
do neither.

Normalizers of this file and of `singlepass.py` need one pass over the keys. Those of `multipass.py`
learn something of a row first (`prepare`). A row that sees nothing ends as zeros, with zero
gradients; one that sees logits of -inf alone does too, and if that should be NaN (`from_maximum`)
the backends say so: they know which rows see something.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# What is kept of a row: [R, 1] each.
Row = tuple[Array, ...]
# add(row, s, seen, keys): the row after a tile.
AddTile = Callable[[Row, Array, Array | None, Array], Row]
# pass_over_keys(start, add): the row after every tile of its keys.
KeyPass = Callable[[Row, AddTile], Row]


class Elementary(NamedTuple):
    """The elementary functions that weights are made of. A kernel may have faster ones."""

    exp: Callable[[Array], Array] = jnp.exp
    # The inverse of `exp`.
    log: Callable[[Array], Array] = jnp.log
    sigmoid: Callable[[Array], Array] = jax.nn.sigmoid


class Added(NamedTuple):
    """What a tile does to a row."""

    # The statistics after the tile.
    row: Row
    # What the sums so far are multiplied by [R, 1]; None if they stay.
    keep: Array | None
    # The tile's weights [R, C], for each of the sums.
    weights: tuple[Array, ...]


@dataclass(frozen=True)
class Normalizer:
    """The contract, and what most normalizers have in common.

    A new one is a frozen dataclass, because it is a static argument.
    """

    # How many sums of weighted values a row keeps.
    sums: ClassVar[int] = 1
    # The outputs whose product with do the backward pass needs.
    deltas: ClassVar[tuple[int, ...]] = (0,)
    # Passes over the keys, forward; more than one go with `prepare`.
    passes: ClassVar[int] = 1
    # Whether `start` knows what to do with a sink.
    takes_sinks: ClassVar[bool] = False
    # Whether logits count from their row's maximum: then a row whose every logit is -inf is NaN.
    # With one pass the maximum is the first of a row's statistics.
    from_maximum: ClassVar[bool] = False
    # Whether a key whose logit is -inf is as good as one that is not seen, in every method.
    hidden_by_logit: ClassVar[bool] = False
    # Whether weights may be below 0.
    has_negative_weights: ClassVar[bool] = False
    # The names of learned numbers, one a head each, and what they are if the caller gives none.
    parameters: ClassVar[Mapping[str, float]] = {}
    # How a kernel takes exponentials; no part of what the normalizer is.
    functions: Elementary = field(default=Elementary(), kw_only=True, repr=False)

    def for_length(self, length: int) -> "Normalizer":
        """The normalizer with what depends on the number of keys filled in."""
        return self

    def prepare(
        self,
        pass_over_keys: KeyPass,
        zero: Array,
        parameters: Row = (),
    ) -> Row:
        """What must be known of a row before its keys are weighed: its parameters at least."""
        return parameters

    def start(
        self,
        zero: Array,
        known: Row = (),
        sink: Array | None = None,
    ) -> Row:
        """The statistics of a row before the first tile; `known` is what `prepare` found."""
        return ()

    def add(
        self,
        row: Row,
        s: Array,
        seen: Array | None,
        keys: Array,
    ) -> Added:
        """One tile of logits `s` [R, C]."""
        raise NotImplementedError

    def merge(
        self,
        row: Row,
        sums: Sequence[Array],
    ) -> tuple[Row, list[Array]]:
        """Rows of N parts of the keys as one row, for caches that are split.

        Statistics are [N, R, 1] each, sums [N, R, V]; the results lack the first axis.
        """
        return (), [jnp.sum(x, axis=0) for x in sums]

    def finish(
        self,
        row: Row,
        sums: Sequence[Array],
    ) -> tuple[tuple[Array, ...], Row]:
        """(outputs [R, V] each, what the backward pass must know of a row)."""
        return tuple(sums), ()

    def gradient(
        self,
        s: Array,
        seen: Array | None,
        keys: Array,
        dp: Array,
        deltas: Sequence[Array],
        saved: Row,
    ) -> tuple[Array, Array]:
        """A tile of the backward pass, in either orientation.

        Args:
          s, seen, keys: as of `add`.
          dp: the gradient of the weights, do v^T.
          deltas: sum(do * output) of a row, for the outputs in `self.deltas`.
          saved: as `finish` returned it.

        Returns:
          The tile's final weights, and the gradient of its logits.

        Raises:
          NotImplementedError: a normalizer without a gradient.
        """
        raise NotImplementedError

    def sink_gradient(
        self,
        sink: Array,
        deltas: Sequence[Array],
        saved: Row,
    ) -> Array:
        """The gradient of a row's sink [R, 1]."""
        raise NotImplementedError

    def parameter_gradients(
        self,
        deltas: Sequence[Array],
        saved: Row,
    ) -> Row:
        """What a row adds to the gradient of each of its head's `parameters`, [R, 1] each."""
        return ()


@dataclass(frozen=True)
class Softmax(Normalizer):
    """exp(s) / sum exp(s), its maximum and sum kept online (arXiv 1805.02867).

    With a learned sink b per head exp(b) joins the sum (gpt-oss; b = 0 is "softmax plus one").
    """

    takes_sinks: ClassVar[bool] = True
    from_maximum: ClassVar[bool] = True
    hidden_by_logit: ClassVar[bool] = True

    def start(
        self,
        zero: Array,
        known: Row = (),
        sink: Array | None = None,
    ) -> Row:
        if sink is None:
            # No maximum and no sum yet.
            return zero - jnp.inf, zero
        # A sink is a key without a value: the first maximum of the row, with weight 1.
        # A sink of -inf is none.
        total = (sink > -jnp.inf).astype(zero.dtype)
        return sink, total

    def add(
        self,
        row: Row,
        s: Array,
        seen: Array | None,
        keys: Array,
    ) -> Added:
        before, total = row
        s = masked(s, seen)
        # Masked logits are -inf, and their p is 0.
        m, p, keep = online_exp(before, s, row_max(s), self.functions.exp)
        total = keep * total + row_sum(p)
        return Added((m, total), keep, (p,))

    def merge(
        self,
        row: Row,
        sums: Sequence[Array],
    ) -> tuple[Row, list[Array]]:
        m, total, *sums = at_one_maximum(*row, *sums, exp=self.functions.exp)
        return (m, total), sums

    def finish(
        self,
        row: Row,
        sums: Sequence[Array],
    ) -> tuple[tuple[Array, ...], Row]:
        m, total = row
        o = sums[0] * inverse(total)
        # One number a row is enough to compute its weights again; -inf if it saw nothing.
        lse = m + self.functions.log(total)
        return (o,), (lse,)

    def gradient(
        self,
        s: Array,
        seen: Array | None,
        keys: Array,
        dp: Array,
        deltas: Sequence[Array],
        saved: Row,
    ) -> tuple[Array, Array]:
        (lse,) = saved
        p = self.functions.exp(masked(s, seen) - finite(lse))
        # ds_j = p_j (dp_j - sum_i p_i dp_i), and that sum is sum(do * o).
        return p, p * (dp - deltas[0])

    def sink_gradient(
        self,
        sink: Array,
        deltas: Sequence[Array],
        saved: Row,
    ) -> Array:
        # As ds of a key whose value is 0, and so its dp.
        (lse,) = saved
        return -self.functions.exp(sink - finite(lse)) * deltas[0]


# Parameters that normalizers share.


def checked_integer(
    name: str,
    value: Any,
    least: int,
) -> int:
    """An integer parameter of a normalizer as a Python number.

    Args:
      name: the normalizer and the parameter, for the error.
      value: what the caller gave.
      least: the least that has a meaning.

    Returns:
      The integer.

    Raises:
      ValueError: it is none, or less.
    """
    # To Python a bool is an integer too.
    is_bool = isinstance(value, bool | np.bool_)
    if is_bool or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name}: got {value!r}, expected an integer from {least} on")
    return int(value)


def set_length(normalizer: Normalizer, length: Any) -> None:
    """Checks the number of keys that a normalizer is made for; None if it is not known yet."""
    if length is not None:
        name = f"{type(normalizer).__name__}: length"
        # The dataclass is frozen, so that it is hashable.
        object.__setattr__(normalizer, "length", checked_integer(name, length, 1))


# Arithmetic that normalizers share.


def row_sum(x: Array) -> Array:
    """[R, C] -> [R, 1]."""
    return jnp.sum(x, axis=-1, keepdims=True)


def row_max(x: Array) -> Array:
    """[R, C] -> [R, 1]."""
    return jnp.max(x, axis=-1, keepdims=True)


def masked(s: Array, seen: Array | None) -> Array:
    """The logits, -inf where a key is not seen."""
    return s if seen is None else jnp.where(seen, s, -jnp.inf)


def finite(m: Array) -> Array:
    """0 where a row has seen nothing, so that -inf - m stays -inf and is no NaN."""
    return jnp.where(m == -jnp.inf, 0, m)


def inverse(total: Array) -> Array:
    """1 / total; 0 for a row that has seen nothing."""
    # The inner `where` keeps the division, and its derivative, finite.
    return jnp.where(total == 0, 0, 1 / jnp.where(total == 0, 1, total))


def relu(s: Array) -> Array:
    """max(s, 0); NaN stays NaN, which the maximum of a GPU would make 0."""
    return jnp.where(s < 0, 0, s)


def softplus(s: Array, exp: Callable[[Array], Array] = jnp.exp) -> Array:
    """log(1 + e^s), without overflow."""
    return jnp.maximum(s, 0) + jnp.log1p(exp(-jnp.abs(s)))


def visible(s: Array, seen: Array | None) -> Array:
    """1 where a key is seen, 0 elsewhere, in the dtype of the logits."""
    return jnp.ones_like(s) if seen is None else seen.astype(s.dtype)


def undefined_as_nan(
    normalizer: Normalizer,
    row: Row,
    sums: Sequence[Array],
    sees: Array | bool = True,
) -> list[Array]:
    """Makes NaN of rows that see keys, but no logit above -inf: 0 / 0.

    Args:
      normalizer: of one pass.
      row: the statistics after the last tile, [R, 1] or [R, V] each.
      sums: the weighted sums of values, [R, V] each.
      sees: whether a row sees any key, [R, 1].

    Returns:
      The sums for `Normalizer.finish`.
    """
    if not normalizer.from_maximum:
        return list(sums)
    is_undefined = (row[0] == -jnp.inf) & sees
    return [jnp.where(is_undefined, jnp.nan, x) for x in sums]


class OnlineExp(NamedTuple):
    """A tile's exponentials, taken at the row's maximum so far."""

    # That maximum [R, 1].
    m: Array
    # exp(s - m) [R, C].
    p: Array
    # What sums at the maximum before the tile are multiplied by [R, 1].
    keep: Array


def online_exp(
    before: Array,
    s: Array,
    largest: Array,
    exp: Callable[[Array], Array] = jnp.exp,
) -> OnlineExp:
    """Moves a row to a new maximum.

    Args:
      before: the maximum before the tile, [R, 1].
      s: the masked logits.
      largest: the maximum of `s`, [R, 1].
      exp: how exponentials are taken.

    Returns:
      The tile's exponentials.
    """
    m = jnp.maximum(before, largest)
    # A row that has seen nothing has m = -inf, and p = keep = 0.
    shift = finite(m)
    p = exp(s - shift)
    keep = exp(before - shift)
    return OnlineExp(m, p, keep)


def at_one_maximum(
    m: Array,
    *sums: Array,
    exp: Callable[[Array], Array] = jnp.exp,
) -> tuple[Array, ...]:
    """The largest of N parts' maxima [N, R, 1]; then their sums [N, ...], added up at that one."""
    most = jnp.max(m, axis=0)
    # 0 for a part that has seen nothing.
    keep = exp(m - finite(most))
    return most, *(jnp.sum(keep * x, axis=0) for x in sums)
