"""How fast a model reads a prompt and writes after it."""

import time
from typing import NamedTuple

import numpy as np
from jaxtyping import PyTree

from gatedjax.config import Config
from gatedjax.data import load_tokenizer
from gatedjax.evaluation.sampling import Decoder

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
    prompt = generator.integers(0, vocab_size, (1, prompt_tokens))
    decoder = Decoder(config.model, params, vocab_size)
    prefill_rates = []
    decode_rates = []
    for _ in range(ROUNDS):
        steps = decoder.generate(prompt, 1 + decode_tokens, temperature=0.0)
        start = time.perf_counter()
        # The first token comes of the prompt itself.
        next(steps)
        middle = time.perf_counter()
        for _ in steps:
            pass
        end = time.perf_counter()
        prefill_rates.append(prompt_tokens / (middle - start))
        decode_rates.append(decode_tokens / (end - middle))
    return Speed(max(prefill_rates[1:]), max(decode_rates[1:]))
