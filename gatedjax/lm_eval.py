"""lm-evaluation-harness with the model "gatedjax": its own flags, and all of its tasks.

    python -m gatedjax.lm_eval --model gatedjax --model_args checkpoint=runs/tiny --tasks TASKS

The harness looks for models in itself only; this tells it of one more and calls it.
"""

import sys

from gatedjax.errors import InputError
from gatedjax.runtime import cli, streams
from gatedjax.runtime.host_memory import keep_freed_memory


def run() -> None:
    """The command."""
    streams.open_absent()
    streams.write_any_text()
    keep_freed_memory()
    try:
        main()
    except InputError as error:
        cli.leave(str(error), cli.EXIT_BAD_INPUT)


def main() -> None:
    """The harness' command, once it knows the model.

    Raises:
      InputError: the harness is not installed; what its model raises.
    """
    try:
        from lm_eval.__main__ import cli_evaluate

        from gatedjax.evaluation import lm_eval_adapter
    except ImportError as error:
        raise InputError(
            f"lm-eval is not installed ({error}): pip install 'gatedjax[lm-eval]'"
        ) from None
    lm_eval_adapter.register()
    # Its usage lines say how it was called.
    sys.argv[0] = "gatedjax-lm-eval"
    cli_evaluate()


if __name__ == "__main__":
    run()
