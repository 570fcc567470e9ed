"""How many bytes of read-ahead to keep on the link: enough to fill it, few enough not to clog it.

Owns an estimate of the link's rate and delay, after BBR (Cardwell et al., ACM Queue 2016); owns no
request.  A reply that a client waits for queues behind everything already in flight, so fetching
ahead without limit would make every cold read and every LOOKUP as slow as the longest window:
64 MiB in flight are half a second on 1 Gb/s.

- rate: the most bytes delivered per second over the life of any recent fetch;
- delay: the shortest recent fetch;
- bytes in flight: ``GAIN`` times their product.
"""

from __future__ import annotations

from dataclasses import dataclass

GAIN = 4.0
"""2 would fill an ideal link; a busy event loop adds delays that are not the link's."""
BYTES_MIN = 4 << 20
BYTES_AT_START = 16 << 20
SAMPLES_MIN = 8
RATE_WINDOW_S = 5.0
DELAY_DRIFT_PER_S = 0.01
"""The shortest delay is forgotten slowly: while the link is kept full, only longer ones are seen,
and a quick forgetting would take our own queue for the link's delay."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A fetch that is on its way."""

    at_s: float
    delivered_bytes: int
    """By all fetches until then."""


class Pacing:
    def __init__(self) -> None:
        self._delivered_bytes = 0
        self._samples = 0
        self._delay_s = float("inf")
        self._delay_at_s = 0.0
        self._rates = [0.0, 0.0]
        """The highest of this window and of the one before."""
        self._window_began_s = 0.0

    def on_sent(self, now_s: float) -> Sent:
        return Sent(now_s, self._delivered_bytes)

    def on_received(self, sent: Sent, count_bytes: int, now_s: float) -> None:
        self._delivered_bytes += count_bytes
        delay_s = now_s - sent.at_s
        if delay_s <= 0 or not count_bytes:
            return
        self._samples += 1
        drift = 1 + DELAY_DRIFT_PER_S * (now_s - self._delay_at_s)
        self._delay_s, self._delay_at_s = min(delay_s, self._delay_s * drift), now_s
        if now_s - self._window_began_s >= RATE_WINDOW_S:
            self._rates = [0.0, self._rates[0]]
            self._window_began_s = now_s
        rate = (self._delivered_bytes - sent.delivered_bytes) / delay_s
        self._rates[0] = max(self._rates[0], rate)

    @property
    def bytes_per_s(self) -> float:
        return max(self._rates)

    @property
    def in_flight_bytes_wanted(self) -> int:
        if self._samples < SAMPLES_MIN:
            return BYTES_AT_START
        return max(BYTES_MIN, int(GAIN * self.bytes_per_s * self._delay_s))
