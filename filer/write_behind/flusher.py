"""The flush of one file: from the log into the core filer, and never over somebody else's work.

Owns the order of steps below, the guard's consequences and conflict copies.  Does not own when
a file is flushed (``schedule.py``), nor retries and waiting clients (``service.py``).

    1  GETATTR            the guard: is the core filer's file in the version we know?
    2  log FlushBegun     and fsync: from here on a changed version may be our own doing
    3  SETATTR size       only if clean bytes had been cut off
    4  WRITE … COMMIT     several in flight; repeated from 4 if the verifier changed
    5  SETATTR size       only if the file ends in a hole
    6  SETATTR times      as clients were told
    7  log Flushed        not fsynced: losing it repeats 1–7, with the same outcome

Dirty bytes stay visible from the log until 7; then the core filer's new version becomes the
clean one in the same step.  What a crash after each step leaves stands in docs/write-behind.md.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import structlog
import trio

from filer import metrics
from filer.core_filer.base import Attributes, CoreFiler, Handle, SetAttributes
from filer.errors import Refused, TryAgain
from filer.ids import InodeId
from filer.journal.log import Trimmed
from filer.write_behind.dirty import DirtyFile, FileIdentity, FlushPlan, Verdict, guard
from filer.write_behind.extents import Piece, pieces
from filer.write_behind.store import DirtyStore, Turn

_log = structlog.get_logger(__name__)

_PIECE_BYTES_MAX = 1 << 20
_WRITES_PER_FILE = 8
_WRITES_AT_ONCE = 32
"""Bound the memory of all flushes together to as many pieces."""
_NAME_BYTES_MAX = 255
_GONE = (errno.ESTALE, errno.ENOENT)


class FlushObserver(Protocol):
    """Told what flushes do; the namespace implements it.

    The callbacks for one inode come one after the other.  They may read, but must not change
    anything dirty (they would wait for themselves).
    """

    def location(self, inode: InodeId) -> tuple[Handle, bytes] | None:
        """A directory's handle and a name of *inode* in it; ``None`` if it has none."""
        ...

    async def read_clean(self, inode: InodeId, start: int, end: int) -> bytes | None:
        """Cached clean bytes of the version the file was in before it became dirty.

        For conflict copies.  ``None`` if not cached: the core filer has other bytes by now.
        """
        ...

    async def truncated(self, inode: InodeId, size: int) -> None:
        """Clean bytes at and beyond *size* are void.  Before ``flushed_data`` and ``flushed``."""
        ...

    async def flushed_data(self, inode: InodeId, start: int, data: bytes | memoryview) -> None:
        """The core filer has accepted these bytes; they stay dirty until ``flushed``.

        A cache must adopt them or drop what it has there, also what it is fetching right now.
        Bytes may come that are never followed by ``flushed`` (the flush failed and the file was
        discarded, or is in conflict).
        """
        ...

    def flushed(self, inode: InodeId, attributes: Attributes) -> None:
        """What was dirty when the flush began is clean now, in the version of *attributes*."""
        ...

    def written_through(self, inode: InodeId, attributes: Attributes) -> None:
        """While the log was out of use the core filer's file was changed by us directly.

        Its version is the one of *attributes* now; all clean bytes cached before are void.
        """
        ...

    def conflict(self, inode: InodeId, name: bytes, attributes: Attributes | None) -> None:
        """*inode* was changed behind us; our bytes are now under *name* in the same directory.

        *attributes* is the version in the core filer to adopt, ``None`` if the file is gone
        there.  Nothing of the inode is dirty any more; all its clean bytes are void.
        """
        ...


@dataclass(frozen=True, slots=True)
class FlushOutcome:
    byte_count: int
    conflict_name: bytes | None = None


