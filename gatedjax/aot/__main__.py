"""Compiles an op for an accelerator that is not here, and prints what it will cost.

    python -m gatedjax.aot --op=linear_scan --target=tpu:v5p --shape=B4,T4096,H16,K128,V128 --pass=fwd,bwd

Passes: fwd is the forward pass, bwd the program that runs forward and backward, as in training.
"""

import argparse
import json
import sys

import jax

from gatedjax.aot.cases import CASES, make_case
from gatedjax.aot.compile import compile_for
from gatedjax.aot.targets import TARGETS, target
from kernels_pallas import dispatch


def main() -> int:
    """Flags -> case -> one compilation and report a pass."""
    args = _parser().parse_args()
    jax.config.update(
        "jax_platforms", "cpu"
    )  # nothing is computed on a device here, and libtpu must not be loaded yet
    try:
        passes = _passes(args.passes)
        target(args.target)
        options = dict(_setting(s) for s in args.set)
        if args.implementation:
            options["implementation"] = args.implementation
        case = make_case(args.op, args.shape, args.dtype, options)
        reports = {name: _report(args, case, name) for name in passes}
    except (ValueError, NotImplementedError, RuntimeError) as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    choice = dispatch.last_choice(args.op)
    if args.json:
        print(
            json.dumps(
                {"implementation": choice.implementation}
                | {n: r.as_dict() for n, r in reports.items()}
            )
        )
        return 0
    print(f"{args.op} {args.shape} {args.dtype}: {choice.implementation} ({choice.reason})")
    for name, report in reports.items():
        print(f"\n{name}: {report}")
    return 0


def _report(args: argparse.Namespace, case, name: str):
    forward = name == "fwd"
    fn, shapes = (case.forward, case.args) if forward else (case.backward(), case.backward_args())
    return compile_for(
        args.target, fn, *shapes, concrete=case.concrete, schedule=not args.no_schedule
    )[1]


def _passes(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [n for n in names if n not in ("fwd", "bwd")]:
        raise ValueError(f"pass: got {unknown[0]!r}, expected fwd, bwd or fwd,bwd")
    return names


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"set: got {text!r}, expected name=value")
    return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gatedjax.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", required=True, help=", ".join(CASES))
    parser.add_argument("--target", required=True, help=", ".join(TARGETS))
    parser.add_argument("--shape", required=True, help="axes and sizes: B4,T4096,H16,K128,V128")
    parser.add_argument("--pass", dest="passes", default="fwd", help="fwd, bwd or fwd,bwd")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32")
    parser.add_argument(
        "--implementation", help="xla, tpu or gpu; the best for the target if not given"
    )
    parser.add_argument(
        "--set", action="append", default=[], help="decay=scalar, gate=element, window=512 ..."
    )
    parser.add_argument(
        "--no-schedule", action="store_true", help="memory and costs only (TPU): quicker"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
