"""How long to wait before the next try.  Pure; randomness is passed in."""

from __future__ import annotations

from random import Random

_FIRST_S = 0.05
_LONGEST_S = 5.0


def backoff_s(tries_failed: int, random: Random) -> float:
    """Doubling from 50 ms to 5 s, jittered downwards so that many waiters spread out."""
    exponent = min(tries_failed - 1, 16)
    return min(_LONGEST_S, _FIRST_S * 2.0**exponent) * random.uniform(0.5, 1.0)
