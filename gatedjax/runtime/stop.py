"""Stopping a run in order: a signal asks for it, and all processes stop after the same step.

The handlers are our own. jax's preemption service offers the same, but stops only at one certain
value of a counter that every caller moves, orbax's manager included: a save at the wrong moment
moved it past that value, and the signal was lost for ever. Here a signal is a note that nothing
takes back, and the processes vote on it with an all-reduce after every step.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(BaseException):
    """A stop signal came where nothing has to be finished first.

    As KeyboardInterrupt it is no Exception: no library must take it for an error of its own.
    """

    def __init__(self, number: int):
        super().__init__(name_of(number))
        self.number = number


class Stop:
    """Takes SIGTERM, SIGINT and SIGHUP of this process inside its `with` block.

    At first a signal ends the block with `Stopped`, at once. After `between_steps()` it is only
    noted, and `requested()` tells of it. After `outside_steps()` a process that is alone ends at
    once again. A signal that comes again changes nothing, except a second SIGINT: who types it a
    second time will not wait.
    """

    def __init__(self):
        self.obeyed = 0  # what `requested` told last
        self._number = 0  # the first signal that came
        self._is_at_once = True
        self._vote: Vote | None = None
        self._handlers_before: dict[int, object] = {}

    def __enter__(self) -> "Stop":
        # Python handles signals in the main thread alone.
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in STOP_SIGNALS:
            before = signal.getsignal(number)
            # What nohup, or a shell for its background jobs, switched off stays off.
            is_switched_off = before in (signal.SIG_IGN, None)
            if is_switched_off and number != signal.SIGTERM:
                continue
            self._handlers_before[number] = before or signal.SIG_DFL
            signal.signal(number, self._take)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._number:
            # The process is about to end: a further signal must not end it with another code.
            return
        for number, before in self._handlers_before.items():
            signal.signal(number, before)  # pyrefly: ignore  (what getsignal gave)

    def between_steps(self, mesh: Mesh) -> None:
        """From now on a step is finished first.

        Args:
          mesh: over the devices of all processes, which vote.
        """
        if jax.process_count() > 1:
            count = votes_on(mesh)
            self._vote = Vote(count)
        self._is_at_once = False

    def outside_steps(self) -> None:
        """Before the first step and after the last there is nothing to finish.

        A process that others wait for goes on all the same: the vote after the next step, or the
        end of the run, comes for all of them.
        """
        self._is_at_once = jax.process_count() == 1 and not self._number

    def requested(self) -> int:
        """The signal after which all processes stop now; 0 to go on.

        Every process calls it once after each of its steps.
        """
        number = self._number
        self.obeyed = number if self._vote is None else self._vote(number)
        return self.obeyed

    def _take(self, number: int, frame: FrameType | None) -> None:
        is_again = self._number == number == signal.SIGINT
        if is_again:
            raise KeyboardInterrupt
        if self._number:
            return
        self._number = number
        if self._is_at_once:
            self._is_at_once = False
            raise Stopped(number)


class Vote:
    """What some process was asked to do, told to all of them after the same step.

    Each call begins a vote and returns the result of the vote before: reading that never makes the
    device wait, for the step in between is already under way. The processes need no clock and no
    thread: the n-th calls of all of them return the same number.
    """

    def __init__(self, count: Callable[[int], jax.Array]):
        """Begins with the first call.

        Args:
          count: begins a vote with this process's number; gives the largest number of all
            processes, on each of them, once it is read.
        """
        self._count = count
        self._under_way: jax.Array | None = None

    def __call__(self, number: int) -> int:
        before = self._under_way
        self._under_way = self._count(number)
        return 0 if before is None else int(before)


def votes_on(mesh: Mesh) -> Callable[[int], jax.Array]:
    """The largest number of all processes, by an all-reduce over the devices of the mesh."""
    every_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    replicated = NamedSharding(mesh, PartitionSpec())
    largest = jax.jit(jnp.max, out_shardings=replicated)
    shape = (mesh.devices.size,)

    def count(number: int) -> jax.Array:
        def ballot(index: tuple[slice, ...] | None) -> np.ndarray:
            return np.full(shape, number, np.int32)[index]

        ballots = jax.make_array_from_callback(shape, every_device, ballot)
        return largest(ballots)

    return count


def ignore_stop_signals() -> None:
    """The work is done: a signal while the interpreter ends must not change the exit code."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def name_of(number: int) -> str:
    """SIGTERM for 15."""
    return signal.Signals(number).name
