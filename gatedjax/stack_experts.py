"""Puts the low-rank experts of several runs on one model (PHATGOOSE, arXiv 2402.05859).

    python -m gatedjax.stack_experts --runs=runs/gate_a,runs/gate_b --workdir=runs/stacked

Each run has mixtures of low-rank experts whose gates were trained behind a sigmoid
(`configs/phatgoose.py`), over the same frozen model. The result has all experts, in the order of
the runs, and sends every token of every matrix to the --top best. eval.py, generate and another
run's train.init_from take it like any other run.
"""

from absl import flags

from gatedjax.errors import require
from gatedjax.evaluation.restore import restore_params
from gatedjax.layers.tree import flatten_dict
from gatedjax.paths import expand
from gatedjax.reporting.console import say
from gatedjax.runtime import cli, launch
from gatedjax.training import made_run
from gatedjax.training.stacked_experts import stacked, stacked_config

_RUNS = flags.DEFINE_list("runs", [], "Run directories, two or more.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory of the result, a new one.")
_TOP = flags.DEFINE_integer("top", 2, "Experts of a token.", lower_bound=1)


def main(_) -> None:
    """Restore each -> compare what is frozen -> stack -> save."""
    places = [expand(name, "--runs") for name in _RUNS.value]
    require(len(places) > 1, "--runs", ",".join(_RUNS.value), "two runs or more")
    workdir = expand(cli.required(_WORKDIR), "--workdir").absolute()
    launch.start()
    made_run.require_new(workdir)
    configs = []
    parameters = []
    for place in places:
        run, params, _ = restore_params(place)
        configs.append(run.config)
        parameters.append(flatten_dict(params))
    config = stacked_config(configs, places, _TOP.value)
    made_run.save(workdir, config, stacked(parameters, places), places[0])
    say(f"the experts of {len(places)} runs are now in {workdir}")


def run() -> None:
    """The command: parses the flags, then calls `main`."""
    cli.run(main)


if __name__ == "__main__":
    run()