class Flusher:
    def __init__(
        self, *, core: CoreFiler, store: DirtyStore, observer: FlushObserver, node: str,
        wall_clock_ns: Callable[[], int],
    ) -> None:
        self._core = core
        self._store = store
        self._observer = observer
        self._node = node
        self._wall_clock_ns = wall_clock_ns
        self._writes = trio.Semaphore(_WRITES_AT_ONCE)

    async def flush(self, inode: InodeId) -> FlushOutcome:
        """Make what is dirty now stable in the core filer, or keep it as a conflict copy.

        At most one at a time for one inode.  Raises: Refused: the core filer said no, the file
        stays dirty; Corrupt: the log has lost its bytes; TryAgain: the core filer was not asked.
        """
        file = self._store.files.get(inode)
        if file is None:
            return FlushOutcome(0)
        with self._store.turn(inode) as turn:
            return await self._flush(file, turn)

    async def _flush(self, file: DirtyFile, turn: Turn) -> FlushOutcome:
        inode = file.inode
        seen = await self._look(file.base.handle)
        async with turn:
            if self._store.files.get(inode) is not file:
                return FlushOutcome(0)
            if guard(file, None if seen is None else seen.version) is Verdict.CONFLICT:
                return await self._keep_both(file, seen)
            assert seen is not None
            plan, is_logged = await self._store.begin_flush(file)
        await self._store.sync_if_possible()
        try:
            final = await self._transfer(plan, seen)
        except Trimmed:
            assert self._store.files.get(inode) is not file
            return FlushOutcome(0)
        except Refused as error:
            if error.errno in _GONE and await self._look(file.base.handle) is None:
                return await self._vanished(file, turn)
            await self._rebase(file, turn)
            raise
        async with turn:
            if self._store.files.get(inode) is not file:
                return FlushOutcome(0)  # discarded meanwhile
            if not await self._store.end_flush(file, final.version, is_logged=is_logged):
                raise TryAgain("the write-behind log did not take the end of a flush")
            self._observer.flushed(inode, final)
        byte_count = plan.dirty_bytes
        metrics.FLUSHED_BYTES.inc(byte_count)
        return FlushOutcome(byte_count)

    async def _look(self, handle: Handle) -> Attributes | None:
        try:
            return await self._core.getattr(handle)
        except Refused as error:
            if error.errno in _GONE:
                return None
            raise

    async def _vanished(self, file: DirtyFile, turn: Turn) -> FlushOutcome:
        """The file was removed in the core filer while it was flushed."""
        async with turn:
            if self._store.files.get(file.inode) is not file:
                return FlushOutcome(0)
            return await self._keep_both(file, None)

    async def _rebase(self, file: DirtyFile, turn: Turn) -> None:
        """A flush failed part way: learn the version it left, so that the guard works again.

        COMMIT first: a restart of the core filer could bring an older version back.
        """
        try:
            await self._core.commit(file.base.handle)
            seen = await self._core.getattr(file.base.handle)
        except Refused:
            return
        async with turn:
            if self._store.files.get(file.inode) is file:
                await self._store.rebase(file.inode, seen.version)

    # --- transfer -------------------------------------------------------------------------

    async def _transfer(self, plan: FlushPlan, seen: Attributes) -> Attributes:
        size = seen.size
        if size > plan.clean_limit:
            await self._core.setattr(plan.base.handle, SetAttributes(size=plan.clean_limit))
            size = plan.clean_limit
        if plan.is_truncated:
            await self._observer.truncated(plan.base.inode, plan.clean_limit)
        if plan.extents:
            await self._write_all(plan)
            size = max(size, plan.extents[-1].end)
        if size < plan.size:
            await self._core.setattr(plan.base.handle, SetAttributes(size=plan.size))
        final = await self._set_times(plan.base.handle, plan)
        if final.size != plan.size:
            _log.warning("a file changed in the core filer while it was flushed",
                         inode=plan.base.inode, expected_size=plan.size, size=final.size)
        return final

    async def _set_times(self, handle: Handle, plan: FlushPlan) -> Attributes:
        times = SetAttributes(atime_ns=plan.atime_ns, mtime_ns=plan.mtime_ns)
        try:
            return await self._core.setattr(handle, times)
        except Refused as error:
            # The bytes are there; a core filer that lets us set no times keeps its own.
            if error.errno not in (errno.EPERM, errno.EACCES):
                raise
        return await self._core.getattr(handle)

    async def _write_all(self, plan: FlushPlan) -> None:
        """All extents, on stable storage of the core filer when this returns."""
        todo = pieces(plan.extents, min(_PIECE_BYTES_MAX, self._core.io_bytes_max))
        if len(todo) == 1:
            # One round trip instead of two: most small files.
            await self._write_piece(plan, todo[0], stable=True)
            return
        while True:
            verifiers = await self._write_pieces(plan, todo)
            commit = await self._core.commit(plan.base.handle)
            if verifiers == {commit.verifier}:
                return
            _log.warning("the core filer may have lost unstable data, writing it again",
                         inode=plan.base.inode)

    async def _write_pieces(self, plan: FlushPlan, todo: list[Piece]) -> set[bytes]:
        verifiers: set[bytes] = set()
        errors: list[Exception] = []
        rest = iter(todo)

        async def worker() -> None:
            for piece in rest:
                if errors:
                    return
                try:
                    verifiers.update(await self._write_piece(plan, piece, stable=False))
                except Exception as error:  # re-raised below, without a group around it
                    errors.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(min(_WRITES_PER_FILE, len(todo))):
                nursery.start_soon(worker)
        if errors:
            raise errors[0]
        return verifiers

    async def _write_piece(self, plan: FlushPlan, piece: Piece, *, stable: bool) -> set[bytes]:
        verifiers = set()
        async with self._writes:
            parts = [await self._store.read_verified(extent) for extent in piece.extents]
            data = parts[0] if len(parts) == 1 else b"".join(parts)
            assert len(data) == piece.end - piece.start
            done = 0
            while done < len(data):
                result = await self._core.write(
                    plan.base.handle, piece.start + done, memoryview(data)[done:], stable=stable)
                verifiers.add(result.verifier)
                done += result.count
            await self._observer.flushed_data(plan.base.inode, piece.start, data)
        return verifiers

    # --- while the log is out of use ------------------------------------------------------

    async def write_through(
        self, file: FileIdentity, start: int, data: bytes | memoryview
    ) -> FileIdentity:
        """Straight into the core filer's stable storage.  The caller has the inode's turn."""
        await self._write_stable(file.handle, start, data)
        return await self._wrote_through(file, None)

    async def set_through(self, file: FileIdentity, changes: SetAttributes) -> FileIdentity:
        """The same for size and times."""
        return await self._wrote_through(file, changes)

    async def _wrote_through(
        self, file: FileIdentity, changes: SetAttributes | None
    ) -> FileIdentity:
        if changes is None:
            attributes = await self._core.getattr(file.handle)
        else:
            attributes = await self._core.setattr(file.handle, changes)
        self._observer.written_through(file.inode, attributes)
        return replace(file, version=attributes.version)

    # --- conflicts ------------------------------------------------------------------------

    async def _keep_both(self, file: DirtyFile, seen: Attributes | None) -> FlushOutcome:
        """Leave the core filer's file as it is and write ours beside it.

        The copy is complete if the clean part of our version is in the cache; else it has all
        dirty bytes, and holes where clean ones are missing (the log entry says so).  The inode
        is locked meanwhile, so nothing is dirty afterwards.  A crash before the record at the
        end makes a second copy, under another name.
        """
        location = self._observer.location(file.inode)
        if location is None:
            if seen is not None:
                raise Refused(errno.ESTALE, "changed in the core filer, and it has no name here")
            # Unlinked here and there: nobody can reach it by name any more.
            await self._store.discard(file)
            self._observer.conflict(file.inode, b"", None)
            return FlushOutcome(0)
        directory, name = location
        plan = file.snapshot()
        copy, copy_name = await self._create_copy(directory, name, seen)
        is_complete = await self._write_copy(file, copy)
        await self._core.setattr(copy, SetAttributes(size=plan.size))
        await self._set_times(copy, plan)
        await self._core.commit(copy)
        await self._store.discard(file)
        self._observer.conflict(file.inode, copy_name, seen)
        metrics.CONFLICTS.inc()
        _log.warning(
            "a file was changed in the core filer behind us: kept both", inode=file.inode,
            copy=copy_name.decode(errors="backslashreplace"), is_complete=is_complete,
            is_gone=seen is None)
        return FlushOutcome(plan.dirty_bytes, copy_name)

    async def _create_copy(
        self, directory: Handle, name: bytes, seen: Attributes | None
    ) -> tuple[Handle, bytes]:
        when = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self._wall_clock_ns() // 10**9))
        mode, uid, gid = (0o644, 0, 0) if seen is None else (seen.mode & 0o777, seen.uid, seen.gid)
        number = 1
        while True:
            suffix = f".conflict-{self._node}-{when}{'' if number == 1 else f'-{number}'}".encode()
            copy_name = name[: _NAME_BYTES_MAX - len(suffix)] + suffix
            try:
                found = await self._core.create(
                    directory, copy_name, mode=mode, uid=uid, gid=gid)
            except Refused as error:
                if error.errno != errno.EEXIST:
                    raise
                number += 1
            else:
                return found.handle, copy_name

    async def _write_copy(self, file: DirtyFile, copy: Handle) -> bool:
        """Our view of *file*, window by window; False if clean bytes were missing."""
        is_complete = True
        window = min(_PIECE_BYTES_MAX, self._core.io_bytes_max)
        for start in range(0, file.size, window):
            end = min(start + window, file.size)
            clean_end = min(end, file.clean_limit)
            extents = file.extents.overlapping(start, end)
            dirty = [(e.start, await self._store.read_verified(e)) for e in extents]
            clean: bytes | None = b""
            if start < clean_end and sum(len(data) for _, data in dirty) < end - start:
                clean = await self._observer.read_clean(file.inode, start, clean_end)
            if clean is None:
                is_complete = False
                for at, data in dirty:
                    await self._write_stable(copy, at, data)
            elif clean or dirty:
                view = bytearray(end - start)
                view[: len(clean)] = clean
                for at, data in dirty:
                    view[at - start : at - start + len(data)] = data
                await self._write_stable(copy, start, bytes(view))
        return is_complete

    async def _write_stable(
        self, handle: Handle, start: int, data: bytes | memoryview
    ) -> None:
        done = 0
        while done < len(data):
            result = await self._core.write(
                handle, start + done, memoryview(data)[done:], stable=True)
            done += result.count
