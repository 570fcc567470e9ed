"""Which clean chunks to drop next: S3-FIFO over byte sizes (Yang et al., SOSP '23).

Owns the queues and their accounting; owns no chunk, no key and no clock.  Entries are small
integers that index parallel arrays, so that a chunk costs 25 bytes here (a dict of objects would
cost 200): millions of chunks stay bounded.

- A new chunk enters the *small* queue, a tenth of the bytes.  At its end it moves to *main* if it
  was used again, else it leaves and only its fingerprint stays, in the *ghost* table.  A scan
  therefore flows through the small queue and never touches main.
- A chunk whose fingerprint is still in the ghost table was dropped too early: it enters main.
- Main is a FIFO with second chances (CLOCK with a counter up to 3).

Uses of one chunk within ``correlated_s`` count as one: a client that streams through a 4 MiB
chunk in 1 MiB reads uses it once (O'Neil's correlated reference period, SIGMOD '93).
"""

from __future__ import annotations

from array import array
from collections.abc import Container, Iterable

SMALL_SHARE = 0.1
CORRELATED_S = 30.0
GHOSTS_MAX = 1 << 17
"""Buckets of 12 bytes; a ghost lives for as many evictions as there are chunks, at most this."""
BYTES_PER_ENTRY = 25

_NONE = 0xFFFF_FFFF
_FREE, _SMALL, _MAIN = 0, 1, 2
_USES_MAX = 3


def bytes_to_evict(
    used_bytes: int, incoming_bytes: int, *, capacity_bytes: int, high_water: float,
    low_water: float,
) -> int:
    """How much must go before *incoming_bytes* may come: nothing below high water, else all
    that is above low water."""
    after = used_bytes + incoming_bytes
    if after <= capacity_bytes * high_water:
        return 0
    return min(used_bytes, after - int(capacity_bytes * low_water))


class _Queue:
    """A doubly linked list threaded through the policy's arrays; the oldest is at the tail."""

    __slots__ = ("bytes", "count", "head", "tail")

    def __init__(self) -> None:
        self.head = self.tail = _NONE
        self.count = self.bytes = 0


class _Ghosts:
    """Fingerprints of chunks that left the small queue, with the eviction number they left at.

    Direct-mapped: two fingerprints in one bucket overwrite each other, which only forgets early.
    """

    __slots__ = ("_fingerprints", "_mask", "_numbers", "number")

    def __init__(self, buckets: int) -> None:
        self._mask = buckets - 1
        self._fingerprints = array("Q", bytes(8 * buckets))
        self._numbers = array("I", bytes(4 * buckets))
        self.number = 0

    def add(self, fingerprint: int) -> None:
        self.number = self.number % 0xFFFF_FFFF + 1  # 0 marks an empty bucket
        bucket = fingerprint & self._mask
        self._fingerprints[bucket] = fingerprint
        self._numbers[bucket] = self.number

    def take(self, fingerprint: int, age_max: int) -> bool:
        """Whether it left at most *age_max* evictions ago; it is then forgotten."""
        bucket = fingerprint & self._mask
        number = self._numbers[bucket]
        if number == 0 or self._fingerprints[bucket] != fingerprint:
            return False
        self._numbers[bucket] = 0
        return (self.number - number) % 0xFFFF_FFFF < age_max


