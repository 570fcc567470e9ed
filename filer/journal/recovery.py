"""What a log holds after a crash: its valid records, and what to do about the rest.  Pure.

Segments are fed oldest first, each in pieces of any size.  Records must follow each other
without a gap, also from segment to segment.  At the first place where none is:

- *A torn tail.*  Nothing from there on was ever acknowledged as stable: it is cut, with all
  later segments, even where single later records are whole.
- *Damage.*  Some later record says (``stable_end``) that this place had reached stable storage.
  Somebody was told so: stop with ``Corrupt``, naming file and offset, and touch nothing.

Does not own what the records mean (``filer/write_behind/dirty.py``) nor any file.
"""

from __future__ import annotations

from dataclasses import dataclass

from filer.errors import Corrupt, Fenced
from filer.ids import Epoch, Lsn
from filer.journal.record import MAGIC, Bad, Incomplete, Logged, decode

FIRST_LSN = Lsn(1)


@dataclass(frozen=True, slots=True)
class Recovered:
    end: Lsn
    """Where the valid records end and the next segment shall begin."""
    cut: bool
    """Whether anything at or beyond *end* was found and must be cut off."""


@dataclass(frozen=True, slots=True)
class _BadPlace:
    lsn: int
    file: str
    offset: int
    reason: str


class Recovery:
    """Call ``begin``, ``feed`` … ``feed``, ``end`` for each segment, then ``finish``."""

    def __init__(self, epoch: Epoch) -> None:
        self._epoch = epoch
        self._at: int | None = None  # the position looked at next
        self._bad: _BadPlace | None = None
        self._file = ""
        self._first = 0
        self._limit: int | None = None
        self._buffer = b""
        self._buffer_at = 0

    def begin(self, file: str, first: Lsn, next_first: Lsn | None) -> None:
        """The segment *file* holds positions from *first*.

        Those from *next_first* on are remains of an append that failed and was repeated in the
        next segment: they do not count.
        """
        if self._at is not None and self._bad is None and self._at != first:
            self._found_bad(f"the segment after it begins at {first}")
        self._file, self._first, self._limit = file, first, next_first
        self._at = self._buffer_at = first
        self._buffer = b""

    def feed(self, data: bytes) -> list[Logged]:
        """The valid records that *data*, the segment's next bytes, completes.

        Raises: Corrupt, Fenced.
        """
        self._buffer = self._buffer + data if self._buffer else data
        return self._scan(at_end=False)

    def end(self) -> list[Logged]:
        """The segment is at its end.  Raises as ``feed`` does."""
        records = self._scan(at_end=True)
        assert self._at is not None
        if self._bad is None and self._limit is not None and self._at < self._limit:
            self._found_bad("the segment ends too early")
        return records

    def finish(self) -> Recovered:
        if self._bad is not None:
            return Recovered(Lsn(self._bad.lsn), cut=True)
        return Recovered(Lsn(self._at) if self._at is not None else FIRST_LSN, cut=False)

    def _scan(self, *, at_end: bool) -> list[Logged]:
        records: list[Logged] = []
        view = memoryview(self._buffer)
        assert self._at is not None
        at = self._at
        end = self._buffer_at + len(view)
        while at < end and (self._limit is None or at < self._limit):
            found = decode(view[at - self._buffer_at :], at)
            if isinstance(found, Incomplete):
                if not at_end:
                    break
                found = Bad("the record is cut off")
            if isinstance(found, Bad):
                if self._bad is None:
                    self._at = at
                    self._found_bad(found.reason)
                at = self._next_candidate(at + 1, at_end=at_end)
                continue
            self._check(found)
            if self._bad is None:
                records.append(found)
            at = found.end
        self._at = at
        self._buffer = self._buffer[at - self._buffer_at :]
        self._buffer_at = at
        return records

    def _next_candidate(self, at: int, *, at_end: bool) -> int:
        """Where the next record may begin, once the chain of records is broken."""
        index = self._buffer.find(MAGIC, at - self._buffer_at)
        if index >= 0:
            return self._buffer_at + index
        end = self._buffer_at + len(self._buffer)
        return end if at_end else max(at, end - len(MAGIC) + 1)

    def _check(self, found: Logged) -> None:
        if found.epoch > self._epoch:
            raise Fenced(
                f"{self._file} was written in epoch {found.epoch}, this process has {self._epoch}")
        if self._bad is not None and found.stable_end > self._bad.lsn:
            bad = self._bad
            raise Corrupt(
                f"write-behind log damaged in {bad.file} at offset {bad.offset}: {bad.reason}; "
                f"{self._file} shows that this place had been stable.  Nothing was changed.")

    def _found_bad(self, reason: str) -> None:
        assert self._at is not None
        self._bad = _BadPlace(self._at, self._file, self._at - self._first, reason)
