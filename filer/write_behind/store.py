"""The log and the dirty state together: a record is appended, then applied; never one alone.

Owns the order of changes to one inode (a lock each), reading dirty bytes back, and what happens
to the state when the log refuses.  Does not own flushing nor what clients are told.

**Unretired inodes.**  When the log refuses the Flushed of an inode, the core filer has the bytes
but a recovery would flush them, or what of them was stable, again.  That is harmless until the
core filer's file gets newer bytes by another way than a stable log; until then nobody may write
it through, nor be told that it is flushed.  It is retired by a later Base or Discarded in the
log, or when the log has been emptied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import trio

from filer.core_filer.base import CoreVersion
from filer.disk import Disk
from filer.errors import TryAgain
from filer.ids import Epoch, InodeId, Lsn
from filer.journal.log import JournalUnavailable, Log
from filer.journal.record import (
    Base,
    Discarded,
    FlushBegun,
    Flushed,
    Logged,
    Probe,
    Rebased,
    Record,
)
from filer.write_behind.dirty import (
    DirtyFile,
    DirtyFiles,
    FileIdentity,
    FlushPlan,
)
from filer.write_behind.extents import Extent

_ROLL_BYTES_MIN = 16 << 20
"""A segment of this size is ended early when nothing in it is needed any more."""


class DirtyStore:
    """Use ``open``.  ``on_failure`` is told of every refusal of the log."""

    def __init__(self, log: Log, files: DirtyFiles, epoch: Epoch) -> None:
        self.log = log
        self.files = files
        self.on_failure: Callable[[JournalUnavailable], None] = lambda error: None
        self._epoch = epoch
        self._turns: dict[InodeId, Turn] = {}
        self._unretired: dict[InodeId, Lsn] = {}

    @classmethod
    async def open(
        cls, disk: Disk, *, node: str, epoch: Epoch, segment_bytes: int,
        wall_clock_ns: Callable[[], int],
    ) -> DirtyStore:
        """Replay the log on *disk*.  Raises: Corrupt, Fenced, OSError."""
        files = DirtyFiles()
        log = await Log.open(
            disk, node=node, epoch=epoch, segment_bytes=segment_bytes,
            wall_clock_ns=wall_clock_ns, replay=files.apply)
        files.replayed()
        return cls(log, files, epoch)

    def turn(self, inode: InodeId) -> Turn:
        """To change *inode*: log order is then also the order of effects."""
        turn = self._turns.get(inode)
        if turn is None:
            turn = self._turns[inode] = Turn(self, inode)
        return turn

    # --- changing -------------------------------------------------------------------------

    async def record(self, records: list[Record]) -> Logged:
        """Append and apply; the last one is returned.  The caller has the inode's turn.

        Raises: JournalUnavailable: nothing was changed.
        """
        try:
            logged = await self.log.append(records)
        except JournalUnavailable as error:
            self.on_failure(error)
            raise
        for each in logged:
            self.files.apply(each)
            if self._unretired and isinstance(each.record, Base | Discarded):
                self._unretired.pop(each.record.inode, None)
        return logged[-1]

    async def begin_flush(self, file: DirtyFile) -> tuple[FlushPlan, bool]:
        """What there is to flush, and whether the log knows that a flush has begun.

        If it does not, a crash now makes the guard take our own writes for somebody else's and
        keep both: too careful, nothing is lost.
        """
        record = FlushBegun(
            file.inode, file.base.handle, file.base.version, file.base.data_version, file.size,
            file.clean_limit, file.atime_ns, file.mtime_ns)
        is_logged = True
        try:
            await self.record([record])
        except JournalUnavailable:
            is_logged = False
            self.files.apply(self._unlogged(record))
        return file.snapshot(), is_logged

    async def end_flush(self, file: DirtyFile, version: CoreVersion, *, is_logged: bool) -> bool:
        """The flush has succeeded; False if the file must stay dirty as it was before.

        That is so where it was changed meanwhile and the log cannot tell what is left.
        """
        begun = file.flush_begun
        assert begun is not None
        flushed = Flushed(file.inode, begun, version, file.base.data_version)
        if file.since is None:
            await self._record_end(file, flushed if is_logged else Discarded(file.inode))
        elif is_logged:
            try:
                await self.record([flushed])
            except JournalUnavailable:
                return False
        else:
            return False
        self.turn(file.inode).replaced(replace(file.base, version=version))
        return True

    async def discard(self, file: DirtyFile) -> None:
        """Nothing of *file* is dirty any more; what is clean is not what it was."""
        await self._record_end(file, Discarded(file.inode))
        self.turn(file.inode).replaced(None)

    async def _record_end(self, file: DirtyFile, record: Flushed | Discarded) -> None:
        """*file* is clean now.  A refusal of the log only leaves it unretired."""
        try:
            await self.record([record])
        except JournalUnavailable:
            self._unretired[file.inode] = file.needed_from
            self.files.apply(self._unlogged(record))

    def _unlogged(self, record: Record) -> Logged:
        end = self.log.end
        return Logged(record, end, end, 0, self._epoch, 0, end)

    async def rebase(self, inode: InodeId, version: CoreVersion) -> None:
        """Note *version* as the new base.  A log that refuses costs only the guard's precision."""
        try:
            await self.record([Rebased(inode, version)])
        except JournalUnavailable:
            return

    async def is_out_of_reach(self, inode: InodeId | None) -> bool:
        """No recovery can bring older bytes of *inode* (``None``: of any) back.

        That is so when the end of its last flush is stable in the log, or the log is empty.
        """
        if self._unretired if inode is None else inode in self._unretired:
            return False
        try:
            await self.log.sync()
        except JournalUnavailable:
            return False
        return True

    async def retire(self) -> None:
        """Show that the log works again, and retire what it could not take before.

        Raises: JournalUnavailable: it does not, or a part that was lost is still needed.
        """
        await self.log.append([Probe()])
        await self.trim()
        for inode in list(self._unretired):
            with self.turn(inode) as turn:
                async with turn:
                    if inode in self._unretired:
                        await self.log.append([Discarded(inode)])
                        del self._unretired[inode]
        await self.log.sync()

    async def sync_if_possible(self) -> None:
        try:
            await self.log.sync()
        except JournalUnavailable as error:
            self.on_failure(error)

    # --- reading --------------------------------------------------------------------------

    async def read_dirty(self, inode: InodeId, start: int, end: int) -> list[tuple[int, bytes]]:
        """The dirty bytes of ``[start, end)`` at the moment of the call, in order."""
        file = self.files.get(inode)
        if file is None:
            return []
        extents = file.extents.overlapping(start, end)
        if not extents:
            return []
        with self.log.pinned():
            return [(e.start, await self.log.read(e.at, e.end - e.start)) for e in extents]

    async def read_verified(self, extent: Extent) -> bytes:
        """Raises: Corrupt; Trimmed if the extent was discarded."""
        with self.log.pinned():
            return await self.log.read_verified(extent.at, extent.end - extent.start)

    # --- removal --------------------------------------------------------------------------

    async def trim(self) -> None:
        """Remove the part of the log that no recovery needs.  Raises: JournalUnavailable."""
        needed = self.files.needed_from
        if needed is None and (self._unretired or self.log.has_lost_segments):
            await self._empty()
            return
        if needed is None:
            needed = self.log.end
            if self.log.active_byte_count >= _ROLL_BYTES_MIN:
                self.log.roll()
                await self.log.append([Probe()])
                needed = self.files.needed_from or self.log.end
        await self.log.trim(min([needed, *self._unretired.values()]))

    async def _empty(self) -> None:
        """Nothing is dirty, but the log could not be told: remove all of it."""
        before = dict(self._unretired)
        if await self.log.empty(lambda: self.files.needed_from is None):
            for inode, lsn in before.items():
                if self._unretired.get(inode) == lsn:
                    del self._unretired[inode]


