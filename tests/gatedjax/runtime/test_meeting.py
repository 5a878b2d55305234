"""Processes that meet, and every way in which they do not: one sentence each, in time."""

import socket
import threading
import time

import pytest

from gatedjax.errors import InputError, TrainingError
from gatedjax.runtime import meeting
from gatedjax.runtime.meeting import Place, meet


@pytest.fixture(autouse=True)
def little_patience(monkeypatch):
    monkeypatch.setattr(meeting, "_PORT_SECONDS", 0.5)


@pytest.fixture
def address():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return f"localhost:{s.getsockname()[1]}"


def meetings(*places, seconds=1.5):
    """What comes of each: None, or the exception."""
    ends = [None] * len(places)

    def run(i):
        try:
            meet(places[i], seconds)
        except (InputError, TrainingError) as e:
            ends[i] = e

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(places))]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return ends


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (2, 1, 0)])
def test_all_come_in_any_order(address, order):
    places = [Place(address, 3, i) for i in order]
    assert meetings(*places, seconds=20) == [None] * 3
    # The port is free again: jax listens there next, and so may another run.
    assert meetings(*places, seconds=20) == [None] * 3


def test_two_processes_with_number_0(address):
    for end in meetings(Place(address, 2, 0), Place(address, 2, 0)):
        assert isinstance(end, InputError) and "--process_id: got 0 on two processes" in str(end)


def test_two_processes_with_one_number(address):
    places = [Place(address, 3, 0), Place(address, 3, 1), Place(address, 3, 1)]
    for end in meetings(*places):
        assert isinstance(end, InputError) and "--process_id: got 1 on two processes" in str(end)


def test_a_number_is_free_again_when_its_process_is_gone(address):
    host_and_port = meeting.split_address(address)
    ends = []
    thread = threading.Thread(
        target=lambda: ends.extend(meetings(Place(address, 3, 0), seconds=20))
    )
    thread.start()
    time.sleep(0.2)
    with socket.create_connection(host_and_port) as gone:
        gone.sendall(b'{"gatedjax": 1, "process": 1, "processes": 3}\n')
        time.sleep(0.2)
    assert meetings(Place(address, 3, 1), Place(address, 3, 2), seconds=20) == [None] * 2
    thread.join()
    assert ends == [None]


def test_different_numbers_of_processes(address):
    for end in meetings(Place(address, 2, 0), Place(address, 3, 1)):
        assert isinstance(end, InputError)
        assert "--num_processes: got 3 on process 1 and 2 on process 0" in str(end)


def test_somebody_does_not_come(address):
    start = time.monotonic()
    for end in meetings(Place(address, 4, 0), Place(address, 4, 2)):
        assert isinstance(end, TrainingError)
        assert f"processes 1, 3 of 4 did not come to {address} within 1.5 s" in str(end)
    assert time.monotonic() - start < 10


def test_nobody_at_the_coordinator(address):
    (end,) = meetings(Place(address, 2, 1))
    assert isinstance(end, TrainingError) and "nobody answers (Connection refused)" in str(end)


def test_an_unknown_name():
    (end,) = meetings(Place("nowhere.invalid:7000", 2, 0))
    assert isinstance(end, InputError) and "process 0 cannot listen at nowhere.invalid" in str(end)
    (end,) = meetings(Place("nowhere.invalid:7000", 2, 1))
    assert isinstance(end, TrainingError) and "nobody answers" in str(end)


def test_the_address_of_another_machine():
    (end,) = meetings(Place("192.0.2.1:7000", 2, 0))
    assert isinstance(end, InputError) and "Cannot assign requested address" in str(end)


@pytest.mark.parametrize("words", [b"", b"SSH-2.0\r\n", b'{"answer": "go"}\n', b"[]\n", b"\xff\n"])
def test_a_port_of_somebody_else(address, words):
    host, port = meeting.split_address(address)
    with socket.create_server((host, port)) as server:
        server.settimeout(20)

        def talk():
            try:
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(words)
            except OSError:
                return

        thread = threading.Thread(target=talk)
        thread.start()
        first, second = meetings(Place(address, 2, 0), Place(address, 2, 1))
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert isinstance(first, InputError) and "Address already in use" in str(first)
    assert isinstance(second, TrainingError)
    assert "something answers that is no process 0" in str(second)


@pytest.mark.parametrize(
    "words", [b"", b"GET / HTTP/1.1\r\n\r\n", b"[" * 900 + b"\n", b"\x00" * 2000]
)
def test_a_stranger_does_not_disturb(address, words):
    host, port = meeting.split_address(address)
    ends = []
    thread = threading.Thread(
        target=lambda: ends.extend(meetings(Place(address, 2, 0), seconds=20))
    )
    thread.start()
    time.sleep(0.2)
    with socket.create_connection((host, port)) as stranger:
        stranger.sendall(words)
    assert meetings(Place(address, 2, 1), seconds=20) == [None]
    thread.join()
    assert ends == [None]


def test_it_listens_at_the_given_address_only(address):
    listeners = meeting._try_to_listen(address)
    try:
        for listener in listeners:
            assert listener.getsockname()[0] in ("127.0.0.1", "::1")
    finally:
        for listener in listeners:
            listener.close()


def test_another_address_to_listen_at(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "127.0.0.1:7001")
    assert Place("service.example:7000", 2, 0).bind_address == "127.0.0.1:7001"


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("host:1", ("host", 1)),
        ("[::1]:8476", ("::1", 8476)),
        ("host", None),
        (":80", None),
        ("host:0", None),
        ("host:65536", None),
        ("host:-1", None),
        ("host:٣", None),
    ],
)
def test_addresses(address, parts):
    assert meeting.split_address(address) == parts
