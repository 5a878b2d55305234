"""The schedules of one TPU compilation: what libtpu dumped, replayed kernel by kernel or as a whole
program.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gatedjax.aot import hlo, replay
from gatedjax.aot.bundles import find_listings, parse_listing, shared_listings
from gatedjax.aot.prefetch import Steering
from gatedjax.aot.targets import Tpu

_PROGRAM = "TLP"  # the listing that calls every other
_STARTUP_BRANCHES = 2  # of every program, on values of the runtime


@dataclasses.dataclass(frozen=True)
class Called:
    """What the calls of one HLO took in a run of the program, together."""

    calls: int = 0
    cycles: int = 0
    stall: int = 0
    hbm_bytes: int = 0


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
      chip: for which it was compiled.
      scalars: of `prefetch.scalar_operands`, in the order of the program's kernels.
    """

    def __init__(
        self,
        folder: Path,
        text: str,
        chip: Tpu,
        scalars: Sequence[Steering] = (),
    ):
        self._chip = chip
        self._listings = find_listings(folder)
        self._shared = shared_listings(folder)
        self._calls = {call.name: call for call in hlo.kernel_calls(text)}
        self._donated = hlo.donated_outputs(text)
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
            timeline = replay.Timeline(self._chip, hbm_fraction=1 / cores)
            execution = replay.Execution(program, core, self._operands(name))
            execution.run(timeline)
            runs.append(replay.summarize(execution, timeline))
        slowest = max(runs, key=lambda run: run.cycles)
        moved = sum(run.hbm_bytes for run in runs)
        return dataclasses.replace(slowest, hbm_bytes=moved)

    def program(self) -> ProgramRun | None:
        """The whole executable; None if it was not listed.

        A program asks at run time for each donated output whether its address is the input's, and
        copies it if not. Addresses are not known here; the answer is yes.
        """
        main = self._program(_PROGRAM)
        if main is None:
            return None
        timeline = replay.Timeline(self._chip, hbm_fraction=1 / self._chip.cores)
        called: dict[str, Called] = {}
        missing: set[str] = set()

        def call(name: str, timeline: replay.Timeline) -> None:
            """Runs a called HLO, and adds what it took to `called`."""
            program = self._program(name)
            if program is None:
                missing.add(name)
                return
            time = timeline.time
            stall = timeline.stall
            hbm_bytes = timeline.hbm_bytes
            execution = replay.Execution(program, 0, self._operands(name), call)
            execution.run(timeline)
            before = called.get(name, Called())
            called[name] = Called(
                calls=before.calls + 1,
                cycles=before.cycles + timeline.time - time,
                stall=before.stall + timeline.stall - stall,
                hbm_bytes=before.hbm_bytes + timeline.hbm_bytes - hbm_bytes,
            )

        first_donated = _STARTUP_BRANCHES
        execution = replay.Execution(
            main,
            core=0,
            call=call,
            unknown_taken=range(first_donated, first_donated + self._donated),
        )
        execution.run(timeline)
        unexplained = execution.unknown["branch"] - first_donated - self._donated
        return ProgramRun(
            cycles=timeline.time,
            hbm_bytes=timeline.hbm_bytes,
            called=called,
            missing=tuple(sorted(missing)),
            unknown_branches=max(0, unexplained),
        )

    def _program(self, name: str) -> replay.Program | None:
        """Parsed once; under another HLO's name if libtpu found that their code is the same."""
        if name not in self._programs:
            self._programs[name] = self._parse(name)
        return self._programs[name]

    def _parse(self, name: str) -> replay.Program | None:
        for other in (name, *self._shared.get(name, ())):
            if other in self._listings:
                path, slot_use = self._listings[other]
                listing = parse_listing(name, path, slot_use)
                return replay.Program(listing, self._chip)
        return None

    def _operands(self, name: str) -> dict[int, np.ndarray]:
        """The words of the kernel's known scalar operands, which are its first; found by name, else
        by order.
        """
        call = self._calls.get(name)
        if call is None or not self._scalars:
            return {}
        values = self._scalars_by_name(name)
        if values is None:
            values = self._scalars_by_place(name)
        words = {}
        for index, value in enumerate(values):
            if value is None:
                continue
            _, layout = call.operands[index]
            words[index] = hlo.memory_words(value, layout)
        return words

    def _scalars_by_name(self, name: str) -> list[np.ndarray | None] | None:
        for label, values in self._scalars:
            if label and _plain(label) == _plain(name):
                return values
        return None

    def _scalars_by_place(self, name: str) -> list[np.ndarray | None]:
        """Of the kernel in the same place of the traced function."""
        listed = [n for n in self._calls if n in self._listings or n in self._shared]
        place = listed.index(name)
        if place >= len(self._scalars):
            return []
        _, values = self._scalars[place]
        return values


def _plain(label: str) -> str:
    """A kernel's name without XLA's counter and without characters that XLA replaces."""
    return re.sub(r"[^A-Za-z0-9]", "_", re.sub(r"\.\d+$", "", label))
