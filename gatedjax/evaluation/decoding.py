"""The decoding loop: many tokens in one call of a compiled program.

A token of a small model takes less time than Python needs to start a program, so the loop over
tokens is inside it; how many, the caller says at run time. In that loop the layers are unrolled and
every one has its own parameters and cache: a scan over stacked layers would copy those of a layer,
all of a model's weights, for every token.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int, PyTree

from gatedjax.compiler_options import careful_jit
from gatedjax.config import ModelConfig
from gatedjax.evaluation.filters import Sampling, sample_token
from gatedjax.model import Caches, LanguageModel, head_weights
from gatedjax.output import to_logits
from gatedjax.sharding import RULES
from gatedjax.training.memory import device_memory

# Tokens that a call can give, at most.
MOST_STEPS = 64
# Models with more layers are compiled as a scan, whatever it costs to run.
MOST_UNROLLED_LAYERS = 128

# The part of the parameters that the model stacks over periods.
_STACKED = "periods"


@struct.dataclass
class Rows:
    """Rows that are being continued, between two tokens.

    Attributes:
      token: the last one, which the caches do not hold yet.
      caches: of the tokens before it, as `for_decoding` has them.
      count: how many tokens were sampled.
      is_done: rows whose tokens nobody wants any more.
      keys: the randomness of each row.
    """

    token: Int[Array, " B"]
    caches: Caches
    count: Int[Array, ""]
    is_done: Bool[Array, " B"]
    keys: Array


class Steps(NamedTuple):
    """What a call of `decode` gives.

    Attributes:
      tokens: by step and row; the first `count` steps count.
      count: as many as were asked for, fewer if all rows were done.
      rows: after them.
    """

    tokens: Int[Array, "steps B"]
    count: Int[Array, ""]
    rows: Rows


def is_worth_unrolling(model: ModelConfig, params: PyTree) -> bool:
    """Whether the layers get parameters of their own: a copy must fit, and the program compile."""
    available = device_memory(jax.local_devices()[0])
    needed = sum(x.nbytes for x in jax.tree.leaves((params, params[_STACKED])))
    has_room = available is None or needed <= available
    return has_room and model.num_layers <= MOST_UNROLLED_LAYERS


@careful_jit
def params_for_decoding(params: PyTree) -> PyTree:
    """The parameters with those of every layer by themselves, for `decode`."""
    stacked = params[_STACKED]
    num_periods = jax.tree.leaves(stacked)[0].shape[0]
    return {**params, _STACKED: _by_period(stacked, num_periods)}


@functools.partial(careful_jit, static_argnums=(0, 1))
def _caches_by_layer(names: tuple[str, ...], num_periods: int, caches: Caches) -> Caches:
    return _changed_layers(caches, functools.partial(_split, names, num_periods))


def caches_for_decoding(params: PyTree, caches: Caches) -> Caches:
    """The caches as `decode` takes them with these parameters."""
    if not _is_by_layer(params):
        return caches
    periods = params[_STACKED]
    return _caches_by_layer(tuple(periods[0]), len(periods), caches)


@functools.partial(careful_jit, static_argnums=(0, 1))
def first_token(
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    logits: Float[Array, "B X"],
    keys: Array,
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """The token after the prompt, row by row, and whether it ends the row."""
    token = _sampled(sampling, logits, keys, jnp.zeros((), jnp.int32))
    return token, _is_stop(token, stop_ids)


@functools.partial(careful_jit, static_argnums=(0, 1, 2), donate_argnums=4)
def decode(
    model: ModelConfig,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    params: PyTree,
    rows: Rows,
    steps: Int[Array, ""] | int,
    vocab_size: Int[Array, ""] | int,
) -> Steps:
    """Continues rows by up to `steps` tokens.

    Args:
      model: the model's configuration.
      sampling: how a token is chosen.
      stop_ids: tokens after which a row is done.
      params: of the model, or of `params_for_decoding`, which is faster.
      rows: what came before. Their memory is reused.
      steps: how many tokens a row, at most MOST_STEPS; fewer if all rows are done before.
      vocab_size: of the tokenizer: ids from here on are never chosen.
    """
    if _is_by_layer(params):
        model = dataclasses.replace(model, scan_layers=False)
    out = jnp.zeros((MOST_STEPS, rows.token.shape[0]), jnp.int32)

    def goes_on(state: tuple[Array, Rows, Array]) -> Bool[Array, ""]:
        step, rows, _ = state
        return (step < steps) & ~jnp.all(rows.is_done)

    def one_token(state: tuple[Array, Rows, Array]) -> tuple[Array, Rows, Array]:
        step, rows, out = state
        logits, caches = _forward(model, params, rows, vocab_size)
        token = _sampled(sampling, logits, rows.keys, rows.count)
        after = Rows(
            token=token,
            caches=caches,
            count=rows.count + 1,
            is_done=rows.is_done | _is_stop(token, stop_ids),
            keys=rows.keys,
        )
        return step + 1, after, out.at[step].set(token)

    start = (jnp.zeros((), jnp.int32), rows, out)
    count, rows, out = jax.lax.while_loop(goes_on, one_token, start)
    return Steps(out, count, rows)


def real_tokens(logits: Float[Array, "B X"], vocab_size: Array | int) -> Float[Array, "B X"]:
    """-inf for the padding of the vocabulary."""
    is_token = jnp.arange(logits.shape[-1]) < vocab_size
    return jnp.where(is_token, logits, -jnp.inf)


def row_keys(seed: int, numbers: Sequence[int]) -> Array:
    """The randomness of each row: what it is given does not depend on its neighbors."""
    fold_in = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return fold_in(jax.random.key(seed), jnp.asarray(numbers, jnp.uint32))


def _forward(
    model: ModelConfig,
    params: PyTree,
    rows: Rows,
    vocab_size: Array | int,
) -> tuple[Float[Array, "B X"], Caches]:
    """The logits after each row's last token, and the caches with it."""
    caches = rows.caches
    periods = params[_STACKED]
    is_by_layer = _is_by_layer(params)
    if is_by_layer:
        # What is stacked here, the layers take apart again: XLA does neither.
        params = {**params, _STACKED: _stacked(periods)}
        caches = _changed_layers(caches, _joined)
    with nn.logical_axis_rules(RULES):
        outputs: Any = LanguageModel(model).apply(
            {"params": params},
            rows.token[:, None],
            caches=caches,
        )
    hidden, caches, _ = outputs
    logits = to_logits(model, params)(hidden[:, -1], head_weights(params))
    if is_by_layer:
        split = functools.partial(_split, tuple(periods[0]), len(periods))
        caches = _changed_layers(caches, split)
    return real_tokens(logits, vocab_size), caches


