"""Sampling from a model: prefill the prompt, then one token at a time with explicit caches.

A document begins with the end-of-document token (docs/tokens.md): it stands before every prompt,
and is all there is of an empty one.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, PyTree

from gatedjax.compiler_options import careful_jit
from gatedjax.config import ModelConfig
from gatedjax.data.tokenizer import Tokenizer
from gatedjax.errors import InputError, require
from gatedjax.evaluation.text_stream import TextStream
from gatedjax.layers import MIXERS
from gatedjax.model import Caches, LanguageModel, head_weights, init_caches
from gatedjax.model import logits as compute_logits
from gatedjax.sharding import RULES

# Below it a temperature takes the most likely token, above it any: so it does here, without leaving
# the range of float32.
LEAST_TEMPERATURE = 1e-30
MOST_TEMPERATURE = 1e30
# Prompts are padded to a few lengths, so that few programs are compiled: multiples of this, and
# from 8 of these on of larger steps, of which 8 to 16 make a length.
LEAST_LENGTH_STEP = 16


def filter_logits(
    logits: Float[Array, "B X"],
    top_k: int,
    top_p: float,
) -> Float[Array, "B X"]:
    """-inf for all but the k most likely tokens, and of those all but the nucleus of mass p.

    The nucleus is the smallest set of most likely tokens whose probabilities reach p
    (arXiv 1904.09751), never empty. Of equally likely tokens those with lower ids come first.
    top_k = 0 and top_p = 1 keep all tokens.
    """
    vocabulary = logits.shape[-1]
    k = min(top_k, vocabulary) if top_k else vocabulary
    if k == vocabulary and top_p >= 1.0:
        return logits
    # From the most likely on; of equals the one with the lower id first. 0 and -0 are equal.
    logits = jnp.where(logits == 0, 0.0, logits)
    ordered, token_ids = jax.lax.top_k(logits, k)
    if top_p < 1.0:
        probabilities = jax.nn.softmax(ordered, axis=-1)
        mass = jnp.cumsum(probabilities, axis=-1)
        # The token that reaches p is kept: what counts is the mass of those before it.
        has_reached = mass[:, :-1] >= top_p
        ordered = ordered.at[:, 1:].set(jnp.where(has_reached, -jnp.inf, ordered[:, 1:]))
    row = jnp.arange(logits.shape[0])[:, None]
    return jnp.full_like(logits, -jnp.inf).at[row, token_ids].set(ordered)


def sample_token(
    logits: Float[Array, "B X"],
    key: Array,
    temperature: float,
    top_k: int,
    top_p: float,
) -> Int[Array, " B"]:
    """One token per row.

    Args:
      logits: of the next token.
      key: the randomness of this token.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: sample among the k most likely tokens; 0 for all.
      top_p: sample among the fewest tokens whose probabilities reach p. Both filters see the logits
        after the temperature.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The largest becomes 0: a small temperature then takes the others to -inf and none to +inf.
    highest = jnp.max(logits, axis=-1, keepdims=True)
    divisor = min(max(temperature, LEAST_TEMPERATURE), MOST_TEMPERATURE)
    filtered = filter_logits((logits - highest) / divisor, top_k, top_p)
    token = jax.random.categorical(key, filtered)
    return token.astype(jnp.int32)


