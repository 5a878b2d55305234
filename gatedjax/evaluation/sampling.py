"""Sampling from a model: prefill the prompt, then token by token with explicit caches.

A document begins with the end-of-document token (docs/tokens.md): it stands before every prompt,
and is all there is of an empty one.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, PyTree

from gatedjax.compiler_options import careful_jit
from gatedjax.config import ModelConfig
from gatedjax.data.tokenizer import Tokenizer
from gatedjax.errors import require
from gatedjax.evaluation import decoding
from gatedjax.evaluation.filters import Sampling
from gatedjax.evaluation.prompt_text import as_text
from gatedjax.evaluation.text_stream import TextUntil
from gatedjax.layers import MIXERS
from gatedjax.model import Caches, LanguageModel, head_weights, init_caches
from gatedjax.output import to_logits
from gatedjax.sharding import RULES

# Prompts are padded to a few lengths, so that few programs are compiled: multiples of this, and
# from 8 of these on of larger steps, of which 8 to 16 make a length.
LEAST_LENGTH_STEP = 16
# Seconds that a reader waits for tokens, of which several are computed at a time.
LONGEST_WAIT = 0.1


@functools.partial(careful_jit, static_argnums=0, donate_argnums=3)
def forward(
    model: ModelConfig,
    params: PyTree,
    tokens: Int[Array, "B T"],
    caches: Caches,
    vocab_size: Int[Array, ""] | int,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B X"], Caches]:
    """Logits of the token after each row's last one, and the caches with `tokens` in them.

    Args:
      model: the model's configuration.
      params: parameters and router state.
      tokens: a prompt (prefill), a further piece of it, or one token a row (decoding).
      caches: what the model keeps of the tokens before. Their memory is reused.
      vocab_size: of the tokenizer: ids from here on are padding and get -inf.
      segment_ids: 0 for padding, on either side of a row's tokens; None for rows without padding.
    """
    # A second decoder, which holds nothing of the tokens, sees the last one alone.
    last_alone = tokens.shape[1] > 1 and model.cross_decoder is not None
    with nn.logical_axis_rules(RULES):
        outputs: Any = LanguageModel(model, last_alone=last_alone).apply(
            {"params": params},
            tokens,
            segment_ids=segment_ids,
            caches=caches,
        )
    hidden, caches, _ = outputs
    last = hidden[:, -1]
    if segment_ids is not None and not last_alone:
        place = jnp.arange(tokens.shape[1])
        last_place = jnp.max(jnp.where(segment_ids != 0, place, 0), axis=1)
        last = jnp.take_along_axis(hidden, last_place[:, None, None], axis=1)[:, 0]
    logits = to_logits(model, params)(last, head_weights(params))
    return decoding.real_tokens(logits, vocab_size), caches


class Decoder:
    """A model that is ready to continue prompts, batch after batch."""

    def __init__(self, model: ModelConfig, params: PyTree, vocab_size: int):
        """Nothing is computed yet.

        Args:
          model: the model's configuration.
          params: parameters and router state.
          vocab_size: of the tokenizer.
        """
        self.model = model
        self.params = params
        self.vocab_size = vocab_size

    @functools.cached_property
    def by_layer(self) -> PyTree:
        """The parameters as the decoding loop takes them: a copy, if there is room for one."""
        if not decoding.is_worth_unrolling(self.model, self.params):
            return self.params
        return decoding.params_for_decoding(self.params)

    def generate(
        self,
        prompt: Int[Array | np.ndarray, "B T"],
        tokens: int,
        *,
        segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        stop_ids: Sequence[int] = (),
    ) -> "Continuation":
        """`generate`, with the model that is held here.

        Args:
          prompt, tokens, segment_ids: as of `generate`.
          temperature, top_k, top_p, seed, stop_ids: too.
          numbers: of the rows, from which with the seed their randomness comes; None: 0, 1, 2 ...
        """
        sampling = checked_sampling(temperature, top_k, top_p, tokens, seed)
        prompt = np.asarray(prompt)
        is_token = np.ones(prompt.shape, bool)
        if segment_ids is not None:
            is_token = np.asarray(segment_ids) != 0
        has_tokens = prompt.ndim == 2 and bool(is_token.any(axis=1).all())
        require(has_tokens, "prompt", "no token", "at least one token a row")
        ids = prompt[is_token]
        most = self.model.vocab_size
        unknown = ids[(ids < 0) | (ids >= most)].tolist()
        require(not unknown, "prompt", unknown[:3], f"ids from 0 to {most - 1}")
        keys = decoding.row_keys(seed, range(len(prompt)) if numbers is None else numbers)
        stops = tuple(sorted(set(stop_ids)))
        return Continuation(self, prompt, segment_ids, tokens, sampling, stops, keys)


def checked_sampling(
    temperature: float,
    top_k: int,
    top_p: float,
    tokens: int = 0,
    seed: int = 0,
) -> Sampling:
    """How tokens are chosen.

    Args:
      temperature, top_k, top_p: as of `filters.sample_token`.
      tokens: how many.
      seed: their randomness.

    Raises:
      InputError: one of them is outside its range.
    """
    is_temperature = 0 <= temperature < math.inf
    require(is_temperature, "temperature", temperature, "at least 0, finite")
    require(top_k >= 0, "top_k", top_k, "at least 0")
    require(0 < top_p <= 1, "top_p", top_p, "above 0 and at most 1")
    require(tokens >= 0, "tokens", tokens, "at least 0")
    require(-(2**63) <= seed < 2**63, "seed", seed, "an integer of 64 bits")
    return Sampling(temperature, top_k, top_p)


class Continuation:
    """Prompts that are being continued: an iterator over ids [B], one of every row at a time.

    It ends after `tokens`, or when all rows are done: by a token of `stop_ids`, or because the
    reader said so (`finish`). What is given for rows that are done is of no use.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt: Int[np.ndarray, "B T"],
        segment_ids: Int[Array | np.ndarray, "B T"] | None,
        tokens: int,
        sampling: Sampling,
        stop_ids: tuple[int, ...],
        keys: Array,
    ):
        """As `Decoder.generate` checked it."""
        self._is_finished = np.zeros(len(prompt), bool)
        self._steps = self._generate(decoder, prompt, segment_ids, tokens, sampling, stop_ids, keys)

    def __iter__(self) -> "Continuation":
        return self

    def __next__(self) -> Int[np.ndarray, " B"]:
        return next(self._steps)

    def finish(self, row: int) -> None:
        """Nobody wants more of this row."""
        self._is_finished[row] = True

    def _generate(
        self,
        decoder: Decoder,
        prompt: Int[np.ndarray, "B T"],
        segment_ids: Int[Array | np.ndarray, "B T"] | None,
        tokens: int,
        sampling: Sampling,
        stop_ids: tuple[int, ...],
        keys: Array,
    ) -> Iterator[Int[np.ndarray, " B"]]:
        if tokens == 0:
            return
        logits, caches = _prefill(decoder, prompt, segment_ids, tokens)
        token, is_done = decoding.first_token(sampling, stop_ids, logits, keys)
        # A copy: the memory of the array itself is given to the loop.
        yield np.array(token)
        if tokens == 1:
            return
        rows = decoding.Rows(
            token=token,
            caches=decoding.caches_for_decoding(decoder.by_layer, caches),
            count=jnp.ones((), jnp.int32),
            is_done=is_done,
            keys=keys,
        )
        left = tokens - 1
        steps = 1
        while left and not self._all_done(rows.is_done):
            start = time.perf_counter()
            given, count, rows = decoding.decode(
                decoder.model,
                sampling,
                stop_ids,
                decoder.by_layer,
                self._without_finished(rows),
                min(steps, left),
                decoder.vocab_size,
            )
            chunk = np.asarray(given)[: int(count)]
            steps = next_steps(steps, time.perf_counter() - start)
            left -= len(chunk)
            yield from chunk

    def _all_done(self, is_done: Array) -> bool:
        return bool(np.all(self._is_finished | np.asarray(is_done)))

    def _without_finished(self, rows: decoding.Rows) -> decoding.Rows:
        if not self._is_finished.any():
            return rows
        is_done = rows.is_done | jnp.asarray(self._is_finished)
        return dataclasses.replace(rows, is_done=is_done)


