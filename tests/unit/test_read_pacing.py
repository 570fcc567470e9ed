"""Pacing over modelled links: full, but not clogged."""

from __future__ import annotations

import heapq

import pytest

from filer.cache.pacing import BYTES_AT_START, BYTES_MIN, Pacing, Sent

MIB = 1 << 20


class Pipe:
    """A link that is always given as much as the pacing wants."""

    def __init__(self, bytes_per_s: float, rtt_s: float) -> None:
        self.bytes_per_s, self.rtt_s = bytes_per_s, rtt_s
        self.pacing = Pacing()
        self.now_s = self.free_at_s = 0.0
        self.replies: list[tuple[float, int, Sent]] = []
        self.received = 0

    def run(self, seconds: float) -> float:
        """Returns: the share of the link that was used."""
        until_s, before = self.now_s + seconds, self.received
        while self.now_s < until_s:
            while (len(self.replies) + 1) * MIB <= self.pacing.in_flight_bytes_wanted:
                self.free_at_s = max(self.free_at_s, self.now_s + self.rtt_s / 2) + (
                    MIB / self.bytes_per_s)
                sent = self.pacing.on_sent(self.now_s)
                heapq.heappush(
                    self.replies, (self.free_at_s + self.rtt_s / 2, self.received, sent))
            self.now_s, _, sent = heapq.heappop(self.replies)
            self.pacing.on_received(sent, MIB, self.now_s)
            self.received += MIB
        return (self.received - before) / self.bytes_per_s / seconds

    @property
    def queue_s(self) -> float:
        """How long a new reply would wait behind those in flight."""
        return max(self.free_at_s - self.now_s, 0)


@pytest.mark.parametrize("rtt_s", [0.002, 0.030, 0.200])
@pytest.mark.parametrize("megabytes_per_s", [12.5, 125, 1250])
def test_a_link_is_kept_full_for_minutes_without_an_ever_longer_queue(
    megabytes_per_s: float, rtt_s: float
) -> None:
    pipe = Pipe(megabytes_per_s * 1e6, rtt_s)
    pipe.run(2)

    assert pipe.run(5) > 0.95
    assert pipe.run(60) > 0.95
    page_s = MIB / pipe.bytes_per_s
    assert pipe.queue_s < 12 * (rtt_s + page_s)


def test_before_anything_is_known_enough_is_sent_for_a_gigabit_link() -> None:
    assert Pacing().in_flight_bytes_wanted == BYTES_AT_START


def test_a_link_that_became_faster_is_discovered() -> None:
    pipe = Pipe(12.5e6, 0.030)
    pipe.run(10)
    pipe.bytes_per_s = 125e6
    pipe.run(10)

    assert pipe.run(5) > 0.95


def test_a_link_that_became_slower_gets_less() -> None:
    pipe = Pipe(1250e6, 0.030)
    pipe.run(5)
    before = pipe.pacing.in_flight_bytes_wanted
    pipe.bytes_per_s = 12.5e6
    pipe.run(30)

    assert pipe.pacing.in_flight_bytes_wanted < before / 10


def test_idle_hours_do_not_break_the_estimate() -> None:
    pipe = Pipe(125e6, 0.030)
    pipe.run(5)
    pipe.now_s += 36_000.0
    pipe.replies.clear()
    pipe.run(1)

    assert pipe.pacing.in_flight_bytes_wanted >= BYTES_MIN
    assert pipe.run(5) > 0.95


def test_empty_replies_and_equal_times_are_no_samples() -> None:
    pacing = Pacing()
    for _ in range(100):
        pacing.on_received(pacing.on_sent(1.0), MIB, 1.0)
        pacing.on_received(pacing.on_sent(1.0), 0, 2.0)

    assert pacing.in_flight_bytes_wanted == BYTES_AT_START
