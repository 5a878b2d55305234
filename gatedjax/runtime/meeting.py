"""The processes of a run meet at the coordinator's address before jax starts.

jax's own start ends in a stack trace of C++, minutes later, where a process is missing; and two
processes 0 can listen on one port without noticing. Here process 0 listens at the address, each of
the others comes with a line of JSON and gets an answer: `go`, or why not. Then the port is free for
jax, which finds everybody there.
"""

import contextlib
import errno
import json
import os
import selectors
import socket
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from gatedjax.errors import InputError, TrainingError

BIND_VARIABLE = "JAX_COORDINATOR_BIND_ADDRESS"  # jax's own

_GO = "go"
_LONGEST_LINE = 1000
_ANSWER_SECONDS = 2.0  # for a line that must come at once
_RETRY_SECONDS = 0.3
_PORT_SECONDS = 10.0  # how long the port of a run that just ended may stay taken


class Place(NamedTuple):
    """The place of this process in its run, as the flags give it."""

    coordinator: str
    num_processes: int
    process_id: int

    @property
    def bind_address(self) -> str:
        """Where process 0 listens: at the address that all were given, and at no other."""
        return os.environ.get(BIND_VARIABLE) or self.coordinator


def meet(place: Place, seconds: float) -> None:
    """Returns when all processes of the run are there.

    Args:
      place: this process.
      seconds: how long to wait for the others.

    Raises:
      InputError: two processes have the same number, they disagree about how many they are, or
        process 0 cannot listen at the address.
      TrainingError: somebody did not come.
    """
    deadline = time.monotonic() + seconds
    if place.process_id == 0:
        _host(place, seconds, deadline)
    else:
        _join(place, seconds, deadline)


def split_address(address: str) -> tuple[str, int] | None:
    """Host and port of `host:port` or `[host]:port`; None if it is not one."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
        return None
    return host.removeprefix("[").removesuffix("]"), int(port)


def _host(place: Place, seconds: float, deadline: float) -> None:
    """Process 0: waits for all others, then lets all go."""
    with contextlib.ExitStack() as stack:
        listeners = _listen(place, deadline)
        selector = stack.enter_context(selectors.DefaultSelector())
        for listener in listeners:
            stack.callback(listener.close)
            selector.register(listener, selectors.EVENT_READ)
        guests: dict[int, socket.socket] = {}
        try:
            while len(guests) < place.num_processes - 1:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TrainingError(_missing(place, set(guests), seconds))
                for key, _ in selector.select(left):
                    assert isinstance(key.fileobj, socket.socket)
                    _receive(key.fileobj, place, guests)
        except (InputError, TrainingError) as error:
            for guest in guests.values():
                _answer(guest, str(error), is_input=isinstance(error, InputError))
            raise
        # Before anybody goes on to jax, which takes the port.
        for listener in listeners:
            listener.close()
        for guest in guests.values():
            _answer(guest, _GO)


def _receive(listener: socket.socket, place: Place, guests: dict[int, socket.socket]) -> None:
    """One that came: noted in `guests`, or, if it makes no sense, sent away.

    Raises:
      InputError: it belongs to this run, but its flags do not.
    """
    try:
        guest, _ = listener.accept()
    except OSError:
        return
    hello = _read_line(guest, _ANSWER_SECONDS)
    number = hello.get("process")
    if not isinstance(number, int):
        guest.close()  # a stranger
        return
    problem = _disagreement(place, number, hello.get("processes"))
    if problem is None and number in guests:
        if _is_alive(guests[number]):
            problem = f"--process_id: got {number} on two processes, expected each number once"
        else:
            guests[number].close()
    if problem is not None:
        _answer(guest, problem, is_input=True)
        raise InputError(problem)
    guests[number] = guest


def _disagreement(place: Place, number: int, processes: object) -> str | None:
    if processes != place.num_processes:
        return (
            f"--num_processes: got {processes} on process {number} and {place.num_processes} on "
            "process 0, expected the same on all"
        )
    if number == 0:
        return (
            f"--process_id: got 0 on two processes that use {place.coordinator}, expected each "
            "number once"
        )
    return None


def _join(place: Place, seconds: float, deadline: float) -> None:
    """All other processes: tells process 0 that this one is there, and waits for its answer."""
    reason = ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            answer = _ask(place, left)
        except OSError as error:
            reason = f"nobody answers ({_reason(error)})"
        else:
            if answer.get("answer") == _GO:
                return
            _raise_refusal(answer)
            reason = _reason_of_silence(deadline)
        time.sleep(_RETRY_SECONDS)
    raise TrainingError(
        f"--coordinator: {place.coordinator}: {reason or 'no answer'} within {seconds:g} s; "
        "expected process 0 of this run there"
    )


def _reason_of_silence(deadline: float) -> str:
    """Why a connection gave no answer of ours."""
    if time.monotonic() >= deadline:
        return "what answers did not let this process go on, as process 0 does when all have come,"
    return "something answers that is no process 0 waiting for others"


def _ask(place: Place, seconds: float) -> Mapping[str, Any]:
    """The answer of whoever listens at the coordinator's address."""
    address = split_address(place.coordinator)
    assert address is not None, "checked with the flags"
    with socket.create_connection(address, min(seconds, _ANSWER_SECONDS)) as connection:
        hello = {"process": place.process_id, "processes": place.num_processes}
        connection.sendall(_line(hello))
        # Process 0 may have begun to wait later than this one.
        return _read_line(connection, seconds)


