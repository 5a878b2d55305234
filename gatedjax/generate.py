"""Continues a prompt with a trained model, streamed as it is sampled.

python -m gatedjax.generate --checkpoint=runs/tiny --prompt="def "
"""

import sys

from absl import flags

from gatedjax.data import load_tokenizer
from gatedjax.errors import printable
from gatedjax.evaluation.restore import restore_params
from gatedjax.evaluation.sampling import generate_text
from gatedjax.runtime import cli

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run directory, as --workdir of train.py.")
_PROMPT = flags.DEFINE_string("prompt", "", "Text to continue; empty starts a new document.")
_TOKENS = flags.DEFINE_integer(
    "tokens", 400, "Tokens to sample at most; the end of a document ends the text."
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample among the k most likely tokens; 0 for all.")
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Sample among the fewest tokens whose probabilities reach p."
)
_TRUST = flags.DEFINE_bool(
    "trust_paths", False, "Use the tokenizer's path in a checkpoint that somebody else wrote."
)
_SEED = flags.DEFINE_integer("seed", 0, "Same seed, same text.")


def main(_) -> None:
    """Restores, then prints the prompt and its continuation as it is sampled."""
    checkpoint = cli.given_place(_CHECKPOINT)
    restored_run, params, _ = restore_params(checkpoint, trust_paths=_TRUST.value)
    tokenizer = load_tokenizer(
        restored_run.config.data.tokenizer, restored_run.config.data.end_of_document
    )
    pieces = generate_text(
        restored_run.config.model,
        params,
        tokenizer,
        _PROMPT.value,
        _TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        seed=_SEED.value,
    )
    # A model may write escape sequences: a terminal must not act on them. A file gets every byte.
    shown = printable if sys.stdout.isatty() else str
    print(_PROMPT.value, end="", flush=True)
    for piece in pieces:
        print(shown(piece), end="", flush=True)
    print()


def run() -> None:
    """The command: parses the flags, then calls `main`."""
    cli.run(main)


if __name__ == "__main__":
    run()
