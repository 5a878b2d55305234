"""The schedules of one TPU compilation: what libtpu dumped, replayed kernel by kernel or as a whole
program.
"""

import dataclasses
import re
from pathlib import Path

from gatedjax.aot import hlo, replay
from gatedjax.aot.bundles import find_listings, parse_listing, shared_listings
from gatedjax.aot.targets import Tpu

_PROGRAM = "TLP"  # the listing that calls every other
_STARTUP_BRANCHES = 2  # of every program, on values of the runtime


@dataclasses.dataclass(frozen=True)
class Called:
    """What the calls of one HLO took in a run of the program, together."""

    calls: int
    cycles: int
    stall: int
    hbm_bytes: int


@dataclasses.dataclass(frozen=True)
class ProgramRun:
    """A run of the whole executable on core 0."""

    cycles: int
    hbm_bytes: int
    called: dict[str, Called]  # by HLO
    missing: tuple[str, ...]  # HLOs without a listing: their time is not in `cycles`
    unknown_branches: int  # that follow data, and were counted as not taken


class Dump:
    """A compilation's listings, and the values that steer its kernels.

    Args:
      folder: what libtpu wrote.
      text: the compiled HLO.
      scalars: of `prefetch.scalar_operands`, in the order of the program's kernels.
    """

    def __init__(self, folder: Path, text: str, chip: Tpu, scalars=()):
        self._chip, self._listings, self._shared = (
            chip,
            find_listings(folder),
            shared_listings(folder),
        )
        self._calls = {call.name: call for call in hlo.kernel_calls(text)}
        self._scalars = list(scalars)
        self._programs: dict[str, replay.Program | None] = {}

    def kernel(self, name: str) -> replay.Schedule | None:
        """One run of a kernel on the slowest of the cores that share it; HBM bytes of all of
        them.
        """
        program = self._program(name)
        if program is None:
            return None
        cores = self._chip.cores if program.split_over_cores else 1
        runs = []
        for core in range(cores):
            timeline = replay.Timeline(self._chip, 1 / cores)
            execution = replay.Execution(program, core, self._operands(name))
            execution.run(timeline)
            runs.append(replay.summarize(execution, timeline))
        slowest = max(runs, key=lambda run: run.cycles)
        return dataclasses.replace(slowest, hbm_bytes=sum(run.hbm_bytes for run in runs))

    def program(self) -> ProgramRun | None:
        """The whole executable; None if it was not listed."""
        main = self._program(_PROGRAM)
        if main is None:
            return None
        timeline = replay.Timeline(self._chip, 1 / self._chip.cores)
        called: dict[str, Called] = {}
        missing: set[str] = set()

        def call(name: str, timeline: replay.Timeline) -> None:
            program = self._program(name)
            if program is None:
                missing.add(name)
                return
            before = (timeline.time, timeline.stall, timeline.hbm_bytes)
            replay.Execution(program, 0, self._operands(name), call).run(timeline)
            spent = [
                a - b for a, b in zip((timeline.time, timeline.stall, timeline.hbm_bytes), before)
            ]
            old = called.get(name, Called(0, 0, 0, 0))
            called[name] = Called(*(a + b for a, b in zip(dataclasses.astuple(old), (1, *spent))))

        execution = replay.Execution(main, 0, call=call)
        execution.run(timeline)
        unknown = max(0, execution.unknown["branch"] - _STARTUP_BRANCHES)
        return ProgramRun(
            timeline.time, timeline.hbm_bytes, called, tuple(sorted(missing)), unknown
        )

    def _program(self, name: str) -> replay.Program | None:
        if name not in self._programs:
            listed = next(
                (n for n in (name, *self._shared.get(name, ())) if n in self._listings), None
            )
            parsed = (
                replay.Program(parse_listing(name, *self._listings[listed]), self._chip)
                if listed
                else None
            )
            self._programs[name] = parsed
        return self._programs[name]

    def _operands(self, name: str) -> dict[int, list[int]]:
        """The words of the kernel's known scalar operands, which are its first; found by name, else
        by order.
        """
        call = self._calls.get(name)
        if call is None or not self._scalars:
            return {}
        plain = lambda label: re.sub(r"[^A-Za-z0-9]", "_", re.sub(r"\.\d+$", "", label))
        values = next(
            (v for label, v in self._scalars if label and plain(label) == plain(name)), None
        )
        if values is None:
            place = [n for n in self._calls if n in self._listings or n in self._shared].index(name)
            values = self._scalars[place][1] if place < len(self._scalars) else []
        return {i: hlo.memory_words(v, call.operands[i][1]) for i, v in enumerate(values)}
