"""Write-behind of one volume: what the VFS writes to, and the tasks that flush it.

Owns when a change is acknowledged, back-pressure, who waits for which flush, and what is done
while the local log is out of use.  Does not own the bytes of the log (``journal``), the meaning
of its records (``dirty``), nor what clean files look like (the observer).

What is durable where, when a call has returned:

    ============================  ===============================================
    write, set_size, set_times    in the log, written: survives kill -9 of us
    sync, policy *behind*         in the log, stable: survives a crash of the node
    sync, policy *through*        in the core filer, stable
    flush, drain                  in the core filer, stable
    all of them, log out of use   in the core filer, stable
    ============================  ===============================================

Clients are slowed down, never failed, while the core filer is slow or unreachable.  What the
core filer *refuses* (ENOSPC, EDQUOT, EACCES …) is remembered with the file: every write and sync
of it gets that errno until a flush succeeds; truncating and removing it remain possible.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import structlog
import trio

from filer.core_filer.base import CoreFiler, SetAttributes
from filer.disk import Disk
from filer.errors import Corrupt, FilerError, Refused, TryAgain
from filer.ids import Epoch, InodeId, Lsn, NodeId
from filer.journal.log import JournalUnavailable
from filer.journal.record import DATA_BYTES_MAX, Base, Record, Size, Times, Write
from filer.policies import Policy, WriteMode
from filer.settings import MIB, WriteBehindSettings
from filer.write_behind.dirty import DirtyFile, FileIdentity
from filer.write_behind.flusher import Flusher, FlushObserver
from filer.write_behind.schedule import Schedule
from filer.write_behind.store import DirtyStore, Turn

__all__ = [
    "DirtyFile", "FileIdentity", "FlushError", "FlushObserver", "FlushReport", "WriteBehind",
    "WriteBehindStatistics",
]

_log = structlog.get_logger(__name__)

_PRESSURE_HIGH, _PRESSURE_LOW = 0.6, 0.4
"""Of any limit: where flushing regardless of age begins and ends.  The rest absorbs bursts."""
_PROBE_S = 5.0
"""How often a log that is out of use is tried again."""
_FREE_BYTES_MIN = 64 * MIB
"""Below this a log that was full would soon be so again."""


@dataclass(frozen=True, slots=True)
class FlushReport:
    """What a flush did.  No errors: all that was written before it is in the core filer."""

    files: int
    bytes: int
    errors: Mapping[InodeId, int]
    """By file, the errno for which it is still dirty."""


@dataclass(frozen=True, slots=True)
class FlushError:
    inode: InodeId
    errno: int


@dataclass(frozen=True, slots=True)
class WriteBehindStatistics:
    dirty_bytes: int
    dirty_files: int
    dirty_records: int
    oldest_dirty_s: float | None
    flushed_bytes: int
    conflicts: int
    errors: Mapping[str, int]
    """By errno name, how many files the core filer refuses at the moment."""
    log_bytes: int
    degraded: str
    """Why the log is out of use; empty: it is not."""


@dataclass(slots=True, eq=False)
class _Change:
    """A change on its way into the log."""

    turn: Turn
    known: FileIdentity
    """The inode's clean state …"""
    version_count: int
    """… when this was the turn's count."""
    records: list[Record]

    def identity(self) -> FileIdentity:
        return self.turn.identity(self.known, self.version_count)


@dataclass(slots=True, eq=False)
class _Waiter:
    """Somebody who waits until what was dirty in one inode at *lsn* is flushed."""

    lsn: Lsn
    done: trio.Event = field(default_factory=trio.Event)
    error: FilerError | None = None


