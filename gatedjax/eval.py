"""Evaluates a trained model on held-out text.

    python eval.py --checkpoint=runs/tiny [--batches=64] [--probes]

Prints loss, perplexity and bits per byte with standard errors, beside what gzip and xz need for the same text, and how
fast the model reads (prefill) and writes (decode). With --probes instead: what attention, gates, states and experts
do on the first batch of validation text (`gatedjax/evaluation/probes.py`), as JSON and pictures in the run directory.
"""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from gatedjax.config import Config
from gatedjax.data import load_tokenizer, validation_text
from gatedjax.evaluation.compressors import bits_per_byte_of_compressors
from gatedjax.evaluation.restore import restore_params
from gatedjax.evaluation.sampling import forward
from gatedjax.evaluation.validation import Validation
from gatedjax.model import init_caches
from gatedjax.reporting.console import say
from gatedjax.reporting.probe_pictures import write_report
from gatedjax.runtime import cli, launch

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
    checkpoint = cli.required(_CHECKPOINT)
    launch.start()
    run, params = restore_params(checkpoint)
    config = run.config
    if _PROBES.value:
        with jax.set_mesh(run.mesh):
            probes = Validation(run, 1).probes(params)
        for path in write_report(probes, Path(_CHECKPOINT.value) / "probes"):
            say(str(path))
        return
    with jax.set_mesh(run.mesh):
        result = Validation(run, _BATCHES.value)(params)
    say(
        f"loss            {result.loss:.4f} ± {result.loss_error:.4f} nats per token ({result.tokens:,} tokens)"
    )
    say(f"perplexity      {result.perplexity:.3f}")
    say(f"bits per byte   {result.bits_per_byte:.4f} ± {result.bits_per_byte_error:.4f}")
    for name, bits in bits_per_byte_of_compressors(validation_text(config.data)).items():
        say(f"{name:15} {bits:.4f} bits per byte, all of the validation text in one stream")
    # A copy on one device: every process measures itself, the first one tells.
    params = jax.tree.map(lambda p: p.addressable_data(0), params)
    prefill, decode = speed(config, params, _PROMPT_TOKENS.value, _DECODE_TOKENS.value)
    say(f"prefill         {prefill:,.0f} tokens/s, one prompt of {_PROMPT_TOKENS.value} tokens")
    say(f"decode          {decode:,.0f} tokens/s, one token at a time")


def speed(config: Config, params, prompt_tokens: int, decode_tokens: int) -> tuple[float, float]:
    """Tokens per second of prefill and of decoding, batch 1, the best of three after compilation."""
    vocab = load_tokenizer(config.data.tokenizer).vocab_size
    prompt = jnp.asarray(np.random.default_rng(0).integers(0, vocab, (1, prompt_tokens)), jnp.int32)
    rates = []
    for _ in range(4):
        caches = jax.block_until_ready(init_caches(config.model, 1, prompt_tokens + decode_tokens))
        start = time.perf_counter()
        scores, caches = jax.block_until_ready(forward(config.model, params, prompt, caches, vocab))
        middle = time.perf_counter()
        for _ in range(decode_tokens):
            scores, caches = forward(
                config.model, params, jnp.argmax(scores, -1)[:, None], caches, vocab
            )
        jax.block_until_ready(scores)
        rates.append(
            (prompt_tokens / (middle - start), decode_tokens / (time.perf_counter() - middle))
        )
    # The first round compiles.
    return max(r[0] for r in rates[1:]), max(r[1] for r in rates[1:])


def run() -> None:
    """The command: parses the flags, then calls `main`."""
    cli.run(main)


if __name__ == "__main__":
    run()