def _raise_refusal(answer: Mapping[str, Any]) -> None:
    if "answer" not in answer:
        return
    message = str(answer["answer"])
    if answer.get("is_input"):
        raise InputError(message)
    raise TrainingError(message)


def _listen(place: Place, deadline: float) -> list[socket.socket]:
    """Sockets at all addresses that the coordinator's name has on this machine.

    Raises:
      InputError: there is none, or the port is in use.
    """
    patience = min(deadline, time.monotonic() + _PORT_SECONDS)
    while True:
        try:
            return _try_to_listen(place.bind_address)
        except OSError as error:
            if error.errno is None or isinstance(error, socket.gaierror):
                raise InputError(_cannot_listen(place, error)) from None
            is_in_use = error.errno == errno.EADDRINUSE
            if is_in_use:
                # Another process 0 says so itself, to both.
                with contextlib.suppress(OSError):
                    _raise_refusal(_ask(place, _ANSWER_SECONDS))
            if not is_in_use or time.monotonic() > patience:
                raise InputError(_cannot_listen(place, error)) from None
        time.sleep(_RETRY_SECONDS)


def _try_to_listen(address: str) -> list[socket.socket]:
    host_and_port = split_address(address)
    if host_and_port is None:
        raise InputError(f"{BIND_VARIABLE}: got {address!r}, expected host:port")
    found = socket.getaddrinfo(*host_and_port, type=socket.SOCK_STREAM)
    listeners: list[socket.socket] = []
    problem: OSError | None = None
    for family, kind, protocol, _, one_address in found:
        listener = socket.socket(family, kind, protocol)
        # A port whose last connections are fading may be taken; one that is listened at may not.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            listener.bind(one_address)
            listener.listen()
        except OSError as error:
            listener.close()
            is_final = error.errno == errno.EADDRINUSE
            if is_final or problem is None:
                problem = error
            if is_final:
                break
        else:
            listeners.append(listener)
    is_in_use = problem is not None and problem.errno == errno.EADDRINUSE
    if problem is not None and (is_in_use or not listeners):
        for listener in listeners:
            listener.close()
        raise problem
    return listeners


def _cannot_listen(place: Place, error: OSError) -> str:
    got = f"--coordinator: process 0 cannot listen at {place.bind_address} ({_reason(error)})"
    return f"{got}; expected an address of this machine, with a port that nobody uses"


def _missing(place: Place, came: set[int], seconds: float) -> str:
    missing = sorted(set(range(1, place.num_processes)) - came)
    numbers = ", ".join(map(str, missing))
    which = f"process {numbers}" if len(missing) == 1 else f"processes {numbers}"
    message = f"{which} of {place.num_processes} did not come to {place.coordinator}"
    return f"{message} within {seconds:g} s{_only_reachable_from_here(place)}"


def _only_reachable_from_here(place: Place) -> str:
    """A hint where the name is the machine's own and means the machine itself (/etc/hosts)."""
    host_and_port = split_address(place.bind_address)
    if host_and_port is None or host_and_port[0] == "localhost":
        return ""
    try:
        found = socket.getaddrinfo(*host_and_port, type=socket.SOCK_STREAM)
    except OSError:
        return ""
    addresses = sorted({str(address[0]) for *_, address in found})
    if all(address.startswith("127.") or address == "::1" for address in addresses):
        own = ", ".join(addresses)
        return f"; {host_and_port[0]} is {own} here, which no other machine can reach"
    return ""


def _answer(guest: socket.socket, answer: str, is_input: bool = False) -> None:
    """Sends the answer and closes; a guest that is gone gets none."""
    with contextlib.suppress(OSError), guest:
        guest.sendall(_line({"answer": answer, "is_input": is_input}))


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps({"gatedjax": 1, **message}).encode() + b"\n"


def _read_line(connection: socket.socket, seconds: float) -> dict[str, Any]:
    """A message of ours; empty if none comes."""
    connection.settimeout(max(seconds, 0.1))
    with contextlib.suppress(OSError, ValueError, RecursionError):
        with connection.makefile("rb") as file:
            message = json.loads(file.readline(_LONGEST_LINE))
        if isinstance(message, dict) and message.get("gatedjax") == 1:
            return message
    return {}


def _is_alive(guest: socket.socket) -> bool:
    """Whether it still waits: it sends nothing, and has not closed."""
    guest.setblocking(False)
    try:
        return guest.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
