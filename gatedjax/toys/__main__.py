"""Small examples that are no sequence models, on generated data.

    python -m gatedjax.toys click_through [--steps=2000]     FinalMLP on clicks
    python -m gatedjax.toys scene                            hash-grid experts on a 3-D scene
    python -m gatedjax.toys continual                        class-attention, task after task
    python -m gatedjax.toys families                         dynamical systems and a fitted gate
    python -m gatedjax.toys customization                    a local network beside a frozen one

Each trains for some seconds or minutes and prints what came of it.
"""

import argparse
import sys
from typing import NoReturn

from gatedjax.errors import InputError, require
from gatedjax.toys import click_through, continual, customization, families, scene

EXIT_BAD_INPUT = 2
TOYS = {
    "click_through": click_through.run,
    "scene": scene.run,
    "continual": continual.run,
    "families": families.run,
    "customization": customization.run,
}


class _Parser(argparse.ArgumentParser):
    """Errors in one line, as those of all commands."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def main(arguments: list[str]) -> int:
    """Arguments -> lines on stdout; the exit code."""
    parser = _Parser(
        prog="python -m gatedjax.toys",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help=" or ".join(TOYS))
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    try:
        args = parser.parse_args(arguments)
        require(args.name in TOYS, "name", args.name, f"one of {', '.join(TOYS)}")
        require(args.steps > 0, "--steps", args.steps, "at least 1")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    for line in TOYS[args.name](args.steps):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
