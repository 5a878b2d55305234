"""Compiles for an accelerator that is not here, and reports what it will cost.

From a shell: `python -m gatedjax.aot`.
"""

from gatedjax.aot.compile import compile_and_replay, compile_for, report_compiled, slice_devices
from gatedjax.aot.report import Report
from gatedjax.aot.targets import TARGETS, parse_slice, target

__all__ = [
    "TARGETS",
    "Report",
    "compile_and_replay",
    "compile_for",
    "parse_slice",
    "report_compiled",
    "slice_devices",
    "target",
]
