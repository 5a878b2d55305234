"""Evaluates a trained model on held-out text.

    python eval.py --checkpoint=runs/tiny [--batches=64] [--probes]

Prints loss, perplexity and bits per byte with standard errors, beside what gzip and xz need for the
same text, and how fast the model reads (prefill) and writes (decode). With --probes instead: what
attention, gates, states and experts do on the first batch of validation text
(`gatedjax/evaluation/probes.py`), as JSON and pictures in the run directory.
"""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import PyTree

from gatedjax.config import Config, DataConfig
from gatedjax.data import load_tokenizer, validation_text
from gatedjax.evaluation.compressors import bits_per_byte_of_compressors
from gatedjax.evaluation.restore import restore_params
from gatedjax.evaluation.sampling import forward
from gatedjax.evaluation.validation import Evaluation, Validation
from gatedjax.model import init_caches
from gatedjax.paths import expand
from gatedjax.reporting.console import say
from gatedjax.reporting.probe_pictures import write_report
from gatedjax.runtime import cli, launch
from gatedjax.training.run import Run

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run directory, as --workdir of train.py.")
_BATCHES = flags.DEFINE_integer(
    "batches", 64, "Batches of validation text; 0 for all of it.", lower_bound=0
)
_PROBES = flags.DEFINE_bool(
    "probes", False, "Measure what the layers do, into CHECKPOINT/probes, and end."
)
_PROMPT_TOKENS = flags.DEFINE_integer(
    "prompt_tokens", 512, "Prompt length of the speed measurement.", lower_bound=1
)
_DECODE_TOKENS = flags.DEFINE_integer(
    "decode_tokens", 128, "Decoded tokens of the speed measurement.", lower_bound=1
)


def main(_) -> None:
    """Restore -> loss over validation batches -> compressors -> speed."""
    checkpoint = expand(cli.required(_CHECKPOINT), "--checkpoint")
    launch.start()
    run, params = restore_params(checkpoint)
    if _PROBES.value:
        write_probes(run, params, checkpoint / "probes")
        return
    with jax.set_mesh(run.mesh):
        say_losses(Validation(run, _BATCHES.value)(params))
    say_compressors(run.config.data)
    # A copy on one device: every process measures itself, the first one tells.
    params = jax.tree.map(lambda p: p.addressable_data(0), params)
    prompt_tokens = _PROMPT_TOKENS.value
    prefill, decode = speed(run.config, params, prompt_tokens, _DECODE_TOKENS.value)
    say(f"prefill         {prefill:,.0f} tokens/s, one prompt of {prompt_tokens} tokens")
    say(f"decode          {decode:,.0f} tokens/s, one token at a time")


def write_probes(run: Run, params: PyTree, folder: Path) -> None:
    """The probes of the first validation batch, as JSON and pictures."""
    with jax.set_mesh(run.mesh):
        probes = Validation(run, 1).probes(params)
    for path in write_report(probes, folder):
        say(str(path))


def say_losses(result: Evaluation) -> None:
    """Loss, perplexity, bits per byte."""
    loss = f"{result.loss:.4f} ± {result.loss_error:.4f}"
    bits = f"{result.bits_per_byte:.4f} ± {result.bits_per_byte_error:.4f}"
    say(f"loss            {loss} nats per token ({result.tokens:,} tokens)")
    say(f"perplexity      {result.perplexity:.3f}")
    say(f"bits per byte   {bits}")


def say_compressors(data: DataConfig) -> None:
    """What gzip and xz need for the same text."""
    for name, bits in bits_per_byte_of_compressors(validation_text(data)).items():
        say(f"{name:15} {bits:.4f} bits per byte, all of the validation text in one stream")


def speed(
    config: Config,
    params: PyTree,
    prompt_tokens: int,
    decode_tokens: int,
) -> tuple[float, float]:
    """Tokens per second of prefill and of decoding, batch 1, the best of three.

    Args:
      config: the run's configuration.
      params: on one device.
      prompt_tokens: the length of the prompt, random tokens.
      decode_tokens: how many are decoded after it.
    """
    vocab_size = load_tokenizer(config.data.tokenizer).vocab_size
    generator = np.random.default_rng(0)
    ids = generator.integers(0, vocab_size, (1, prompt_tokens))
    prompt = jnp.asarray(ids, jnp.int32)
    prefill_rates = []
    decode_rates = []
    for _ in range(4):
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
    # The first round compiles.
    return max(prefill_rates[1:]), max(decode_rates[1:])


def run() -> None:
    """The command: parses the flags, then calls `main`."""
    cli.run(main)


if __name__ == "__main__":
    run()
