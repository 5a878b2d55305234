"""Sampling from a model: prefill the prompt, then one token at a time with explicit caches."""

import functools
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from gatedjax.compiler_options import careful_jit
from gatedjax.config import ModelConfig
from gatedjax.errors import InputError
from gatedjax.model import Caches, LanguageModel, head_weights, init_caches, logits
from gatedjax.sharding import RULES


def filter_logits(scores: Float[Array, "B X"], top_k: int, top_p: float) -> Float[Array, "B X"]:
    """-inf for tokens outside the k most likely and outside the nucleus of mass p (arXiv 1904.09751)."""
    if top_k:
        smallest_kept = jax.lax.top_k(scores, min(top_k, scores.shape[-1]))[0][:, -1:]
        scores = jnp.where(scores < smallest_kept, -jnp.inf, scores)
    if top_p < 1.0:
        ordered = jnp.sort(scores, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(
            ordered, axis=-1
        )
        # The token that crosses p is kept, so at least one always is.
        smallest_kept = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        scores = jnp.where(scores < smallest_kept, -jnp.inf, scores)
    return scores


def sample_token(
    scores: Float[Array, "B X"], key: Array, temperature: float, top_k: int, top_p: float
) -> Int[Array, " B"]:
    """One token per row. Temperature 0 is the argmax; the filters see the tempered scores."""
    if temperature == 0:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, filter_logits(scores / temperature, top_k, top_p)).astype(
        jnp.int32
    )


@functools.partial(careful_jit, static_argnums=0, donate_argnums=3)
def forward(
    model: ModelConfig, params, tokens: Int[Array, "B T"], caches: Caches, vocab: Int[Array, ""]
):
    """Scores of the token after `tokens`, and the caches with `tokens` in them. Ids from `vocab` up are padding."""
    with nn.logical_axis_rules(RULES):
        hidden, caches, _ = LanguageModel(model).apply({"params": params}, tokens, caches=caches)
    scores = logits(hidden[:, -1], head_weights(params))
    return jnp.where(jnp.arange(scores.shape[-1]) < vocab, scores, -jnp.inf), caches


def generate(
    model: ModelConfig,
    params,
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

    Raises:
      ValueError: a sampling option outside its range, or an empty prompt.
    """
    for name, ok, wanted in (
        ("temperature", temperature >= 0, "at least 0"),
        ("top_k", top_k >= 0, "at least 0"),
        ("top_p", 0 < top_p <= 1, "above 0 and at most 1"),
        ("prompt", prompt.shape[1] > 0, "at least one token"),
    ):
        if not ok:
            raise InputError(f"{name}: expected {wanted}")
    # Lengths come in powers of two, so that few different caches are ever compiled for.
    length = 1 << (prompt.shape[1] + tokens - 1).bit_length()
    scores, caches = forward(
        model, params, prompt, init_caches(model, prompt.shape[0], length), vocab_size
    )
    sample = jax.jit(
        functools.partial(sample_token, temperature=temperature, top_k=top_k, top_p=top_p)
    )
    key = jax.random.key(seed)
    for step in range(tokens):
        token = sample(scores, jax.random.fold_in(key, step))
        yield token
        scores, caches = forward(model, params, token[:, None], caches, vocab_size)


def generate_text(
    model: ModelConfig, params, tokenizer, prompt: str, tokens: int, **sampling
) -> Iterator[str]:
    """Yields pieces of text as they become whole characters; stops at the end of the document."""
    # Documents start without a marker in training; only an empty prompt needs a token to start from.
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
    shown = ""
    for token in steps:
        if int(token[0]) == tokenizer.eos_id:
            break
        sampled.append(int(token[0]))
        text = tokenizer.decode(sampled)
        # A multi-byte character in the making decodes to the replacement character: wait for the rest of it.
        if not text.endswith("�"):
            yield text[len(shown) :]
            shown = text
    if sampled and tokenizer.decode(sampled) != shown:
        yield tokenizer.decode(sampled)[len(shown) :]