class WriteBehind:
    """Use ``open``, then keep ``run`` running: without it nothing is ever flushed."""

    def __init__(
        self, *, store: DirtyStore, disk: Disk, core: CoreFiler, settings: WriteBehindSettings,
        policy: Policy, node: NodeId, observer: FlushObserver, wall_clock_ns: Callable[[], int],
    ) -> None:
        self._store = store
        self._disk = disk
        self._core = core
        self._settings = settings
        self._policy = policy
        self._flusher = Flusher(
            core=core, store=store, observer=observer, node=node, wall_clock_ns=wall_clock_ns)
        self._schedule = Schedule(
            delay_s=policy.write_back_s if self._is_flushed else float("inf"),
            files_at_once=settings.flush_files_at_once)
        self._waiters: dict[InodeId, list[_Waiter]] = {}
        self._errors: dict[InodeId, int] = {}
        self._kick = trio.Event()
        self._wake_at: float | None = None
        self._change = trio.Event()
        self._trim = trio.Event()
        self._degraded = ""
        self._degraded_errno = errno.EIO
        self._is_pressed = False
        self._drainers = 0
        self._flushed_bytes = 0
        self._conflicts = 0
        self._log_bytes_max = 2 * settings.dirty_bytes_max + 2 * settings.segment_bytes
        store.on_failure = self._degrade

    @classmethod
    async def open(
        cls, *, disk: Disk, core: CoreFiler, settings: WriteBehindSettings, policy: Policy,
        epoch: Epoch, node: NodeId, observer: FlushObserver, wall_clock_ns: Callable[[], int],
    ) -> WriteBehind:
        """Replay the log on *disk*.

        Raises: Corrupt: damage within what was stable, nothing was changed; Fenced: the log has
        records of a later epoch; OSError.
        """
        store = await DirtyStore.open(
            disk, node=node, epoch=epoch, segment_bytes=settings.segment_bytes,
            wall_clock_ns=wall_clock_ns)
        service = cls(store=store, disk=disk, core=core, settings=settings, policy=policy,
                      node=node, observer=observer, wall_clock_ns=wall_clock_ns)
        now, wall_now_ns = trio.current_time(), wall_clock_ns()
        for file in store.files:
            assert file.dirtied_at_ns is not None
            file.oldest_dirty_at = now - max(0, wall_now_ns - file.dirtied_at_ns) / 1e9
            service._schedule.dirtied(file.inode, file.oldest_dirty_at)
            if service._is_flushed:
                # Not when due: the sooner the guard sees what the crash has left, the better.
                service._schedule.force(file.inode)
        return service

    # --- what is dirty --------------------------------------------------------------------

    def dirty(self, inode: InodeId) -> DirtyFile | None:
        """The state of a dirty file, to look at until the next yield point."""
        return self._store.files.get(inode)

    def dirty_inodes(self) -> list[InodeId]:
        return [file.inode for file in self._store.files]

    async def read_dirty(self, inode: InodeId, start: int, end: int) -> list[tuple[int, bytes]]:
        """The dirty bytes of ``[start, end)`` at the moment of the call, in order.

        Read them *before* the clean bytes below: a flush in between moves bytes to the core
        filer, never back.  Raises: Corrupt.
        """
        return await self._store.read_dirty(inode, start, end)

    # --- changes --------------------------------------------------------------------------

    async def write(
        self, file: FileIdentity, start: int, data: bytes | memoryview, mtime_ns: int
    ) -> None:
        """Returns when *data* is in the log; waits while too much is dirty.

        *file* is used only if the inode is clean.  Raises: Refused: what the core filer said to
        an earlier flush of this inode, or ENOSPC where nothing is ever flushed; TryAgain: the
        file was replaced meanwhile.
        """
        if not len(data):
            return
        inode = file.inode
        view = memoryview(data)
        records: list[Record] = [
            Write(inode, start + at, mtime_ns, view[at : at + DATA_BYTES_MAX])
            for at in range(0, len(data), DATA_BYTES_MAX)
        ]
        with self._store.turn(inode) as turn:
            change = _Change(turn, file, turn.version_count, records)
            while True:
                self._raise_refusal(inode)
                if not self._has_room(len(data)):
                    await self._wait_for_room()
                elif await self._record(change):
                    return
                else:
                    async with turn:
                        if self._may_pass_through(inode):
                            turn.replaced(await self._flusher.write_through(
                                change.identity(), start, data))
                            return

    async def set_size(self, file: FileIdentity, size: int, mtime_ns: int) -> None:
        """Truncate or extend; as ``write``, but allowed after a refusal (it may cure it)."""
        changes = SetAttributes(size=size, mtime_ns=mtime_ns)
        await self._set(file, Size(file.inode, size, mtime_ns), changes)

    async def set_times(
        self, file: FileIdentity, *, atime_ns: int | None = None, mtime_ns: int | None = None
    ) -> None:
        changes = SetAttributes(atime_ns=atime_ns, mtime_ns=mtime_ns)
        await self._set(file, Times(file.inode, atime_ns, mtime_ns), changes)

    async def _set(self, file: FileIdentity, record: Record, changes: SetAttributes) -> None:
        with self._store.turn(file.inode) as turn:
            change = _Change(turn, file, turn.version_count, [record])
            while not await self._record(change):
                async with turn:
                    if self._may_pass_through(file.inode):
                        turn.replaced(
                            await self._flusher.set_through(change.identity(), changes))
                        return

    async def discard(self, inode: InodeId) -> None:
        """The file is gone for good: forget what is dirty."""
        with self._store.turn(inode) as turn:
            async with turn:
                file = self._store.files.get(inode)
                if file is not None:
                    await self._store.discard(file)
        if file is not None:
            self._schedule.forget(inode)
            self._errors.pop(inode, None)
            self._wake_waiters(inode, None)
            self._changed()

    async def _record(self, change: _Change) -> bool:
        """Put a change into the log; False: it is out of use, and the inode may be clean now."""
        if not self._degraded:
            async with change.turn:
                if await self._append(change):
                    return True
        if not self._is_flushed:
            raise Refused(self._degraded_errno, "the write-behind log is out of use")
        await self._make_clean(change.known.inode)
        return False

    async def _append(self, change: _Change) -> bool:
        inode, records = change.known.inode, change.records
        file = self._store.files.get(inode)
        if file is None:
            base = change.identity()
            records = [
                Base(inode, base.handle, base.version, base.data_version), *records]
        try:
            await self._store.record(records)
        except JournalUnavailable:
            return False
        if file is None:
            self._dirtied(inode)
        elif file.since is not None:
            file.note_time(trio.current_time())
        return True

    def _dirtied(self, inode: InodeId) -> None:
        file = self._store.files.get(inode)
        assert file is not None
        now = trio.current_time()
        file.note_time(now)
        self._schedule.dirtied(inode, now)
        due_at = now + self._policy.write_back_s
        if self._is_urgent or self._wake_at is None or due_at < self._wake_at:
            self._kick.set()

    def _may_pass_through(self, inode: InodeId) -> bool:
        return bool(self._degraded) and self._store.files.get(inode) is None

    def _raise_refusal(self, inode: InodeId) -> None:
        if inode in self._errors:
            raise Refused(self._errors[inode], "the core filer refuses to take this file")

    # --- durability -----------------------------------------------------------------------

    async def sync(self, inode: InodeId | None = None) -> None:
        """COMMIT: what was written to *inode* (``None``: to any) survives; see the table above.

        Raises: Refused: what the core filer said.
        """
        if self._is_through or self._degraded:
            await self._make_clean(inode)
            return
        if inode is not None:
            self._raise_refusal(inode)
            file = self._store.files.get(inode)
            if file is None or file.last_lsn < self._store.log.stable_end:
                return
        try:
            await self._store.log.sync()
        except JournalUnavailable as error:
            self._degrade(error)
            await self._make_clean(inode)

    async def flush(
        self, inodes: Iterable[InodeId] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> FlushReport:
        """Everything dirty now in *inodes* (``None``: in all) gets into the core filer.

        Waits as long as it takes while the core filer is unreachable.  ``progress(done, total)``
        counts bytes.  Files that the core filer refuses are in the report, not raised.
        """
        wanted = self.dirty_inodes() if inodes is None else list(dict.fromkeys(inodes))
        files = [file for inode in wanted if (file := self._store.files.get(inode)) is not None]
        if not self._is_flushed:
            return FlushReport(0, 0, {file.inode: errno.EOPNOTSUPP for file in files})
        waiting = [(file.inode, file.dirty_bytes, self._wait_for(file)) for file in files]
        total = sum(byte_count for _, byte_count, _ in waiting)
        done_files = done_bytes = 0
        errors: dict[InodeId, int] = {}
        try:
            for inode, byte_count, waiter in waiting:
                await waiter.done.wait()
                if waiter.error is None:
                    done_files += 1
                    done_bytes += byte_count
                else:
                    error = waiter.error
                    errors[inode] = error.errno if isinstance(error, Refused) else errno.EIO
                if progress is not None:
                    progress(done_bytes, total)
        finally:
            for inode, _, waiter in waiting:
                self._stop_waiting(inode, waiter)
        if inodes is None:
            await self._wait_out_of_reach(None)
        for inode in wanted if inodes is not None else ():
            if inode not in errors:
                await self._wait_out_of_reach(inode)
        return FlushReport(done_files, done_bytes, errors)

    async def drain(self) -> FlushReport:
        """Flush until nothing is dirty, except what the core filer refuses to take."""
        self._drainers += 1
        try:
            files = bytes_ = 0
            while True:
                report = await self.flush()
                files, bytes_ = files + report.files, bytes_ + report.bytes
                if len(self._store.files) <= len(report.errors):
                    return FlushReport(files, bytes_, report.errors)
        finally:
            self._drainers -= 1

    async def _wait_out_of_reach(self, inode: InodeId | None) -> None:
        """A log out of use must not bring back what the core filer has newer."""
        while self._degraded:
            change = self._change
            if await self._store.is_out_of_reach(inode):
                return
            self._trim.set()
            await change.wait()

    async def _make_clean(self, inode: InodeId | None) -> None:
        report = await self.flush(None if inode is None else [inode])
        if report.errors and not self._is_flushed:
            raise Refused(self._degraded_errno, "the write-behind log is out of use")
        for error in report.errors.values():
            raise Refused(error, "the core filer refuses to take this file")

    def _wait_for(self, file: DirtyFile) -> _Waiter:
        waiter = _Waiter(file.last_lsn)
        self._waiters.setdefault(file.inode, []).append(waiter)
        self._schedule.force(file.inode)
        self._kick.set()
        return waiter

    def _stop_waiting(self, inode: InodeId, waiter: _Waiter) -> None:
        waiters = self._waiters.get(inode, [])
        if waiter in waiters:
            waiters.remove(waiter)
            if not waiters:
                del self._waiters[inode]

    def _wake_waiters(self, inode: InodeId, error: FilerError | None) -> None:
        """A flush of *inode* has ended: who has what he waits for?"""
        file = self._store.files.get(inode)
        for waiter in list(self._waiters.get(inode, ())):
            if file is not None and file.first_lsn <= waiter.lsn:
                if error is None or isinstance(error, TryAgain):
                    self._schedule.force(inode)
                    continue
                waiter.error = error
            waiter.done.set()
            self._stop_waiting(inode, waiter)

    # --- limits ---------------------------------------------------------------------------

    @property
    def _is_flushed(self) -> bool:
        return self._policy.write_mode is not WriteMode.NEVER_FLUSHED

    @property
    def _is_through(self) -> bool:
        return self._policy.write_mode is WriteMode.THROUGH

    def _fill(self, byte_count: int = 0) -> float:
        """How much of the tightest limit is used, with *byte_count* more."""
        files, settings = self._store.files, self._settings
        return max(
            (files.byte_count + byte_count) / max(1, settings.dirty_bytes_max),
            files.extent_count / settings.dirty_records_max,
            self._store.log.byte_count / max(1, self._log_bytes_max))

    def _has_room(self, byte_count: int) -> bool:
        fill = self._fill(byte_count)
        if fill > _PRESSURE_HIGH and not self._is_pressed:
            self._is_pressed = True
            self._kick.set()
        return fill <= 1.0 or not len(self._store.files)

    async def _wait_for_room(self) -> None:
        if not self._is_flushed:
            raise Refused(errno.ENOSPC, "the write-behind log is full, and is never flushed")
        self._kick.set()
        await self._change.wait()

    @property
    def _is_urgent(self) -> bool:
        if self._is_pressed and self._fill() < _PRESSURE_LOW:
            self._is_pressed = False
        return self._is_flushed and bool(self._is_pressed or self._degraded or self._drainers)

    def _changed(self) -> None:
        """Something was flushed, discarded, trimmed or cured: everybody looks again."""
        self._change.set()
        self._change = trio.Event()
        self._trim.set()
        self._kick.set()

    # --- tasks ----------------------------------------------------------------------------

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Flush what is due, for ever.  May be cancelled at any moment."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._trim_for_ever)
            nursery.start_soon(self._cure_for_ever)
            task_status.started()
            while True:
                self._kick = trio.Event()
                decision = self._schedule.next(
                    trio.current_time(), is_urgent=self._is_urgent,
                    is_reachable=self._core.state().reachable)
                self._wake_at = decision.wake_at
                for inode in decision.start:
                    nursery.start_soon(self._flush_one, inode)
                with trio.move_on_at(
                    float("inf") if decision.wake_at is None else decision.wake_at
                ):
                    await self._kick.wait()

    async def _flush_one(self, inode: InodeId) -> None:
        failure: FilerError | None = None
        try:
            outcome = await self._flusher.flush(inode)
            # A flush that a crash forgets is done again, over what others have written since.
            await self._store.sync_if_possible()
        except (Refused, Corrupt) as error:
            failure = error
            number = error.errno if isinstance(error, Refused) else errno.EIO
            if self._errors.get(inode) != number:
                _log.error("flush refused", inode=inode, error=str(error))
            self._errors[inode] = number
            self._schedule.failed(inode, trio.current_time())
        except TryAgain as error:
            failure = error
            _log.warning("flush interrupted", inode=inode, error=str(error))
            self._schedule.interrupted(inode, trio.current_time())
        else:
            self._errors.pop(inode, None)
            self._flushed_bytes += outcome.byte_count
            self._conflicts += bool(outcome.conflict_name)
            file = self._store.files.get(inode)
            self._schedule.finished(
                inode, trio.current_time(),
                dirty_since=None if file is None else file.oldest_dirty_at)
        if self._store.files.get(inode) is None:
            self._errors.pop(inode, None)
            self._schedule.forget(inode)
        self._wake_waiters(inode, failure)
        self._changed()

    async def _trim_for_ever(self) -> None:
        while True:
            await self._trim.wait()
            self._trim = trio.Event()
            before = self._store.log.byte_count
            try:
                await self._store.trim()
            except JournalUnavailable as error:
                self._degrade(error)
            if self._store.log.byte_count < before:
                self._changed()

    # --- a log out of use -----------------------------------------------------------------

    def _degrade(self, error: JournalUnavailable) -> None:
        if not self._degraded:
            self._degraded = str(error)
            self._degraded_errno = error.errno or errno.EIO
            _log.error("the write-behind log is out of use, writes go through to the core filer",
                       error=str(error))
            self._changed()

    async def _cure_for_ever(self) -> None:
        while True:
            while not self._degraded:
                await self._change.wait()
            await trio.sleep(_PROBE_S)
            try:
                if await self._disk.free_bytes() < min(
                    _FREE_BYTES_MIN, self._settings.segment_bytes
                ):
                    continue
                await self._store.retire()
            except (JournalUnavailable, OSError) as error:
                self._degraded = str(error)
                self._changed()
                continue
            _log.info("the write-behind log is in use again")
            self._degraded = ""
            self._changed()

    # --- reports --------------------------------------------------------------------------

    def flush_errors(self) -> list[FlushError]:
        """Files that the core filer refuses at the moment."""
        return [FlushError(inode, number) for inode, number in self._errors.items()]

    def statistics(self) -> WriteBehindStatistics:
        oldest_at = self._schedule.oldest_dirty_at()
        names = (errno.errorcode.get(number, str(number)) for number in self._errors.values())
        return WriteBehindStatistics(
            dirty_bytes=self._store.files.byte_count,
            dirty_files=len(self._store.files),
            dirty_records=self._store.files.extent_count,
            oldest_dirty_s=None if oldest_at is None else trio.current_time() - oldest_at,
            flushed_bytes=self._flushed_bytes,
            conflicts=self._conflicts,
            errors=dict(Counter(names)),
            log_bytes=self._store.log.byte_count,
            degraded=self._degraded,
        )

    async def close(self) -> None:
        """After ``run`` has ended.  What is dirty stays in the log, stable."""
        await self._store.sync_if_possible()
        self._store.log.close()
