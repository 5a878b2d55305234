"""Makes a run directory of a checkpoint in the format of the Hugging Face hub.

    python -m gatedjax.interop.import_hf --from=models/Qwen3-0.6B --workdir=runs/qwen3

eval.py, generate, probes and another run's train.init_from take it like any other run. Weights go
straight onto the mesh, in float32; the tokenizer is copied along. Nothing of the folder is
executed. Which models: docs/import_models.md.
"""

import jax
from absl import flags

from gatedjax import sharding
from gatedjax.config import to_dict
from gatedjax.errors import InputError
from gatedjax.interop import checkpoint, incoming, on_mesh
from gatedjax.interop.safetensors import tensors_of_folder
from gatedjax.paths import expand
from gatedjax.reporting.console import say
from gatedjax.runtime import cli, launch
from gatedjax.runtime.host_memory import large_blocks_given_back
from gatedjax.training import given_weights, identity
from gatedjax.training.checkpoint import Checkpointer
from gatedjax.training.run import fresh_state
from gatedjax.training.step_folders import has_steps

_FROM = flags.DEFINE_string("from", None, "Folder with config.json and safetensors files.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory of the model, a new one.")
_MESH = flags.DEFINE_string("mesh", None, "Such as fsdp=8,tensor=2; default: copies everywhere.")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16"],
    "Of activations; default: as config.json says. Weights are float32.",
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "'bytes', or a tokenizer.json; default: that of the folder."
)


def main(_) -> None:
    """config.json -> shapes -> headers -> tensors onto the mesh -> a checkpoint."""
    folder = expand(cli.required(_FROM), "--from")
    workdir = expand(cli.required(_WORKDIR), "--workdir").absolute()
    launch.start()
    if not folder.is_dir():
        raise InputError(f"--from: got {folder}, expected a folder")
    if has_steps(workdir):
        raise InputError(f"--workdir: got {workdir}, which holds a run, expected a new folder")
    described = checkpoint.described(folder)
    tokenizer, data = incoming.data_of(folder, workdir, described, _TOKENIZER.value)
    run = incoming.run_of(described, data, _DTYPE.value, sharding.mesh_of_text(_MESH.value))
    wanted = given_weights.parameters(run)
    found = checkpoint.found(
        described.family,
        described.model,
        tensors_of_folder(folder),
        wanted,
    )
    config = to_dict(run.config)
    same = {"tokenizer": tokenizer.fingerprint, "sources": {}}
    with large_blocks_given_back():
        state = fresh_state(run, on_mesh.read_parameters(found.parts, wanted))
        with jax.set_mesh(run.mesh), Checkpointer(workdir, config, data=same) as checkpointer:
            checkpointer.save(0, state, data_index=0, wait=True)
    identity.keep_tokenizer(workdir, tokenizer)
    if jax.process_index() == 0:
        incoming.carry(folder, workdir, described, found)
    if "auto_map" in described.values:
        say("auto_map of config.json asks for code of the checkpoint: it was not looked at")
    if found.left_out:
        names = ", ".join(found.left_out[:4])
        say(f"{len(found.left_out)} tensors are no part of the language model: {names} ...")
    say(f"{len(found.names)} tensors of {folder} ({described.family.model_type}) are in {workdir}")


def run() -> None:
    """The command: parses the flags, then calls `main`."""
    cli.run(main)


if __name__ == "__main__":
    run()
