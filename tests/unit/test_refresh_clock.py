"""The optimizer's clock: time on a CPU, events on a card, which are played here."""

from types import SimpleNamespace

import pytest
import torch

from ds_lowrank.optimizer import refresh_clock
from ds_lowrank.optimizer.refresh_clock import RefreshClock

CPU, CARD = torch.device("cpu"), torch.device("cuda")


class Event:
    """An event on a stream that passes it when it is told to; the stream's time is in milliseconds."""

    now, passed = 0.0, 0
    waits = 0

    def __init__(self, device, enable_timing):
        assert (device, enable_timing) == ("cuda", True)

    def record(self):
        self.time = Event.now

    def query(self):
        return self.time <= Event.passed

    def synchronize(self):
        Event.waits += 1
        Event.passed = max(Event.passed, self.time)

    def elapsed_time(self, end):
        assert end.query(), "read before the card has passed it"
        return end.time - self.time


def test_on_a_card_nothing_waits_until_the_time_is_read(monkeypatch):
    monkeypatch.setattr(refresh_clock, "torch", SimpleNamespace(Event=Event))
    clock = RefreshClock()
    for start, end in ((0, 5), (10, 12), (20, 21)):
        Event.now = start
        first = clock.mark(CARD)
        Event.now = end
        clock.add(first, clock.mark(CARD))
        Event.passed = end - 1  # the card is a little behind
    assert Event.waits == 0
    assert clock.seconds() == pytest.approx(0.008)
    assert Event.waits == 2  # the first had been passed when the third was added, and was read then
    assert clock.seconds() == pytest.approx(0.008) and Event.waits == 2


def test_on_a_cpu_it_is_the_time_between_two_marks(monkeypatch):
    times = iter((1.0, 1.5, 7.0, 9.0))
    monkeypatch.setattr(refresh_clock, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    clock = RefreshClock()
    for _ in range(2):
        clock.add(clock.mark(CPU), clock.mark(CPU))
    assert clock.seconds() == 2.5
