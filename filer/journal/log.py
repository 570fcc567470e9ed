"""The write-behind log: one append-only sequence of records, in segment files on the local disk.

Owns segments, the order of records, what of them is written and what is stable, and the removal
of segments that nobody needs.  Does not own what records mean, nor which are still needed.

A position in the log (``Lsn``) counts bytes from the beginning of the volume's first log on; a
segment file is named by its first position, so position and file offset differ by a constant.

*Written* (``append`` returned): survives the death of the process, kill -9 included.
*Stable* (``sync`` returned): survives the death of the machine.

One append writes at a time.  Appends that arrive meanwhile are gathered and written by the first
of them in one call, in order of arrival; so the log never has holes, and no task of its own.

**Failures.**  A failed append reached nobody: its remains are cut off or, if even that fails,
superseded by the next segment, which begins where the last good record ended.  After a failed
fsync the kernel may have dropped the bytes and will not say so twice, so a segment whose fsync
failed is never stable again; ``sync`` fails until ``trim`` has removed it.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog
import trio

from filer import metrics
from filer.disk import Buffer, Disk, DiskFile
from filer.errors import Corrupt, TryAgain
from filer.ids import Epoch, Lsn
from filer.journal.record import (
    RECORD_BYTES_MAX,
    Bad,
    Incomplete,
    Logged,
    Record,
    SegmentStart,
    Write,
    decode,
    encode,
)
from filer.journal.recovery import FIRST_LSN, Recovered, Recovery

_log = structlog.get_logger(__name__)

_RECOVERY_READ_BYTES = 8 << 20
_BATCH_BYTES_MAX = 16 << 20
"""Of one write: bounds the time an append waits for those before it."""
_WRITE_OUT_BYTES = 8 << 20
"""Unsynced bytes after which write-out begins, so that a sync finds little left to do."""

_SEGMENT_NAME = re.compile(r"([0-9a-f]{16})\.log")


def segment_name(first: int) -> str:
    return f"{first:016x}.log"


class JournalUnavailable(TryAgain):
    """The local disk refused (full, failing): the records are not in the log."""

    def __init__(self, what: str, error: OSError) -> None:
        self.errno = error.errno
        super().__init__(f"{what}: {error.strerror or error}")


class Trimmed(LookupError):
    """A position was read whose segment is gone: nobody can need it any more."""


@dataclass(slots=True, eq=False)
class _Segment:
    first: int
    file: DiskFile
    end: int
    """After the last good record."""
    synced_end: int
    hinted_end: int
    name_is_stable: bool = False
    is_lost: bool = False
    """Its fsync failed: never to be trusted again."""
    write_lsns: array[int] = field(default_factory=lambda: array("Q"))
    """Of its Write records, to find the whole record around a piece of data."""


class _Batch:
    """Records of several appends, encoded to be written at once."""

    __slots__ = ("buffers", "end", "logged", "start")

    def __init__(self, start: int) -> None:
        self.start = self.end = start
        self.buffers: list[Buffer] = []
        self.logged: list[list[Logged]] = []


@dataclass(slots=True, eq=False)
class _Pending:
    records: Sequence[Record]
    turn: trio.Event | None = None
    logged: list[Logged] | None = None
    error: OSError | None = None


class Log:
    """Use ``open``.  All methods may be called concurrently."""

    def __init__(
        self, disk: Disk, *, node: str, epoch: Epoch, segment_bytes: int,
        wall_clock_ns: Callable[[], int],
    ) -> None:
        self._disk = disk
        self._node = node
        self._epoch = epoch
        self._segment_bytes = segment_bytes
        self._wall_clock_ns = wall_clock_ns
        self._segments: list[_Segment] = []
        self._active: _Segment | None = None
        self._end = 0
        self._queue: list[_Pending] = []
        self._is_writing = False
        self._sync_round: trio.Event | None = None
        self._leftover: list[str] = []
        """Names of forgotten segments that are still on the disk, newest first."""
        self._pins: Counter[int] = Counter()
        self._trimming = trio.Lock()

    # --- opening --------------------------------------------------------------------------

    @classmethod
    async def open(
        cls, disk: Disk, *, node: str, epoch: Epoch, segment_bytes: int,
        wall_clock_ns: Callable[[], int], replay: Callable[[Logged], None],
    ) -> Log:
        """Recover the log on *disk*: *replay* gets every valid record, oldest first.

        Raises: Corrupt (nothing was changed), Fenced (nothing was changed), OSError.
        """
        log = cls(disk, node=node, epoch=epoch, segment_bytes=segment_bytes,
                  wall_clock_ns=wall_clock_ns)
        recovered = await log._recover(replay)
        await log._cut(recovered)
        log._end = recovered.end
        return log

    async def _recover(self, replay: Callable[[Logged], None]) -> Recovered:
        matches = (_SEGMENT_NAME.fullmatch(name) for name in await self._disk.names())
        firsts = sorted(int(match[1], 16) for match in matches if match)
        recovery = Recovery(self._epoch)

        for first, following in itertools.zip_longest(firsts, firsts[1:]):
            file = await self._disk.open(segment_name(first))
            segment = _Segment(first, file, first, first, first)
            self._segments.append(segment)
            recovery.begin(
                segment_name(first), Lsn(first), None if following is None else Lsn(following))

            def take(records: list[Logged], segment: _Segment = segment) -> None:
                for logged in records:
                    segment.end = logged.end
                    if isinstance(logged.record, Write):
                        segment.write_lsns.append(logged.lsn)
                    replay(logged)

            size = await file.size()
            for start in range(0, size, _RECOVERY_READ_BYTES):
                data = await file.read(start, min(start + _RECOVERY_READ_BYTES, size))
                take(recovery.feed(data))
            take(recovery.end())
        return recovery.finish()

    async def _cut(self, recovered: Recovered) -> None:
        """Remove what is beyond the valid records, and make what remains stable.

        Newest first: a crash in between leaves a log that recovers to the same end.
        """
        while self._segments and self._segments[-1].first >= recovered.end:
            segment = self._segments.pop()
            segment.file.close()
            await self._disk.remove(segment_name(segment.first))
        if self._segments and recovered.cut:
            last = self._segments[-1]
            assert last.end == recovered.end
            await last.file.truncate(last.end - last.first)
        # Records that only the page cache held before a kill -9 are built upon from now on.
        for segment in self._segments:
            await segment.file.sync()
            segment.synced_end = segment.hinted_end = segment.end
            segment.name_is_stable = True
        await self._disk.sync_directory()

    # --- appending ------------------------------------------------------------------------

    @property
    def end(self) -> Lsn:
        """The position of the next record."""
        return Lsn(self._end)

    @property
    def byte_count(self) -> int:
        return self._end - self._segments[0].first if self._segments else 0

    @property
    def active_byte_count(self) -> int:
        return self._active.end - self._active.first if self._active is not None else 0

    @property
    def stable_end(self) -> int:
        """Everything below is on stable storage."""
        for segment in self._segments:
            if segment.is_lost:
                return segment.first
            if not segment.name_is_stable or segment.synced_end < segment.end:
                return segment.synced_end if segment.name_is_stable else segment.first
        return self._end

    async def append(self, records: Sequence[Record]) -> list[Logged]:
        """Write *records* one after the other; they are *written* when this returns.

        Not cancellable once begun.  Raises: JournalUnavailable: none of them is in the log.
        """
        logged = self._append_now(records)
        if logged is not None:
            segment = self._active
            if segment is not None and segment.end - segment.hinted_end >= _WRITE_OUT_BYTES:
                with trio.CancelScope(shield=True):
                    await self._start_write_out(segment)
            return logged
        pending = _Pending(records)
        self._queue.append(pending)
        with trio.CancelScope(shield=True):
            if self._is_writing:
                pending.turn = trio.Event()
                await pending.turn.wait()
            if pending.logged is None and pending.error is None:
                self._is_writing = True
                await self._write_batch()
                if self._queue:  # the first who came meanwhile writes for all of them
                    turn = self._queue[0].turn
                    assert turn is not None
                    turn.set()
                else:
                    self._is_writing = False
        if pending.error is not None:
            raise JournalUnavailable("write-behind log, append", pending.error) from pending.error
        assert pending.logged is not None
        return pending.logged

    def _append_now(self, records: Sequence[Record]) -> list[Logged] | None:
        """The short way, for little data and nobody else writing; ``None``: not possible."""
        segment = self._active
        if self._is_writing or segment is None or self._is_full(segment):
            return None
        data_bytes = sum(len(record.data) for record in records if isinstance(record, Write))
        if not segment.file.can_write_now(data_bytes):
            return None
        batch = _Batch(segment.end)
        self._encode_into(batch, records)
        try:
            segment.file.write_now(batch.start - segment.first, batch.buffers)
        except OSError:
            return None  # the long way meets the same error, and deals with it
        self._written(segment, batch)
        return batch.logged[0]

    async def _write_batch(self) -> None:
        """Write the oldest queued appends.  On an error all queued ones fail.

        Were the later ones kept, they could stand in the log without an earlier record of the
        same inode that they rely on.
        """
        try:
            segment = self._active
            if segment is None or self._is_full(segment):
                segment = await self._begin_segment()
            batch = _Batch(segment.end)
            for pending in self._queue:
                if batch.end - batch.start >= _BATCH_BYTES_MAX:
                    break
                self._encode_into(batch, pending.records)
            await segment.file.write(batch.start - segment.first, batch.buffers)
        except OSError as error:
            await self._give_up_segment()
            for pending in self._queue:
                pending.error = error
                if pending.turn is not None:
                    pending.turn.set()
            self._queue.clear()
            return
        self._written(segment, batch)
        for pending, logged in zip(self._queue, batch.logged, strict=False):
            pending.logged = logged
            if pending.turn is not None:
                pending.turn.set()
        del self._queue[: len(batch.logged)]
        if segment.end - segment.hinted_end >= _WRITE_OUT_BYTES:
            await self._start_write_out(segment)

    async def _start_write_out(self, segment: _Segment) -> None:
        start, segment.hinted_end = segment.hinted_end, segment.end
        await segment.file.start_write_out(start - segment.first, segment.end - segment.first)

    def _encode_into(self, batch: _Batch, records: Sequence[Record]) -> None:
        stable_end, now_ns = self.stable_end, self._wall_clock_ns()
        batch.logged.append(
            [self._encode(batch, record, stable_end, now_ns) for record in records])

    def _encode(self, batch: _Batch, record: Record, stable_end: int, now_ns: int) -> Logged:
        lsn = Lsn(batch.end)
        head, data = encode(
            record, lsn=lsn, epoch=self._epoch, stable_end=stable_end, written_at_ns=now_ns)
        batch.buffers.append(head)
        if len(data):
            batch.buffers.append(data)
        data_at = lsn + len(head)
        batch.end = data_at + len(data)
        return Logged(record, lsn, data_at, now_ns, self._epoch, stable_end, batch.end)

    def _written(self, segment: _Segment, batch: _Batch) -> None:
        segment.end = self._end = batch.end
        for logged in batch.logged:
            segment.write_lsns.extend([x.lsn for x in logged if isinstance(x.record, Write)])

    def _is_full(self, segment: _Segment) -> bool:
        return segment.end - segment.first >= self._segment_bytes

    async def _begin_segment(self) -> _Segment:
        await self._remove_leftover()
        first = max(self._end, FIRST_LSN)
        file = await self._disk.create(segment_name(first))
        segment = _Segment(first, file, first, first, first)
        batch = _Batch(first)
        try:
            self._encode_into(batch, [SegmentStart(self._node)])
            await file.write(0, batch.buffers)
        except OSError:
            file.close()
            raise
        self._written(segment, batch)
        self._segments.append(segment)
        self._active = segment
        return segment

    async def _give_up_segment(self) -> None:
        """After a failed append: cut its remains off; the next append begins a new segment."""
        segment, self._active = self._active, None
        if segment is None:
            return
        try:
            await segment.file.truncate(segment.end - segment.first)
        except OSError as error:
            _log.warning("cannot cut a failed append", segment=segment_name(segment.first),
                         error=str(error))

    def roll(self) -> None:
        """End the active segment, so that it can be trimmed once nobody needs it."""
        if not self._is_writing:
            self._active = None

    # --- stability ------------------------------------------------------------------------

    async def sync(self) -> None:
        """Everything written before this call is stable when it returns.

        Concurrent callers share one fsync.  Cancellable.
        Raises: JournalUnavailable: the bytes may be lost with the machine.
        """
        target = self._end
        while self._unsynced(target):
            if self._sync_round is not None:
                await self._sync_round.wait()
                continue
            self._sync_round = trio.Event()
            try:
                with trio.CancelScope(shield=True):
                    await self._sync_all()
            finally:
                self._sync_round.set()
                self._sync_round = None
        if any(segment.is_lost and segment.first < target for segment in self._segments):
            raise JournalUnavailable(
                "write-behind log, fsync", OSError(errno.EIO, os.strerror(errno.EIO)))

    def _unsynced(self, target: int) -> bool:
        return any(
            not segment.is_lost
            and (segment.synced_end < min(segment.end, target) or not segment.name_is_stable)
            for segment in self._segments if segment.first < target)

    async def _sync_all(self) -> None:
        begun = trio.current_time()
        for segment in list(self._segments):
            if segment.is_lost or segment.synced_end == segment.end:
                continue
            end = segment.end
            try:
                await segment.file.sync()
            except OSError as error:
                _log.error("fsync of the write-behind log failed",
                           segment=segment_name(segment.first), error=str(error))
                segment.is_lost = True
                if self._active is segment:
                    self._active = None
            else:
                segment.synced_end = segment.hinted_end = end
        unnamed = [segment for segment in self._segments if not segment.name_is_stable]
        if unnamed:
            try:
                await self._disk.sync_directory()
            except OSError as error:
                _log.error("fsync of the write-behind log's directory failed", error=str(error))
                for segment in unnamed:
                    segment.is_lost = True
                self._active = None
            else:
                for segment in unnamed:
                    segment.name_is_stable = True
        metrics.JOURNAL_SYNC_S.observe(trio.current_time() - begun)

    @property
    def has_lost_segments(self) -> bool:
        return any(segment.is_lost for segment in self._segments)

    # --- reading --------------------------------------------------------------------------

    async def read(self, at: int, length: int) -> bytes:
        """File bytes at log position *at*, as they were written.

        The caller keeps the position from being trimmed (``pinned``).
        Raises: Corrupt: the disk no longer returns them.
        """
        segment = self._segment_of(at)
        start = at - segment.first
        try:
            data = await segment.file.read(start, start + length)
        except OSError as error:
            raise Corrupt(f"{segment_name(segment.first)}: {error}") from error
        if len(data) != length:
            raise Corrupt(f"{segment_name(segment.first)} is shorter than what was written")
        return data

    async def read_verified(self, at: int, length: int) -> bytes:
        """As ``read``, and the checksum of the record around them has been verified."""
        segment = self._segment_of(at)
        lsn = segment.write_lsns[bisect_right(segment.write_lsns, at) - 1]
        head = await self.read(lsn, at + length - lsn)
        found = decode(memoryview(head), lsn)
        if isinstance(found, Incomplete):
            assert found.bytes_needed <= RECORD_BYTES_MAX
            head = await self.read(lsn, found.bytes_needed)
            found = decode(memoryview(head), lsn)
        if isinstance(found, Bad | Incomplete):
            raise Corrupt(
                f"write-behind log damaged in {segment_name(segment.first)} at offset "
                f"{lsn - segment.first}: {found.reason if isinstance(found, Bad) else 'cut off'}")
        return head[at - lsn : at - lsn + length]

    def _segment_of(self, at: int) -> _Segment:
        index = bisect_right(self._segments, at, key=lambda segment: segment.first) - 1
        if index < 0:
            raise Trimmed(f"position {at} of the write-behind log was trimmed")
        return self._segments[index]

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """While inside, nothing that is in the log now is removed."""
        floor = self._segments[0].first if self._segments else self._end
        self._pins[floor] += 1
        try:
            yield
        finally:
            self._pins[floor] -= 1
            if not self._pins[floor]:
                del self._pins[floor]

    # --- removal --------------------------------------------------------------------------

    async def trim(self, needed: Lsn) -> None:
        """Remove segments that lie wholly below *needed*, oldest first, never the last one.

        The last one keeps positions from being used again.  The records that make the others
        unnecessary are made stable first; each removal is made stable before the next, so that
        a crash never leaves a gap.  Raises: JournalUnavailable.
        """
        async with self._trimming:
            while len(self._segments) > 1:
                oldest = self._segments[0]
                if oldest.end > min([needed, *self._pins]):
                    return
                try:
                    await self._sync_others()
                    await self._disk.remove(segment_name(oldest.first))
                    del self._segments[0]
                    oldest.file.close()
                    await self._disk.sync_directory()
                except OSError as error:
                    raise JournalUnavailable("write-behind log, trim", error) from error

    async def empty(self, is_unneeded: Callable[[], bool]) -> bool:
        """Forget all segments that exist now; True if that was possible.

        For a log that cannot record that it is not needed.  Newest first, because what a crash
        in between leaves must be a beginning of the log.  What the disk refuses to remove is
        forgotten nevertheless, and removed before the log is used again: should the machine
        restart before that, the old records come back.
        """
        async with self._trimming:
            if self._active is not None or self._pins or self._is_writing or not is_unneeded():
                return False
            while self._segments:
                newest = self._segments.pop()
                newest.file.close()
                self._leftover.append(segment_name(newest.first))
            try:
                await self._remove_leftover()
            except OSError as error:
                _log.error("cannot remove the write-behind log", error=str(error))
            return True

    async def _remove_leftover(self) -> None:
        while self._leftover:
            await self._disk.remove(self._leftover[0])
            await self._disk.sync_directory()
            del self._leftover[0]

    async def _sync_others(self) -> None:
        try:
            await self.sync()
        except JournalUnavailable:
            # Lost segments are what the trim is to remove; the others have been synced.
            return

    def close(self) -> None:
        for segment in self._segments:
            segment.file.close()
        self._segments.clear()
        self._active = None
