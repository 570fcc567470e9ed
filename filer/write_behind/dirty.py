"""What is dirty: the state that the records of the log add up to.  Pure.

Owns the meaning of records.  ``DirtyFiles.apply`` is the only way to change the state, for a
record just appended and for one replayed after a restart alike, so both always agree.

One file's bytes, as its clients see them, are layered:

    extents      bytes in the log; newest wins
    zeros        elsewhere at and beyond ``clean_limit``, up to ``size``
    clean bytes  elsewhere below ``clean_limit``: what the core filer has in version ``base``

A flush writes what was dirty when its FlushBegun was logged; what is changed afterwards stays
dirty, on top of the version that the flush produced.

The position from which the log is needed is kept per segment: for each dirty file, the segment
of the first record that a recovery needs for it.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from filer.core_filer.base import CoreVersion, Handle
from filer.errors import Corrupt
from filer.ids import DataVersion, InodeId, Lsn
from filer.journal.record import (
    Base,
    Discarded,
    FlushBegun,
    Flushed,
    Logged,
    Probe,
    Rebased,
    SegmentStart,
    Size,
    Times,
    Write,
)
from filer.write_behind.extents import Extent, ExtentMap

_NO_LSN = Lsn(0)


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """The clean state that a first write starts from; ``version.size`` is the core's size."""

    inode: InodeId
    handle: Handle
    version: CoreVersion
    data_version: DataVersion


@dataclass(slots=True)
class _Since:
    """What has happened since the flush in progress began."""

    dirtied_at_ns: int
    first_lsn: Lsn
    clean_limit: int | None = None
    """The smallest size truncated to."""
    oldest_dirty_at: float | None = None


@dataclass(slots=True, eq=False)
class DirtyFile:
    """One inode with changes that the core filer does not have.  Treat as read-only."""

    base: FileIdentity
    """The clean state below the changes."""
    size: int
    """As clients see it."""
    clean_limit: int
    mtime_ns: int
    """As told to clients."""
    needed_from: Lsn
    """The first record that a recovery needs for this file."""
    atime_ns: int | None = None
    """As told to clients; ``None``: not changed."""
    extents: ExtentMap = field(default_factory=ExtentMap)
    oldest_dirty_at: float = float("-inf")
    """Of the oldest change, by the clock of the service, which notes it."""
    dirtied_at_ns: int | None = None
    """Wall clock of the oldest change; ``None``: nothing has changed."""
    first_lsn: Lsn = _NO_LSN
    """The oldest change …"""
    last_lsn: Lsn = _NO_LSN
    """… and the newest one."""
    flush_begun: Lsn | None = None
    """Where the last flush began, if it did not complete: the core filer may have part of it."""
    since: _Since | None = None
    is_whole: bool = True
    """False during a replay that began after this file's first records."""

    @property
    def inode(self) -> InodeId:
        return self.base.inode

    def note_time(self, now: float) -> None:
        """The first change, or the first one since a flush began, was made *now*."""
        if self.since is None:
            self.oldest_dirty_at = now
        elif self.since.oldest_dirty_at is None:
            self.since.oldest_dirty_at = now

    @property
    def dirty_bytes(self) -> int:
        return self.extents.byte_count

    def snapshot(self) -> FlushPlan:
        """What a flush that begins now has to do."""
        return FlushPlan(
            self.base, list(self.extents), self.size, self.clean_limit, self.atime_ns,
            self.mtime_ns)


@dataclass(frozen=True, slots=True)
class FlushPlan:
    """A file's dirty state at one moment."""

    base: FileIdentity
    extents: list[Extent]
    size: int
    clean_limit: int
    atime_ns: int | None
    mtime_ns: int

    @property
    def is_truncated(self) -> bool:
        """Whether clean bytes were cut off, even if the file grew again afterwards."""
        return self.clean_limit < self.base.version.size

    @property
    def dirty_bytes(self) -> int:
        return sum(extent.end - extent.start for extent in self.extents)


class Verdict(enum.Enum):
    PROCEED = "proceed"
    CONFLICT = "conflict"


def guard(file: DirtyFile, seen: CoreVersion | None) -> Verdict:
    """May a flush of *file* change the core filer's file, which is in version *seen* now?

    ``None`` is a file that is gone.  After an earlier flush that did not complete any version is
    taken for our own doing: between the two a change by somebody else is not noticed.
    """
    if seen is None:
        return Verdict.CONFLICT
    if file.flush_begun is not None or seen.same_data(file.base.version):
        return Verdict.PROCEED
    return Verdict.CONFLICT


