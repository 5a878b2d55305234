"""The time of each kernel of compiled programs, from one profile of all of them."""

import glob
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.profiler import ProfileData, ProfileOptions

# Times that each program is called. A kernel's time is that of its fastest call.
CALLS = 6
# Between programs the device does nothing for so long, by which their kernels are told apart.
PAUSE_SECONDS = 0.03
GAP_NS = 0.5 * PAUSE_SECONDS * 1e9

# name -> microseconds of a call.
KernelTimes = dict[str, float]


class Event(NamedTuple):
    """A kernel that ran."""

    name: str
    start_ns: float
    duration_ns: float


def kernel_times(calls: Sequence[Callable[[], object]]) -> list[KernelTimes]:
    """Microseconds of each kernel, for each of some programs that have run before.

    Args:
      calls: each calls a program.

    Returns:
      For each program {kernel: microseconds of one call}.

    Raises:
      RuntimeError: the profile does not have as many groups of kernels as there are programs.
    """
    options = ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for call in calls:
                time.sleep(PAUSE_SECONDS)
                for _ in range(CALLS):
                    result = call()
                jax.block_until_ready(result)
        [path] = glob.glob("**/*.xplane.pb", root_dir=folder, recursive=True)
        events = events_of_device(ProfileData.from_file(str(Path(folder) / path)))
    groups = separate(events)
    if len(groups) != len(calls):
        names = sorted({event.name for event in events})
        raise RuntimeError(
            f"profile: got {len(groups)} groups of kernels, expected {len(calls)}; kernels {names}"
        )
    return [times_of_call(group, CALLS) for group in groups]


def events_of_device(profile: ProfileData) -> list[Event]:
    """What ran on the streams of the GPU."""
    events = []
    for plane in profile.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                events += [Event(e.name, e.start_ns, e.duration_ns) for e in line.events]
    return events


def separate(events: Sequence[Event]) -> list[list[Event]]:
    """Groups between which the device did nothing for a while."""
    groups: list[list[Event]] = []
    end = -float("inf")
    for event in sorted(events, key=lambda event: event.start_ns):
        if event.start_ns - end > GAP_NS:
            groups.append([])
        groups[-1].append(event)
        end = max(end, event.start_ns + event.duration_ns)
    return groups


def times_of_call(events: Sequence[Event], calls: int) -> KernelTimes:
    """Microseconds by name, of the fastest of equal calls; without names that are not in each."""
    durations = defaultdict(list)
    for event in events:
        durations[event.name].append(event.duration_ns)
    found = {}
    for name, all_of_them in durations.items():
        launches, rest = divmod(len(all_of_them), calls)
        if rest:
            continue
        of_calls = [
            sum(all_of_them[start : start + launches])
            for start in range(0, len(all_of_them), launches)
        ]
        found[name] = min(of_calls) / 1e3
    return found
