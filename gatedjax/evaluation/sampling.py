"""Sampling from a model: prefill the prompt, then one token at a time with explicit caches."""

import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, PyTree

from gatedjax.compiler_options import careful_jit
from gatedjax.config import ModelConfig
from gatedjax.data.tokenizer import Tokenizer
from gatedjax.errors import require
from gatedjax.model import Caches, LanguageModel, head_weights, init_caches
from gatedjax.model import logits as compute_logits
from gatedjax.sharding import RULES


def filter_logits(
    logits: Float[Array, "B X"],
    top_k: int,
    top_p: float,
) -> Float[Array, "B X"]:
    """-inf for tokens outside the k most likely and outside the nucleus of mass p.

    The nucleus is that of arXiv 1904.09751. top_k = 0 and top_p = 1 keep all tokens.
    """
    if top_k:
        k = min(top_k, logits.shape[-1])
        largest, _ = jax.lax.top_k(logits, k)
        smallest_kept = largest[:, -1:]
        logits = jnp.where(logits < smallest_kept, -jnp.inf, logits)
    if top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The token that crosses p is kept, so at least one always is.
        kept = jnp.where(mass_before < top_p, ordered, jnp.inf)
        smallest_kept = jnp.min(kept, axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest_kept, -jnp.inf, logits)
    return logits


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
    filtered = filter_logits(logits / temperature, top_k, top_p)
    token = jax.random.categorical(key, filtered)
    return token.astype(jnp.int32)


@functools.partial(careful_jit, static_argnums=0, donate_argnums=3)
def forward(
    model: ModelConfig,
    params: PyTree,
    tokens: Int[Array, "B T"],
    caches: Caches,
    vocab_size: Int[Array, ""] | int,
) -> tuple[Float[Array, "B X"], Caches]:
    """Logits of the token after `tokens`, and the caches with `tokens` in them.

    Args:
      model: the model's configuration.
      params: parameters and router state.
      tokens: a prompt (prefill) or one token a row (decoding).
      caches: what the model keeps of the tokens before. Their memory is reused.
      vocab_size: of the tokenizer: ids from here on are padding and get -inf.
    """
    with nn.logical_axis_rules(RULES):
        outputs: Any = LanguageModel(model).apply(
            {"params": params},
            tokens,
            caches=caches,
        )
    hidden, caches, _ = outputs
    logits = compute_logits(hidden[:, -1], head_weights(params))
    is_token = jnp.arange(logits.shape[-1]) < vocab_size
    return jnp.where(is_token, logits, -jnp.inf), caches


def generate(
    model: ModelConfig,
    params: PyTree,
    prompt: Int[Array, "B T"],
    tokens: int,
    *,
    vocab_size: int,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[Int[Array, " B"]]:
    """Yields up to `tokens` sampled ids per row, one step at a time.

    Args:
      model: the model's configuration.
      params: parameters and router state.
      prompt: at least one token a row.
      tokens: how many to sample.
      vocab_size: of the tokenizer.
      temperature, top_k, top_p: as of `sample_token`.
      seed: same seed, same tokens.

    Raises:
      InputError: a sampling option outside its range, or an empty prompt.
    """
    require(temperature >= 0, "temperature", temperature, "at least 0")
    require(top_k >= 0, "top_k", top_k, "at least 0")
    require(0 < top_p <= 1, "top_p", top_p, "above 0 and at most 1")
    rows, prompt_length = prompt.shape
    require(prompt_length > 0, "prompt", "no token", "at least one token")
    # Lengths come in powers of two, so that few different caches are ever compiled for.
    cache_length = 1 << (prompt_length + tokens - 1).bit_length()
    caches = init_caches(model, rows, cache_length)
    logits, caches = forward(model, params, prompt, caches, vocab_size)
    sample = functools.partial(
        sample_token,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    sample = jax.jit(sample)
    key = jax.random.key(seed)
    for step in range(tokens):
        token = sample(logits, jax.random.fold_in(key, step))
        yield token
        logits, caches = forward(model, params, token[:, None], caches, vocab_size)


def generate_text(
    model: ModelConfig,
    params: PyTree,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    **sampling: Any,
) -> Iterator[str]:
    """Yields pieces of text as they become whole characters.

    Args:
      model: the model's configuration.
      params: parameters and router state.
      tokenizer: the one that the model was trained with.
      prompt: text to continue; empty starts a new document.
      tokens: how many to sample at most; the end of the document ends the text.
      **sampling: options of `generate`.
    """
    # Documents start without a marker in training; only an empty prompt needs a token to begin.
    ids = tokenizer.encode(prompt).tolist() or [tokenizer.eos_id]
    steps = generate(
        model,
        params,
        jnp.asarray([ids], jnp.int32),
        tokens,
        vocab_size=tokenizer.vocab_size,
        **sampling,
    )
    sampled: list[int] = []
    text = ""
    shown = 0  # characters of the text
    for token in steps:
        token_id = int(token[0])
        if token_id == tokenizer.eos_id:
            break
        sampled.append(token_id)
        text = tokenizer.decode(sampled)
        # An unfinished multi-byte character decodes to the replacement character: wait for more.
        if not text.endswith("\ufffd"):
            yield text[shown:]
            shown = len(text)
    if len(text) > shown:
        yield text[shown:]
