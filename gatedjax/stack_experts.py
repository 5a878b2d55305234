"""Puts the low-rank experts of several runs on one model (PHATGOOSE, arXiv 2402.05859).

    python -m gatedjax.stack_experts --runs=runs/gate_a,runs/gate_b --workdir=runs/stacked

Each run has mixtures of low-rank experts whose gates were trained behind a sigmoid
(`configs/phatgoose.py`), over the same frozen model. The result has all experts, in the order of
the runs, and sends every token of every matrix to the --top best. eval.py, generate and another
run's train.init_from take it like any other run.
"""

import jax
from absl import flags

from gatedjax.config import to_dict
from gatedjax.data import load_tokenizer
from gatedjax.errors import InputError, require
from gatedjax.evaluation.restore import restore_params
from gatedjax.layers.tree import flatten_dict
from gatedjax.paths import expand
from gatedjax.reporting.console import say
from gatedjax.runtime import cli, launch
from gatedjax.training import given_weights, identity
from gatedjax.training.checkpoint import Checkpointer
from gatedjax.training.run import fresh_state, prepare
from gatedjax.training.stacked_experts import stacked, stacked_config
from gatedjax.training.step_folders import has_steps

_RUNS = flags.DEFINE_list("runs", [], "Run directories, two or more.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory of the result, a new one.")
_TOP = flags.DEFINE_integer("top", 2, "Experts of a token.", lower_bound=1)


def main(_) -> None:
    """Restore each -> compare what is frozen -> stack -> save."""
    places = [expand(name, "--runs") for name in _RUNS.value]
    require(len(places) > 1, "--runs", ",".join(_RUNS.value), "two runs or more")
    workdir = expand(cli.required(_WORKDIR), "--workdir").absolute()
    launch.start()
    if has_steps(workdir):
        raise InputError(f"--workdir: got {workdir}, which holds a run, expected a new folder")
    configs = []
    parameters = []
    for place in places:
        run, params, _ = restore_params(place)
        configs.append(run.config)
        parameters.append(flatten_dict(params))
    config = stacked_config(configs, places, _TOP.value)
    given = stacked(parameters, places)
    run = prepare(config)
    wanted = given_weights.parameters(run)
    with Checkpointer(places[0], read_only=True) as checkpointer:
        data = checkpointer.manifest().get("data")
    with jax.set_mesh(run.mesh):
        placed = {path: jax.device_put(x, wanted[path].sharding) for path, x in given.items()}
        state = fresh_state(run, placed)
        same = data if isinstance(data, dict) else None
        with Checkpointer(workdir, to_dict(run.config), data=same) as checkpointer:
            checkpointer.save(0, state, data_index=0, wait=True)
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.end_of_document)
    identity.keep_tokenizer(workdir, tokenizer)
    identity.keep_chat_template(workdir, config.data)
    say(f"the experts of {len(places)} runs are now in {workdir}")


def run() -> None:
    """The command: parses the flags, then calls `main`."""
    cli.run(main)


if __name__ == "__main__":
    run()
