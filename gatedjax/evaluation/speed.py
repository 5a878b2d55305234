"""How fast a model reads a prompt and writes after it."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gatedjax.config import Config
from gatedjax.data import load_tokenizer
from gatedjax.evaluation.sampling import forward
from gatedjax.model import init_caches

# The first one compiles.
ROUNDS = 4


class Speed(NamedTuple):
    """Tokens per second."""

    prefill: float
    decode: float


def speed(
    config: Config,
    params: PyTree,
    prompt_tokens: int,
    decode_tokens: int,
) -> Speed:
    """Tokens per second of prefill and of decoding, batch 1, the best of three.

    Args:
      config: the run's configuration.
      params: on one device.
      prompt_tokens: the length of the prompt, random tokens.
      decode_tokens: how many are decoded after it.
    """
    vocab_size = load_tokenizer(config.data.tokenizer, config.data.end_of_document).vocab_size
    generator = np.random.default_rng(0)
    ids = generator.integers(0, vocab_size, (1, prompt_tokens))
    prompt = jnp.asarray(ids, jnp.int32)
    prefill_rates = []
    decode_rates = []
    for _ in range(ROUNDS):
        caches = init_caches(config.model, 1, prompt_tokens + decode_tokens)
        caches = jax.block_until_ready(caches)
        start = time.perf_counter()
        outputs = forward(config.model, params, prompt, caches, vocab_size)
        logits, caches = jax.block_until_ready(outputs)
        middle = time.perf_counter()
        for _ in range(decode_tokens):
            token = jnp.argmax(logits, axis=-1)[:, None]
            logits, caches = forward(config.model, params, token, caches, vocab_size)
        jax.block_until_ready(logits)
        end = time.perf_counter()
        prefill_rates.append(prompt_tokens / (middle - start))
        decode_rates.append(decode_tokens / (end - middle))
    return Speed(max(prefill_rates[1:]), max(decode_rates[1:]))
