r"""Compiles an op for an accelerator that is not here, and prints what it will cost.

    python -m gatedjax.aot --op=linear_scan --target=tpu:v5p \
        --shape=B4,T4096,H16,K128,V128 --pass=fwd,bwd

Passes: fwd is the forward pass, bwd the program that runs forward and backward, as in training.
"""

import argparse
import json
import sys

import jax

from gatedjax.aot.cases import CASES, Case, make_case
from gatedjax.aot.compile import compile_for
from gatedjax.aot.report import Report
from gatedjax.aot.targets import TARGETS, target
from kernels_pallas import dispatch

PASSES = ("fwd", "bwd")


def main() -> int:
    """Flags -> case -> one compilation and report a pass."""
    args = _parser().parse_args()
    # Nothing is computed on a device here, and libtpu must not be loaded yet.
    jax.config.update("jax_platforms", "cpu")
    try:
        reports = _reports(args)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        return 2
    if args.json:
        _print_json(args, reports)
    else:
        _print_tables(args, reports)
    return 0


def _reports(args: argparse.Namespace) -> dict[str, Report]:
    """By pass."""
    passes = _passes(args.passes)
    target(args.target)  # an unknown one is refused before the shape is looked at
    options = dict(_setting(text) for text in args.set)
    if args.implementation:
        options["implementation"] = args.implementation
    case = make_case(args.op, args.shape, args.dtype, options)
    return {name: _report(args, case, name) for name in passes}


def _report(args: argparse.Namespace, case: Case, name: str) -> Report:
    if name == "fwd":
        fn, shapes = case.forward, case.args
    else:
        fn, shapes = case.backward(), case.backward_args()
    _, report = compile_for(
        args.target,
        fn,
        *shapes,
        concrete=case.concrete,
        schedule=not args.no_schedule,
    )
    return report


def _choice(op: str) -> dispatch.Choice:
    """The implementation that the compiled op used; compiling has recorded it."""
    choice = dispatch.last_choice(op)
    assert choice is not None
    return choice


def _print_json(args: argparse.Namespace, reports: dict[str, Report]) -> None:
    record: dict[str, object] = {"implementation": _choice(args.op).implementation}
    for name, report in reports.items():
        record[name] = report.as_dict()
    print(json.dumps(record))


def _print_tables(args: argparse.Namespace, reports: dict[str, Report]) -> None:
    choice = _choice(args.op)
    print(f"{args.op} {args.shape} {args.dtype}: {choice.implementation} ({choice.reason})")
    for name, report in reports.items():
        print(f"\n{name}: {report}")


def _passes(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in PASSES:
            raise ValueError(f"pass: got {name!r}, expected fwd, bwd or fwd,bwd")
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
    parser.add_argument(
        "--shape",
        required=True,
        help="axes and sizes: B4,T4096,H16,K128,V128",
    )
    parser.add_argument(
        "--pass",
        dest="passes",
        default="fwd",
        help="fwd, bwd or fwd,bwd",
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        help="bfloat16, float16 or float32",
    )
    parser.add_argument(
        "--implementation",
        help="xla, tpu or gpu; the best for the target if not given",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        help="decay=scalar, gate=element, window=512 ...",
    )
    parser.add_argument(
        "--no-schedule",
        action="store_true",
        help="memory and costs only (TPU): quicker",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON instead of a table",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
