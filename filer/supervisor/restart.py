"""When a child that ended is started again.  Pure: events and ``now_s`` in, decisions out.

A child that ran well for a while is started again at once: most exits are a single bad moment,
and NFS clients wait meanwhile.  One that keeps dying is started ever more slowly, so that it
neither burns the machine nor floods the log.  One that says it is misconfigured (exit status 64)
is not started again before the operator changed something.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import ClassVar

EXIT_MISCONFIGURED = 64


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    delay_s_min: float = 0.5
    delay_s_max: float = 30.0
    proven_after_s: float = 30.0
    """A child that lived this long is well: its next exit counts as the first."""


@dataclass(frozen=True, slots=True)
class RestartAt:
    at_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    reason: str


@dataclass(slots=True)
class Restarts:
    """The history of one child."""

    policy: RestartPolicy = field(default_factory=RestartPolicy)
    count: int = 0
    """Restarts so far."""
    last_exit_s: float | None = None
    last_reason: str = ""
    _started_s: float = 0.0
    _in_a_row: int = 0

    def started(self, now_s: float) -> None:
        self._started_s = now_s

    def ended(self, now_s: float, reason: str, *, misconfigured: bool = False) -> (
        RestartAt | GiveUp
    ):
        """What to do about a child that ended at *now_s*."""
        assert now_s >= self._started_s, "a child ended before it started"
        self.last_exit_s, self.last_reason = now_s, reason
        if misconfigured:
            return GiveUp(reason)
        if now_s - self._started_s >= self.policy.proven_after_s:
            self._in_a_row = 0
        delay_s = 0.0 if self._in_a_row == 0 else min(
            self.policy.delay_s_max, self.policy.delay_s_min * 2.0 ** (self._in_a_row - 1))
        # Capped: 2.0 ** n overflows when a child dies for years.
        self._in_a_row = min(self._in_a_row + 1, 64)
        self.count += 1
        return RestartAt(now_s + delay_s, reason)


def exit_reason(status: int) -> str:
    """A ``subprocess`` return code in words."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


@dataclass(slots=True)
class HangDetector:
    """Tells a server that hangs from one that is slow once.

    A server is taken for hung after ``probes_needed`` unanswered probes in a row.  While the cause
    may lie behind it (*excused*: a core filer that does not answer blocks requests, and at last
    all of its threads), it is left alone: killing it would help nobody.
    """

    probes_needed: ClassVar[int] = 4
    _unanswered: int = 0

    def probed(self, *, answered: bool, excused: bool) -> bool:
        """Whether the server must be killed now."""
        if answered:
            self._unanswered = 0
            return False
        self._unanswered += 1
        if self._unanswered < self.probes_needed or excused:
            return False
        self._unanswered = 0
        return True