def _sampled(
    sampling: Sampling,
    logits: Float[Array, "B X"],
    keys: Array,
    count: Int[Array, ""],
) -> Int[Array, " B"]:
    """A token a row, after `count` others."""

    def of_row(logits: Float[Array, " X"], key: Array) -> Int[Array, ""]:
        key = jax.random.fold_in(key, count)
        return sample_token(logits[None], key, *sampling)[0]

    return jax.vmap(of_row)(logits, keys)


def _is_stop(token: Int[Array, " B"], stop_ids: tuple[int, ...]) -> Bool[Array, " B"]:
    if not stop_ids:
        return jnp.zeros(token.shape, bool)
    return jnp.isin(token, jnp.asarray(stop_ids, jnp.int32))


def _is_by_layer(params: PyTree) -> bool:
    return isinstance(params[_STACKED], list)


def _changed_layers(caches: Caches, change: Callable[[Any], Any]) -> Caches:
    """The caches, those of a first pass too, with `change` made to those of the layers."""
    first_pass = caches.first_pass
    if first_pass is not None:
        first_pass = _changed_layers(first_pass, change)
    return dataclasses.replace(caches, layers=change(caches.layers), first_pass=first_pass)


def _split(
    names: tuple[str, ...],
    num_periods: int,
    layers: Mapping[str, Any],
) -> dict[str, Any]:
    """The caches of the blocks `names`, which are stacked, period by period; the others as is."""
    stacked = {name: layers[name] for name in names}
    others = {name: cache for name, cache in layers.items() if name not in names}
    return {**others, _STACKED: _by_period(stacked, num_periods)}


def _joined(layers: Mapping[str, Any]) -> dict[str, Any]:
    """What `_split` took apart."""
    others = {name: cache for name, cache in layers.items() if name != _STACKED}
    return {**others, **_stacked(layers[_STACKED])}


def _by_period(tree: PyTree, num_periods: int) -> list[PyTree]:
    """Period by period, what is stacked over periods; a period may hold no arrays."""

    def of_period(period: int) -> PyTree:
        return jax.tree.map(lambda x: x[period], tree)

    return [of_period(period) for period in range(num_periods)]


def _stacked(trees: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *of_periods: jnp.stack(of_periods), *trees)
