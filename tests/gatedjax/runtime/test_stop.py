"""A stop signal is never lost: whatever line it interrupts, whichever process gets it, however
often.
"""

import os
import random
import signal
import sys
import threading

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from gatedjax.runtime.stop import Stop, Stopped, Vote, votes_on

MESH = Mesh(np.array(jax.devices()[:1]), ("data",))


@pytest.fixture
def stop(signals_of_a_terminal):
    """Between steps. What pytest had for the signals comes back."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    with Stop() as stop:
        stop.between_steps(MESH)
        yield stop
    for number, handler in before.items():
        signal.signal(number, handler)


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_told_at_every_later_step(stop, number):
    assert not stop.requested()
    send(number)
    assert [stop.requested() for _ in range(3)] == [number] * 3
    assert stop.obeyed == number


def test_more_signals_change_nothing(stop):
    send(signal.SIGTERM, signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    assert stop.requested() == signal.SIGTERM


def test_a_second_ctrl_c_ends_at_once(stop):
    send(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def steps_until_stop(stop, signal_at_event):
    """How many steps a loop makes when a signal interrupts it at the n-th traced event; None if it
    has fewer. Each line of the loop, and of what it calls, is an event.
    """
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        count += 1
        if count == signal_at_event:
            send(signal.SIGTERM)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for step in range(4):
            if stop.requested():
                return step
    finally:
        sys.settrace(before)
    return None if count < signal_at_event else "lost"


def test_it_is_not_lost_at_any_line(monkeypatch):
    outcomes = []
    for event in range(1, 200):
        before = signal.getsignal(signal.SIGTERM)
        with Stop() as stop:
            stop.between_steps(MESH)
            outcomes.append(steps_until_stop(stop, event))
        signal.signal(signal.SIGTERM, before)
        if outcomes[-1] is None:
            break
    assert len(outcomes) > 8 and outcomes.pop() is None
    # The last events come after the last question: whoever asks again would be told.
    assert "lost" not in outcomes[:-3] and set(outcomes[:-3]) <= {0, 1, 2, 3}


def test_before_the_steps_and_after_them_it_ends_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM"), Stop():
        send(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    with pytest.raises(Stopped, match="SIGTERM"), Stop() as stop:
        stop.between_steps(MESH)
        stop.outside_steps()
        send(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)


def test_handlers_come_back_and_what_nohup_switched_off_stays_off():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        of_sigterm = signal.getsignal(signal.SIGTERM)
        with Stop():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != of_sigterm
        assert signal.getsignal(signal.SIGTERM) == of_sigterm
    finally:
        signal.signal(signal.SIGHUP, before)


class Booth:
    """An all-reduce between threads: a vote's result can be read when all have begun it."""

    def __init__(self, voters):
        self._voters = voters
        self._votes = {}
        self._news = threading.Condition()

    def count_of(self, begun=0):
        def count(number):
            nonlocal begun
            begun += 1
            with self._news:
                self._votes.setdefault(begun, []).append(number)
                self._news.notify_all()
            return Result(self, begun)

        return count

    def result(self, vote):
        with self._news:
            assert self._news.wait_for(lambda: len(self._votes[vote]) == self._voters, 20)
            return max(self._votes[vote])


class Result:
    def __init__(self, booth, vote):
        self._booth, self._vote = booth, vote

    def __int__(self):
        return self._booth.result(self._vote)


@pytest.mark.parametrize("seed", range(20))
def test_all_processes_stop_after_the_same_step(seed):
    """Whoever gets the signal, however far ahead of the others. None goes on alone."""
    chance = random.Random(seed)
    voters = chance.randrange(1, 6)
    booth = Booth(voters)
    signals = {chance.randrange(voters): chance.randrange(1, 30) for _ in range(3)}
    stopped = {}

    def run(process):
        own = random.Random(f"{seed} {process}")
        vote = Vote(booth.count_of())
        for step in range(1, 60):
            if own.random() < 0.2:
                threading.Event().wait(own.random() / 500)
            if vote(15 if step >= signals.get(process, 1000) else 0):
                stopped[process] = step
                return

    threads = [threading.Thread(target=run, args=(i,)) for i in range(voters)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert stopped == dict.fromkeys(range(voters), min(signals.values()) + 1)


def test_votes_are_counted_over_all_devices():
    mesh = Mesh(np.array(jax.devices()).reshape(-1, 1), ("data", "tensor"))
    count = votes_on(mesh)
    assert [int(count(n)) for n in (0, 15, 0, 2)] == [0, 15, 0, 2]
