"""Which files to flush now.  Pure: events and ``now`` in, inodes out.

Owns the order (forced first, then the oldest), the delay, the number at once, and the pauses
after errors.  Does not own how much is dirty (the caller says whether there is pressure) nor
the flushing itself.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from filer.ids import InodeId

RETRY_S_FIRST = 1.0
RETRY_S_MAX = 60.0
"""Pause after a failed flush of a file; doubles from the first to the largest."""

UNREACHABLE_FILES_AT_ONCE = 1
"""While the core filer does not answer one flush waits for it; more would only hold memory."""


@dataclass(frozen=True, slots=True)
class Decision:
    start: list[InodeId]
    """Begin to flush these now; they count as running."""
    wake_at: float | None
    """When to ask again if nothing happens until then."""


class Schedule:
    """``dirtied`` … ``next`` … ``finished``; a file is in at most one flush at a time."""

    def __init__(self, *, delay_s: float, files_at_once: int) -> None:
        self._delay_s = delay_s
        self._files_at_once = files_at_once
        self._dirty_at: dict[InodeId, float] = {}
        self._by_age: list[tuple[float, InodeId]] = []  # heaps; entries may be outdated
        self._by_retry: list[tuple[float, InodeId]] = []
        self._retry_at: dict[InodeId, float] = {}
        self._failures: dict[InodeId, int] = {}
        self._forced: dict[InodeId, None] = {}  # in order of demand
        self._running: set[InodeId] = set()
        self._paused_until = float("-inf")
        self._pauses = 0

    def dirtied(self, inode: InodeId, at: float) -> None:
        """*inode* has been dirty since *at* (an earlier statement stands)."""
        if inode not in self._dirty_at:
            self._dirty_at[inode] = at
            if inode not in self._running:
                heapq.heappush(self._by_age, (at, inode))

    def force(self, inode: InodeId) -> None:
        """Somebody waits for the next flush of *inode*: no delay, no pause after errors."""
        self._forced[inode] = None

    def forget(self, inode: InodeId) -> None:
        """*inode* is clean without a flush: discarded."""
        for table in (self._dirty_at, self._forced, self._retry_at, self._failures):
            table.pop(inode, None)

    def finished(self, inode: InodeId, now: float, *, dirty_since: float | None) -> None:
        """A flush succeeded; ``dirty_since``: what was changed meanwhile."""
        self._running.discard(inode)
        self._pauses = 0
        self._dirty_at.pop(inode, None)
        self._retry_at.pop(inode, None)
        self._failures.pop(inode, None)
        if dirty_since is not None:
            self.dirtied(inode, dirty_since)
        else:
            self._forced.pop(inode, None)

    def failed(self, inode: InodeId, now: float) -> None:
        """The core filer refused: the file stays dirty and is tried again later."""
        self._running.discard(inode)
        if inode not in self._dirty_at:
            return  # forgotten meanwhile
        failures = self._failures[inode] = self._failures.get(inode, 0) + 1
        retry_at = now + min(RETRY_S_MAX, RETRY_S_FIRST * 2.0 ** min(failures - 1, 16))
        self._retry_at[inode] = retry_at
        heapq.heappush(self._by_retry, (retry_at, inode))

    def interrupted(self, inode: InodeId, now: float) -> None:
        """The core filer could not be asked: the whole volume pauses."""
        self._running.discard(inode)
        self._pauses += 1
        pause_s = min(RETRY_S_MAX, RETRY_S_FIRST * 2.0 ** min(self._pauses - 1, 16))
        self._paused_until = max(self._paused_until, now + pause_s)
        if inode in self._dirty_at:
            heapq.heappush(self._by_age, (self._dirty_at[inode], inode))

    def is_running(self, inode: InodeId) -> bool:
        return inode in self._running

    def failing(self) -> int:
        """How many files wait for their retry."""
        return len(self._retry_at)

    def oldest_dirty_at(self) -> float | None:
        # Ages of running and failing files are not in the heap.
        return min(self._dirty_at.values(), default=None)

    def next(self, now: float, *, is_urgent: bool, is_reachable: bool) -> Decision:
        """What to start now.

        *is_urgent*: everything dirty is due, whatever its age (limits near, log failing, drain).
        """
        start: list[InodeId] = []
        if now < self._paused_until:
            return Decision(start, self._paused_until)
        room = (self._files_at_once if is_reachable else UNREACHABLE_FILES_AT_ONCE)
        room -= len(self._running)
        wake_at: float | None = None

        for inode in list(self._forced) if room > 0 else ():
            if inode in self._running:
                continue
            if inode not in self._dirty_at:
                del self._forced[inode]
                continue
            if len(start) >= room:
                break
            del self._forced[inode]
            self._start(inode, start)

        while self._by_retry and self._by_retry[0][0] <= now:
            at, inode = heapq.heappop(self._by_retry)
            if self._retry_at.get(inode) == at:
                del self._retry_at[inode]
                heapq.heappush(self._by_age, (self._dirty_at[inode], inode))
        if self._by_retry:
            wake_at = self._by_retry[0][0]

        while self._by_age:
            at, inode = self._by_age[0]
            is_stale = (
                self._dirty_at.get(inode) != at or inode in self._running
                or inode in self._retry_at)
            if is_stale:
                heapq.heappop(self._by_age)
                continue
            due_at = at + self._delay_s
            if not is_urgent and due_at > now:
                if due_at != float("inf"):
                    wake_at = due_at if wake_at is None else min(wake_at, due_at)
                break
            if len(start) >= room:
                break
            heapq.heappop(self._by_age)
            self._start(inode, start)
        return Decision(start, wake_at)

    def _start(self, inode: InodeId, start: list[InodeId]) -> None:
        self._running.add(inode)
        self._retry_at.pop(inode, None)
        start.append(inode)
