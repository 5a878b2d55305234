"""Merges the low-rank updates of a run (`model.lora`) into the weights they belong to.

    python -m gatedjax.merge_lora --checkpoint=runs/tuned --workdir=runs/merged

The newest intact checkpoint, as evaluation reads it (averaged, if the run keeps an average),
becomes the first checkpoint of a new run directory, without updates: eval.py, generate and another
run's train.init_from take it like any other.
"""

import dataclasses

import jax
import jax.numpy as jnp
from absl import flags
from jaxtyping import PyTree

from gatedjax.config import Config, LoRAConfig, TeacherConfig, to_dict
from gatedjax.data import load_tokenizer
from gatedjax.errors import InputError
from gatedjax.evaluation.restore import fitting_mesh, restore_params
from gatedjax.layers import low_rank
from gatedjax.layers.tree import flatten_dict
from gatedjax.reporting.console import say
from gatedjax.runtime import cli, launch
from gatedjax.runtime.host_memory import large_blocks_given_back
from gatedjax.training import given_weights, identity
from gatedjax.training.checkpoint import Checkpointer
from gatedjax.training.manifest import places
from gatedjax.training.run import Run, fresh_state, prepare
from gatedjax.training.state import TrainState
from gatedjax.training.step_folders import has_steps

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run directory, as --workdir of train.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory of the merged model, a new one.")


def main(_) -> None:
    """Restore -> merge -> save."""
    checkpoint = cli.given_place(_CHECKPOINT)
    workdir = cli.given_place(_WORKDIR)
    launch.start()
    if has_steps(workdir):
        raise InputError(f"--workdir: got {workdir}, which holds a run, expected a new folder")
    with large_blocks_given_back():
        run, params, step = restore_params(checkpoint, mesh=fitting_mesh(checkpoint))
    if not run.config.model.lora.rank:
        raise InputError(f"--checkpoint: {checkpoint} has no low-rank updates (model.lora)")
    with Checkpointer(checkpoint, read_only=True) as checkpointer:
        manifest = checkpointer.manifest(step)
    data = manifest.get("data")
    projections = low_rank.updated_projections(params)
    run, state = merged(run, params, step)
    with (
        jax.set_mesh(run.mesh),
        Checkpointer(
            workdir,
            to_dict(run.config),
            data=data if isinstance(data, dict) else None,
        ) as checkpointer,
    ):
        checkpointer.save(
            step,
            state,
            data_index=manifest["data_index"],
            places=places(manifest),
            wait=True,
        )
    tokenizer = load_tokenizer(run.config.data.tokenizer, run.config.data.end_of_document)
    identity.keep_tokenizer(workdir, tokenizer)
    identity.keep_chat_template(workdir, run.config.data)
    say(f"{len(projections)} projections merged: step {step} of {checkpoint} is now in {workdir}")


def merged(run: Run, params: PyTree, step: int) -> tuple[Run, TrainState]:
    """The run without updates that computes the same, and its state.

    Args:
      run: with updates.
      params: of it, as they are evaluated; their memory is taken over.
      step: of the state.
    """
    lora = run.config.model.lora
    new_run = prepare(without_updates(run.config))
    wanted = given_weights.parameters(new_run)
    shardings = {path: x.sharding for path, x in wanted.items()}
    with jax.set_mesh(new_run.mesh):
        merge = jax.jit(
            lambda p: flatten_dict(low_rank.merged(p, lora)),
            out_shardings=shardings,
            donate_argnums=0,
        )
        state = fresh_state(new_run, merge(params))
        steps = jax.device_put(jnp.int32(step), state.step.sharding)
    return new_run, dataclasses.replace(state, step=steps)


def without_updates(config: Config) -> Config:
    """The configuration of the merged model: all of it trains, from what it is now."""
    model = dataclasses.replace(config.model, lora=LoRAConfig())
    optim = dataclasses.replace(
        config.optim,
        trainable=(),
        lr_by_name=(),
        # The average is what was merged.
        ema_decay=0.0,
    )
    train = dataclasses.replace(
        config.train,
        init_from="",
        init_rename=(),
        init_fresh=(),
        teacher=TeacherConfig(),
    )
    return dataclasses.replace(
        config,
        model=model,
        optim=optim,
        train=train,
    )


def run() -> None:
    """The command: parses the flags, then calls `main`."""
    cli.run(main)


if __name__ == "__main__":
    run()