class Eviction:
    """The queues.  An *entry* is the integer by which the caller names a chunk here."""

    def __init__(
        self, *, small_share: float = SMALL_SHARE, correlated_s: float = CORRELATED_S,
        ghosts_max: int = GHOSTS_MAX,
    ) -> None:
        """*ghosts_max* is a power of two."""
        assert ghosts_max & (ghosts_max - 1) == 0
        self._small_share = small_share
        self._correlated_s = correlated_s
        self._ghosts_max = ghosts_max
        self._queues = {_SMALL: _Queue(), _MAIN: _Queue()}
        self._ghosts = _Ghosts(ghosts_max)
        self._older = array("I")
        self._newer = array("I")
        self._bytes = array("I")
        self._counted_at_s = array("I")
        self._fingerprints = array("Q")
        self._state = bytearray()
        """Queue in the low 2 bits, uses above."""
        self._free: list[int] = []

    # -- accounting ---------------------------------------------------------------------------

    @property
    def bytes(self) -> int:
        return self._queues[_SMALL].bytes + self._queues[_MAIN].bytes

    @property
    def count(self) -> int:
        return self._queues[_SMALL].count + self._queues[_MAIN].count

    @property
    def small_bytes(self) -> int:
        return self._queues[_SMALL].bytes

    def __contains__(self, entry: int) -> bool:
        return entry < len(self._state) and self._state[entry] & 3 != _FREE

    # -- events -------------------------------------------------------------------------------

    def add(self, fingerprint: int, size_bytes: int, now_s: float) -> int:
        """A chunk enters; returns the entry that names it from now on."""
        entry = self._allocate()
        self._place(entry, fingerprint, size_bytes, now_s)
        age_max = min(max(self.count, 64), self._ghosts_max)
        came_back = self._ghosts.take(fingerprint, age_max)
        self._push(_MAIN if came_back else _SMALL, entry)
        return entry

    def restore(self, entries: Iterable[tuple[int, int, int]]) -> None:
        """Refill an empty policy after a restart with (entry, fingerprint, bytes), oldest first.

        All go to main: they had survived, and a burst of new chunks shall not flush them.
        """
        assert self.count == 0
        for entry, fingerprint, size_bytes in entries:
            while len(self._state) <= entry:
                self._extend()
            assert self._state[entry] & 3 == _FREE
            self._place(entry, fingerprint, size_bytes, 0.0)
            self._push(_MAIN, entry)
        self._free = [e for e, state in enumerate(self._state) if state & 3 == _FREE]

    def touch(self, entry: int, now_s: float) -> None:
        """The chunk was used."""
        if now_s - self._counted_at_s[entry] < self._correlated_s:
            return
        self._counted_at_s[entry] = int(now_s)
        state = self._state[entry]
        if state >> 2 < _USES_MAX:
            self._state[entry] = state + 4

    def resize(self, entry: int, size_bytes: int) -> None:
        assert entry in self
        self._queues[self._state[entry] & 3].bytes += size_bytes - self._bytes[entry]
        self._bytes[entry] = size_bytes

    def remove(self, entry: int) -> None:
        """The chunk is gone for another reason than space."""
        self._unlink(entry)
        self._state[entry] = _FREE
        self._free.append(entry)

    def victims(
        self, bytes_wanted: int, pinned: Container[int] = (), *, count_wanted: int = 0,
        count_max: int | None = None,
    ) -> list[int]:
        """Take out *count_wanted* entries or more, of at least *bytes_wanted* together; fewer
        if the rest is pinned, or *count_max* is reached.

        The entries are free for reuse at once: read what belongs to them before the next `add`.
        """
        chosen: list[int] = []
        while (bytes_wanted > 0 or len(chosen) < count_wanted) and len(chosen) != count_max:
            entry = self._next_victim(pinned)
            if entry is None:
                break
            bytes_wanted -= self._bytes[entry]
            chosen.append(entry)
            self.remove(entry)
        return chosen

    # -- queues -------------------------------------------------------------------------------

    def _next_victim(self, pinned: Container[int]) -> int | None:
        if self.small_bytes > self._small_share * self.bytes:
            entry = self._oldest_small(pinned)
            return entry if entry is not None else self._oldest_main(pinned)
        entry = self._oldest_main(pinned)
        return entry if entry is not None else self._oldest_small(pinned)

    def _oldest_small(self, pinned: Container[int]) -> int | None:
        queue = self._queues[_SMALL]
        for _ in range(queue.count):
            entry = queue.tail
            if entry in pinned:
                self._requeue(entry, _SMALL, self._state[entry] >> 2)
            elif self._state[entry] >> 2:
                self._requeue(entry, _MAIN, 0)
            else:
                self._ghosts.add(self._fingerprints[entry])
                return entry
        return None

    def _oldest_main(self, pinned: Container[int]) -> int | None:
        queue = self._queues[_MAIN]
        for _ in range(queue.count * (_USES_MAX + 1)):
            entry = queue.tail
            uses = self._state[entry] >> 2
            if entry in pinned:
                self._requeue(entry, _MAIN, uses)
            elif uses:
                self._requeue(entry, _MAIN, uses - 1)
            else:
                return entry
        return None

    def _requeue(self, entry: int, queue: int, uses: int) -> None:
        self._unlink(entry)
        self._state[entry] = uses << 2
        self._push(queue, entry)

    def _push(self, name: int, entry: int) -> None:
        queue = self._queues[name]
        self._state[entry] = (self._state[entry] & ~3) | name
        self._older[entry], self._newer[entry] = queue.head, _NONE
        if queue.head != _NONE:
            self._newer[queue.head] = entry
        else:
            queue.tail = entry
        queue.head = entry
        queue.count += 1
        queue.bytes += self._bytes[entry]

    def _unlink(self, entry: int) -> None:
        name = self._state[entry] & 3
        assert name != _FREE, f"entry {entry} is not in a queue"
        queue = self._queues[name]
        older, newer = self._older[entry], self._newer[entry]
        if newer != _NONE:
            self._older[newer] = older
        else:
            queue.head = older
        if older != _NONE:
            self._newer[older] = newer
        else:
            queue.tail = newer
        queue.count -= 1
        queue.bytes -= self._bytes[entry]

    # -- storage ------------------------------------------------------------------------------

    def _allocate(self) -> int:
        if not self._free:
            self._extend()
            return len(self._state) - 1
        return self._free.pop()

    def _extend(self) -> None:
        for column in (self._older, self._newer, self._bytes, self._counted_at_s):
            column.append(0)
        self._fingerprints.append(0)
        self._state.append(_FREE)

    def _place(self, entry: int, fingerprint: int, size_bytes: int, now_s: float) -> None:
        self._state[entry] = _FREE
        self._fingerprints[entry] = fingerprint
        self._bytes[entry] = size_bytes
        self._counted_at_s[entry] = int(now_s)