class DirtyFiles:
    """All dirty files of a volume."""

    def __init__(self) -> None:
        self._files: dict[InodeId, DirtyFile] = {}
        self.byte_count = 0
        """Of all extents."""
        self.extent_count = 0
        self._needed: list[tuple[Lsn, InodeId]] = []  # a heap, entries may be outdated

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[DirtyFile]:
        return iter(self._files.values())

    def get(self, inode: InodeId) -> DirtyFile | None:
        return self._files.get(inode)

    @property
    def needed_from(self) -> Lsn | None:
        """Where a recovery has to begin; ``None``: nothing is needed."""
        heap = self._needed
        while heap:
            lsn, inode = heap[0]
            file = self._files.get(inode)
            if file is not None and file.needed_from == lsn:
                return lsn
            heapq.heappop(heap)
        return None

    def apply(self, logged: Logged) -> None:
        """The effect of one record."""
        match logged.record:
            case Write(inode, start, mtime_ns, data):
                self._write(self._changed(inode, logged), start, len(data), mtime_ns, logged)
            case Size(inode, size, mtime_ns):
                self._resize(self._changed(inode, logged), size, mtime_ns)
            case Times(inode, atime_ns, mtime_ns):
                changed = self._changed(inode, logged)
                changed.atime_ns = changed.atime_ns if atime_ns is None else atime_ns
                changed.mtime_ns = changed.mtime_ns if mtime_ns is None else mtime_ns
            case Base(inode, handle, version, data_version):
                self._remove(inode)
                base = FileIdentity(inode, handle, version, data_version)
                self._add(DirtyFile(
                    base, version.size, version.size, version.mtime_ns, logged.lsn))
            case FlushBegun() as record:
                self._flush_begun(record, logged)
            case Flushed(inode, up_to, version, data_version):
                self._flushed(inode, up_to, version, data_version)
            case Rebased(inode, version):
                if (file := self._files.get(inode)) is not None:
                    file.base = replace(file.base, version=version)
                    file.flush_begun = file.since = None
            case Discarded(inode):
                self._remove(inode)
            case SegmentStart() | Probe():
                pass

    def replayed(self) -> None:
        """All records have been applied after a restart.

        Raises: Corrupt: a needed record was missing.
        """
        for file in list(self._files.values()):
            if not file.is_whole:
                raise Corrupt(f"the write-behind log lacks the first records of inode {file.inode}")
            self.forget_if_unchanged(file)

    def forget_if_unchanged(self, file: DirtyFile) -> None:
        """A Base whose first change never reached the log means nothing."""
        if file.dirtied_at_ns is None:
            self._remove(file.inode)

    # --- effects --------------------------------------------------------------------------

    def _add(self, file: DirtyFile) -> None:
        self._files[file.inode] = file
        self._need(file)

    def _need(self, file: DirtyFile) -> None:
        if len(self._needed) > 2 * len(self._files) + 64:
            self._needed = [(each.needed_from, each.inode) for each in self]
            heapq.heapify(self._needed)
        else:
            heapq.heappush(self._needed, (file.needed_from, file.inode))

    def _remove(self, inode: InodeId) -> None:
        file = self._files.pop(inode, None)
        if file is not None:
            self.byte_count -= file.extents.byte_count
            self.extent_count -= file.extents.extent_count

    def _changed(self, inode: InodeId, logged: Logged) -> DirtyFile:
        file = self._files.get(inode)
        if file is None:
            # Only in a replay: the segment with the Base was trimmed, so a Flushed follows.
            unknown = FileIdentity(inode, Handle(b""), CoreVersion(0, 0, 0), DataVersion(0))
            file = DirtyFile(unknown, 0, 0, 0, logged.lsn, is_whole=False)
            self._add(file)
        if file.dirtied_at_ns is None:
            file.dirtied_at_ns = logged.written_at_ns
            file.first_lsn = logged.lsn
        if file.flush_begun is not None and file.since is None:
            file.since = _Since(logged.written_at_ns, logged.lsn)
        file.last_lsn = logged.lsn
        return file

    def _write(
        self, file: DirtyFile, start: int, length: int, mtime_ns: int, logged: Logged
    ) -> None:
        bytes_before, count_before = file.extents.byte_count, file.extents.extent_count
        file.extents.insert(start, start + length, logged.data_at)
        self.byte_count += file.extents.byte_count - bytes_before
        self.extent_count += file.extents.extent_count - count_before
        file.size = max(file.size, start + length)
        file.mtime_ns = mtime_ns

    def _resize(self, file: DirtyFile, size: int, mtime_ns: int) -> None:
        bytes_before, count_before = file.extents.byte_count, file.extents.extent_count
        file.extents.truncate(size)
        self.byte_count += file.extents.byte_count - bytes_before
        self.extent_count += file.extents.extent_count - count_before
        file.clean_limit = min(file.clean_limit, size)
        if file.since is not None:
            limit = file.since.clean_limit
            file.since.clean_limit = size if limit is None else min(limit, size)
        file.size = size
        file.mtime_ns = mtime_ns

    def _flush_begun(self, record: FlushBegun, logged: Logged) -> None:
        file = self._files.get(record.inode)
        if file is None or not file.is_whole:
            # Only in a replay, see _changed; the extents, if any, are flushed soon.
            self._remove(record.inode)
            base = FileIdentity(
                record.inode, record.handle, record.version, record.data_version)
            file = DirtyFile(
                base, record.size, record.clean_limit, record.mtime_ns, logged.lsn,
                record.atime_ns, dirtied_at_ns=logged.written_at_ns, first_lsn=logged.lsn,
                last_lsn=logged.lsn, is_whole=False)
            self._add(file)
        file.flush_begun = logged.lsn
        file.since = None

    def _flushed(
        self, inode: InodeId, up_to: Lsn, version: CoreVersion, data_version: DataVersion
    ) -> None:
        file = self._files.get(inode)
        if file is None or file.since is None:
            self._remove(inode)
            return
        assert file.flush_begun == up_to
        bytes_before, count_before = file.extents.byte_count, file.extents.extent_count
        file.extents.drop_older(up_to)
        self.byte_count += file.extents.byte_count - bytes_before
        self.extent_count += file.extents.extent_count - count_before
        since = file.since
        file.base = replace(file.base, version=version, data_version=data_version)
        file.clean_limit = (
            version.size if since.clean_limit is None else min(version.size, since.clean_limit))
        file.dirtied_at_ns, file.first_lsn = since.dirtied_at_ns, since.first_lsn
        if since.oldest_dirty_at is not None:
            file.oldest_dirty_at = since.oldest_dirty_at
        file.needed_from = up_to
        file.is_whole = True
        file.flush_begun = file.since = None
        self._need(file)