def next_steps(steps: int, seconds: float) -> int:
    """How many tokens the next call gives, after one of `steps` that took `seconds`.

    As many as keep the reader waiting for no more than LONGEST_WAIT.
    """
    if 2 * seconds <= LONGEST_WAIT:
        return min(2 * steps, decoding.MOST_STEPS)
    if seconds > LONGEST_WAIT:
        return max(steps // 2, 1)
    return steps


def _prefill(
    decoder: Decoder,
    prompt: Int[np.ndarray, "B T"],
    segment_ids: Int[Array | np.ndarray, "B T"] | None,
    tokens: int,
) -> tuple[Float[Array, "B X"], Caches]:
    """The logits after the prompts, and caches with room for so many tokens more."""
    model = decoder.model
    rows, prompt_length = prompt.shape
    # Lengths come in powers of two, so that few different caches are ever compiled for. The last
    # token is given out and never read.
    cache_length = 1 << (prompt_length + tokens - 2).bit_length()
    caches = init_caches(model, rows, cache_length)
    if all(MIXERS[mixer.kind].takes_pieces for mixer in model.mixers.values()):
        prompt, segment_ids = padded_on_the_right(prompt, segment_ids)
    return forward(
        model,
        decoder.params,
        jnp.asarray(prompt, jnp.int32),
        caches,
        decoder.vocab_size,
        segment_ids,
    )


def generate(
    model: ModelConfig,
    params: PyTree,
    prompt: Int[Array | np.ndarray, "B T"],
    tokens: int,
    *,
    vocab_size: int,
    segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
) -> Continuation:
    """Up to `tokens` sampled ids per row, one step at a time.

    Every row is as if it were alone: lengths may differ. The ids are what the model sees: a prompt
    that begins a document begins with the end-of-document token.

    Args:
      model: the model's configuration.
      params: parameters and router state.
      prompt: at least one token a row.
      tokens: how many to sample.
      vocab_size: of the tokenizer.
      segment_ids: 0 for the padding of shorter prompts, on the left or on the right, 1 for their
        tokens; None where there is no padding.
      temperature, top_k, top_p: as of `filters.sample_token`.
      seed: same seed, same tokens.
      stop_ids: a row is done after one of these; when all are, nothing more is computed.

    Returns:
      An iterator. The model runs when tokens are asked for, and then for a tenth of a second.

    Raises:
      InputError: a sampling option outside its range, a row without a token, an id that is none.
    """
    return Decoder(model, params, vocab_size).generate(
        prompt,
        tokens,
        segment_ids=segment_ids,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_ids=stop_ids,
    )


def padded_on_the_right(
    tokens: Int[np.ndarray, "B T"],
    segment_ids: Int[Array | np.ndarray, "B T"] | None,
) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, "B L"]]:
    """Rows and their segment ids at one of a few lengths.

    Padding is a quarter of a long row at most.
    """
    length = tokens.shape[1]
    if segment_ids is None:
        segment_ids = np.ones(tokens.shape, np.int32)
    step = max(LEAST_LENGTH_STEP, (1 << (length - 1).bit_length()) // 8)
    sides = ((0, 0), (0, -length % step))
    return np.pad(tokens, sides), np.pad(np.asarray(segment_ids, np.int32), sides)


def generate_text(
    model: ModelConfig,
    params: PyTree,
    tokenizer: Tokenizer,
    prompt: str | bytes,
    tokens: int,
    **sampling: Any,
) -> Iterator[str]:
    """Pieces of text as they become whole characters.

    Args:
      model: the model's configuration.
      params: parameters and router state.
      tokenizer: the one that the model was trained with.
      prompt: text to continue, a document's beginning; empty starts a new document.
      tokens: how many to sample at most; the end of the document ends the text.
      **sampling: options of `generate`.

    Returns:
      An iterator. Its pieces are what decoding prompt and continuation together gives after the
      prompt.

    Raises:
      InputError: a prompt that is not UTF-8; as of `generate`.
    """
    ids = tokenizer.encode(as_text(prompt)).tolist()
    steps = generate(
        model,
        params,
        np.asarray([[tokenizer.eos_id, *ids]], np.int32),
        tokens,
        vocab_size=tokenizer.vocab_size,
        stop_ids=(tokenizer.eos_id,),
        **sampling,
    )
    return pieces_of_text(steps, TextUntil(tokenizer, ids, (tokenizer.eos_id,)))


def pieces_of_text(
    steps: Iterator[Int[np.ndarray, " B"]],
    text: TextUntil,
) -> Iterator[str]:
    """The text of a single row's tokens up to where it stops."""
    for token in steps:
        piece = text.add(int(token[0]))
        if piece:
            yield piece
        if text.has_stopped:
            return
    rest = text.rest()
    if rest:
        yield rest