_sample_token = careful_jit(sample_token, static_argnums=(2, 3, 4))


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
    with nn.logical_axis_rules(RULES):
        outputs: Any = LanguageModel(model).apply(
            {"params": params},
            tokens,
            segment_ids=segment_ids,
            caches=caches,
        )
    hidden, caches, _ = outputs
    last = hidden[:, -1]
    if segment_ids is not None:
        place = jnp.arange(tokens.shape[1])
        last_place = jnp.max(jnp.where(segment_ids != 0, place, 0), axis=1)
        last = jnp.take_along_axis(hidden, last_place[:, None, None], axis=1)[:, 0]
    logits = compute_logits(last, head_weights(params))
    is_token = jnp.arange(logits.shape[-1]) < vocab_size
    return jnp.where(is_token, logits, -jnp.inf), caches


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
) -> Iterator[Int[Array, " B"]]:
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
      temperature, top_k, top_p: as of `sample_token`.
      seed: same seed, same tokens.

    Returns:
      An iterator. The model runs only when the next token is asked for.

    Raises:
      InputError: a sampling option outside its range, a row without a token, an id that is none.
    """
    is_temperature = 0 <= temperature < math.inf
    require(is_temperature, "temperature", temperature, "at least 0, finite")
    require(top_k >= 0, "top_k", top_k, "at least 0")
    require(0 < top_p <= 1, "top_p", top_p, "above 0 and at most 1")
    require(tokens >= 0, "tokens", tokens, "at least 0")
    require(-(2**63) <= seed < 2**63, "seed", seed, "an integer of 64 bits")
    prompt = np.asarray(prompt)
    is_token = np.ones(prompt.shape, bool)
    if segment_ids is not None:
        is_token = np.asarray(segment_ids) != 0
    has_tokens = prompt.ndim == 2 and bool(is_token.any(axis=1).all())
    require(has_tokens, "prompt", "no token", "at least one token a row")
    ids = prompt[is_token]
    unknown = ids[(ids < 0) | (ids >= model.vocab_size)].tolist()
    require(not unknown, "prompt", unknown[:3], f"ids from 0 to {model.vocab_size - 1}")
    sampling = (temperature, top_k, top_p)
    return _generate(
        model,
        params,
        prompt,
        segment_ids,
        tokens,
        vocab_size,
        sampling,
        seed,
    )


def _generate(
    model: ModelConfig,
    params: PyTree,
    prompt: Int[np.ndarray, "B T"],
    segment_ids: Int[Array | np.ndarray, "B T"] | None,
    tokens: int,
    vocab_size: int,
    sampling: tuple[float, int, float],
    seed: int,
) -> Iterator[Int[Array, " B"]]:
    """`generate`, with everything checked."""
    if tokens == 0:
        return
    rows, prompt_length = prompt.shape
    # Lengths come in powers of two, so that few different caches are ever compiled for. The last
    # token is given out and never read.
    cache_length = 1 << (prompt_length + tokens - 2).bit_length()
    caches = init_caches(model, rows, cache_length)
    if all(MIXERS[mixer.kind].takes_pieces for mixer in model.mixers.values()):
        prompt, segment_ids = padded_on_the_right(prompt, segment_ids)
    logits, caches = forward(
        model,
        params,
        jnp.asarray(prompt, jnp.int32),
        caches,
        vocab_size,
        segment_ids,
    )
    key = jax.random.key(seed)
    for step in range(tokens):
        token = _sample_token(logits, jax.random.fold_in(key, step), *sampling)
        yield token
        if step < tokens - 1:
            logits, caches = forward(model, params, token[:, None], caches, vocab_size)


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
        **sampling,
    )
    return _pieces(steps, tokenizer, ids)


def _pieces(
    steps: Iterator[Int[Array, " B"]],
    tokenizer: Tokenizer,
    prompt_ids: list[int],
) -> Iterator[str]:
    """The text of a single row's tokens up to the end of its document."""
    stream = TextStream(tokenizer, prompt_ids)
    for token in steps:
        token_id = int(token[0])
        if token_id == tokenizer.eos_id:
            break
        piece = stream.add(token_id)
        if piece:
            yield piece
    rest = stream.rest()
    if rest:
        yield rest


def as_text(prompt: str | bytes) -> str:
    """A prompt as text.

    Raises:
      InputError: it is not UTF-8. A command line hands on such bytes as lone surrogates.
    """
    try:
        data = prompt if isinstance(prompt, bytes) else prompt.encode()
        return data.decode()
    except UnicodeError:
        raise InputError(f"prompt: got {prompt!r}, expected UTF-8") from None
