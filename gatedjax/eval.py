"""Evaluates a trained model on held-out text.

    python eval.py --checkpoint=runs/tiny [--batches=64] [--probes] [--source=text:/data/wiki]

Prints loss, perplexity and bits per byte with standard errors, beside what gzip and xz need for the
same text, and how fast the model reads (prefill) and writes (decode). With --probes instead: what
attention, gates, states and experts do on the first batch of validation text
(`gatedjax/evaluation/probes.py`), as JSON and pictures in the run directory.

The text is the run's own, if it is what it was when the run was trained, or the one that --source
names. The paths in a checkpoint that somebody else wrote are not used unless --trust_paths says so.
"""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from gatedjax.config import Config, DataConfig, MeshConfig
from gatedjax.data import load_tokenizer, validation_text
from gatedjax.errors import InputError
from gatedjax.evaluation.compressors import bits_per_byte_of_compressors
from gatedjax.evaluation.restore import (
    fits_one_device,
    fitting_mesh,
    memory_errors,
    require_same_text,
    require_text,
    restore_params,
)
from gatedjax.evaluation.sampling import forward
from gatedjax.evaluation.validation import Evaluation, Validation
from gatedjax.model import init_caches
from gatedjax.paths import expand
from gatedjax.reporting.console import say
from gatedjax.reporting.probe_pictures import write_report
from gatedjax.runtime import cli, launch
from gatedjax.sharding import AXES
from gatedjax.training.run import Run

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run directory, as --workdir of train.py.")
_BATCHES = flags.DEFINE_integer(
    "batches", 64, "Batches of validation text; 0 for all of it.", lower_bound=0
)
_PROBES = flags.DEFINE_bool(
    "probes", False, "Measure what the layers do, into CHECKPOINT/probes, and end."
)
_SOURCE = flags.DEFINE_string(
    "source", None, "Text to evaluate on, KIND or KIND:PATH (text:/data/wiki); default: the run's."
)
_TRUST = flags.DEFINE_bool(
    "trust_paths", False, "Use the paths in a checkpoint that somebody else wrote."
)
_MESH = flags.DEFINE_string(
    "mesh", None, "Such as fsdp=8,tensor=2; default: the run's, if these devices can form it."
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
    run, params = restore_params(
        checkpoint,
        source=_SOURCE.value,
        trust_paths=_TRUST.value,
        mesh=given_mesh() or fitting_mesh(checkpoint),
    )
    require_text(run)
    if _SOURCE.value is None:
        require_same_text(run, checkpoint)
    if _PROBES.value:
        write_probes(run, params, checkpoint / "probes")
        return
    with jax.set_mesh(run.mesh), memory_errors("a batch of the run's size"):
        say_losses(Validation(run, _BATCHES.value)(params))
    say_compressors(run.config.data)
    say_speed(run, params)


def given_mesh() -> MeshConfig | None:
    """The mesh of --mesh; None if it is not given."""
    if _MESH.value is None:
        return None
    axes = {}
    for part in _MESH.value.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or not size.isdigit():
            raise InputError(
                f"--mesh: got {part!r}, expected AXIS=DEVICES with an axis of {', '.join(AXES)}"
            )
        axes[axis] = int(size)
    try:
        return MeshConfig(**axes)
    except InputError as error:
        raise InputError(f"--mesh: {error}") from None


def say_speed(run: Run, params: PyTree) -> None:
    """Prefill and decoding on one device: every process measures itself, the first one tells."""
    if not fits_one_device(run):
        say("prefill, decode: not measured, the parameters do not fit one device")
        return
    copies = NamedSharding(run.mesh, PartitionSpec())
    params = jax.jit(lambda p: p, out_shardings=copies)(params)
    params = jax.tree.map(lambda p: p.addressable_data(0), params)
    prompt_tokens = _PROMPT_TOKENS.value
    prefill, decode = speed(run.config, params, prompt_tokens, _DECODE_TOKENS.value)
    say(f"prefill         {prefill:,.0f} tokens/s, one prompt of {prompt_tokens} tokens")
    say(f"decode          {decode:,.0f} tokens/s, one token at a time")


def write_probes(run: Run, params: PyTree, folder: Path) -> None:
    """The probes of the first validation batch, as JSON and pictures."""
    require_no_links(folder)
    with jax.set_mesh(run.mesh), memory_errors("a batch of the run's size"):
        probes = Validation(run, 1).probes(params)
    for path in write_report(probes, folder):
        say(str(path))


def require_no_links(folder: Path) -> None:
    """InputError if a link in the checkpoint would lead what is written to another place."""
    for path in [folder, *folder.glob("*")]:
        if path.is_symlink():
            raise InputError(f"{path}: is a link, expected a folder of plain files; remove it")


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