class Turn:
    """Changes to one inode, one after the other.  Exists while anybody is interested in it.

    ``with store.turn(inode) as turn`` before the first yield point, ``async with turn`` around
    the change.  What happened in between is then known: an identity that the caller brought may
    be of a version that a flush has replaced meanwhile.
    """

    __slots__ = ("_inode", "_lock", "_store", "_users", "latest", "version_count")

    def __init__(self, store: DirtyStore, inode: InodeId) -> None:
        self._store = store
        self._inode = inode
        self._lock = trio.Lock()
        self._users = 0
        self.version_count = 0
        """Clean versions that came up since this turn exists."""
        self.latest: FileIdentity | None = None
        """The last of them; ``None``: somebody else's, of which we know nothing."""

    def __enter__(self) -> Turn:
        self._users += 1
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._users -= 1
        if not self._users:
            del self._store._turns[self._inode]

    async def __aenter__(self) -> None:
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()

    async def __aexit__(self, *exc_info: object) -> None:
        self._lock.release()

    def replaced(self, latest: FileIdentity | None) -> None:
        self.version_count += 1
        self.latest = latest

    def identity(self, known: FileIdentity, version_count: int) -> FileIdentity:
        """The clean state now; *known* was it when *version_count* was read.

        Raises: TryAgain: the caller must look at the file anew.
        """
        if self.version_count == version_count:
            return known
        if self.latest is None:
            raise TryAgain(f"inode {self._inode} was replaced meanwhile")
        return self.latest
