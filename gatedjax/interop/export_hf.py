"""Writes the model of a run as a checkpoint in the format of the Hugging Face hub.

    python -m gatedjax.interop.export_hf --checkpoint=runs/qwen3 --to=models/mine

The newest intact checkpoint, as evaluation reads it (averaged, if the run keeps an average). A
model that was imported goes back to its own family, and tensors that did not change to the same
bits; any other goes to the first family whose config.json says all of it. transformers'
`AutoModelForCausalLM.from_pretrained(FOLDER)` loads it. Which models: docs/import_models.md.
"""

import json
import os
import shutil

import jax
from absl import flags

from gatedjax import sharding
from gatedjax.errors import InputError
from gatedjax.evaluation.restore import fitting_mesh, require_language_model, restore_params
from gatedjax.interop import outgoing
from gatedjax.interop.checkpoint import CONFIG
from gatedjax.interop.record import read_record
from gatedjax.layers.tree import flatten_dict
from gatedjax.paths import expand
from gatedjax.reporting.console import say
from gatedjax.runtime import cli, launch
from gatedjax.runtime.host_memory import large_blocks_given_back

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run directory, as --workdir of train.py.")
_TO = flags.DEFINE_string("to", None, "Folder to write, a new one.")
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint; default: the newest intact one.")
_FAMILY = flags.DEFINE_string(
    "family", None, "model_type to write; default: the one it came from, or the first that fits."
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16"],
    "Of the tensors; default: as they were imported, or as activations are.",
)
_MESH = flags.DEFINE_string("mesh", None, "Such as fsdp=8; default: the run's, if it can be.")
_TRUST = flags.DEFINE_bool(
    "trust_paths", False, "Use the tokenizer's path in a checkpoint that somebody else wrote."
)


def main(_) -> None:
    """Restore -> family -> tensor by tensor off the devices -> config.json, tokenizer."""
    run_dir = expand(cli.required(_CHECKPOINT), "--checkpoint")
    folder = expand(cli.required(_TO), "--to").absolute()
    launch.start()
    if folder.exists():
        raise InputError(f"--to: got {folder}, which is there already, expected a new folder")
    record = read_record(run_dir)
    with large_blocks_given_back():
        run, params, step = restore_params(
            run_dir,
            step=_STEP.value,
            trust_paths=_TRUST.value,
            mesh=sharding.mesh_of_text(_MESH.value) or fitting_mesh(run_dir),
        )
    require_language_model(run)
    family = outgoing.family_of(run.config, record, _FAMILY.value)
    dtype, dtypes = outgoing.dtypes_of(run.config, record, _DTYPE.value)
    partial = folder.with_name(f".{folder.name}.partial")
    is_first = jax.process_index() == 0
    if is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    count = outgoing.write_tensors(
        partial,
        family,
        run.config,
        flatten_dict(params),
        dtype,
        dtypes,
    )
    if is_first:
        carried = outgoing.carried_config(run_dir, family)
        values = outgoing.config_json(family, run.config, carried, dtype)
        (partial / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
        outgoing.copy_texts(run_dir, partial)
        # Only a whole folder gets the name.
        os.rename(partial, folder)
    say(f"step {step} of {run_dir} is in {folder}: {family.model_type}, {count} tensors")


def run() -> None:
    """The command: parses the flags, then calls `main`."""
    cli.run(main)


if __name__ == "__main__":
    run()
