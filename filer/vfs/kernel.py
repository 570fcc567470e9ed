"""Telling the kernel that what it cached is no longer true.

Owns the notifications and the discipline that makes them reliable; does not own the state they
are about.  The rule for callers: first make the new state visible to the handlers, then call.

- *Attributes*: one system call that never waits, made at once.  The kernel then asks for
  attributes again, and drops pages whose mtime changed.
- *Listings*: another that never waits.
- *Data* and *names*: the kernel takes a page's or a directory's lock, which a request in progress
  may hold (a READ; a LOOKUP, CREATE, UNLINK, RENAME, READDIRPLUS) — a request that only we can
  answer.  So these are made in threads, in order for each directory, never on the event loop.
  A handler must not await them either: it may hold that very lock.

*No such inode* is an answer to mistrust: the reply that gives the kernel the inode may be written
but not yet processed, and would install what was true before.  As long as our count says that the
kernel holds the inode, or is about to, the notification is repeated.

After a takeover the counts are not complete: an earlier server's last replies may still be on
their way.  For the first seconds, "no such inode" is then taken for final only after several
attempts; longer than that no process waits for a CPU.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import structlog
import trio

from filer.ids import InodeId
from filer.metrics import INVALIDATIONS
from filer.vfs.lookup_counts import LookupCounts
from filer.vfs.shim import pyfuse3

_RETRY_FIRST_S = 0.0005
_RETRY_MAX_S = 0.1
_UNKNOWN_ATTEMPTS_MAX = 8  # 0.13 s in all
_UNKNOWN_FOR_S = 10.0

_THREADS_MAX = 32
"""Directories and files that wait for a kernel lock at the same time; others queue behind."""

# The connection is gone, or not there yet: then nothing of it is cached.
_NOT_CONNECTED = frozenset({errno.ENOTCONN, errno.ENODEV, errno.EINVAL})

_ATTRIBUTES = INVALIDATIONS.labels("attributes")
_DATA = INVALIDATIONS.labels("data")
_NAMES = INVALIDATIONS.labels("name")

log = structlog.get_logger(__name__)


class KernelCaches(Protocol):
    """What the rest of the filer needs; ``wait_…`` return when the kernel has let go.

    None may be called from a thread, and no ``wait_…`` from a handler.
    """

    def attributes_changed(self, inode: InodeId) -> None:
        """Attributes of *inode* changed; with its mtime, also data or listing.  Never blocks."""
        ...

    def listing_changed(self, directory: InodeId) -> None:
        """Drop the listing that the kernel may have cached.  Never blocks.

        The kernel compares the mtime only when a listing is read from its start.  An NFS server
        opens the directory for every reply and continues in the middle: it would be given names
        that are gone, and answer NOENT to the client that has just removed them.
        """
        ...

    def data_changed(self, inode: InodeId) -> None:
        """Drop *inode*'s pages whatever its mtime says."""
        ...

    def name_changed(self, directory: InodeId, name: bytes) -> None:
        """*name* appeared, vanished or means another inode now.

        Includes ``attributes_changed(directory)``, which must come after the name is dropped: an
        NFS server that saw the new mtime first would cache the old name under it.
        """
        ...

    async def wait_attributes_changed(self, inode: InodeId) -> None: ...

    async def wait_data_changed(self, inode: InodeId) -> None: ...

    async def wait_name_changed(self, directory: InodeId, name: bytes) -> None: ...


class RecordingKernelCaches:
    """For tests without a kernel: remembers what was said, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def attributes_changed(self, inode: InodeId) -> None:
        self.calls.append(("attributes", inode))

    def listing_changed(self, directory: InodeId) -> None:
        self.calls.append(("listing", directory))

    def data_changed(self, inode: InodeId) -> None:
        self.calls.append(("data", inode))

    def name_changed(self, directory: InodeId, name: bytes) -> None:
        self.calls.append(("name", directory, name))

    async def wait_attributes_changed(self, inode: InodeId) -> None:
        self.attributes_changed(inode)
        await trio.lowlevel.checkpoint()

    async def wait_data_changed(self, inode: InodeId) -> None:
        self.data_changed(inode)
        await trio.lowlevel.checkpoint()

    async def wait_name_changed(self, directory: InodeId, name: bytes) -> None:
        self.name_changed(directory, name)
        await trio.lowlevel.checkpoint()


class _Queue:
    """What is to be dropped under one kernel lock, in the order it changed."""

    def __init__(self) -> None:
        self.names: dict[bytes, None] = {}
        self.submitted = 0
        self.completed = 0
        self.progress = trio.Event()


class FuseKernelCaches:
    """The kernel behind the session of this process (``filer/vfs/session.py``)."""

    def __init__(self, counts: LookupCounts) -> None:
        self._counts = counts
        self._nursery: trio.Nursery | None = None
        self._early: list[Callable[[], None]] = []
        self._unknown_until_s = float("-inf")
        self._retrying: set[InodeId] = set()
        self._names: dict[InodeId, _Queue] = {}
        self._data: dict[InodeId, _Queue] = {}
        self._threads = trio.CapacityLimiter(_THREADS_MAX)

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until cancelled.  Start it when the session runs; earlier changes wait for it.

        Cancelling abandons threads that wait for a kernel lock; they end with the requests that
        hold those, at the latest when another server has answered them.
        """
        async with trio.open_nursery() as self._nursery:
            if not self._counts.is_complete:
                self._unknown_until_s = trio.current_time() + _UNKNOWN_FOR_S
            early, self._early = self._early, []
            for change in early:
                change()
            task_status.started()
            await trio.sleep_forever()

    # -- attributes ------------------------------------------------------------------------------

    def attributes_changed(self, inode: InodeId) -> None:
        if self._nursery is None:
            self._early.append(lambda: self.attributes_changed(inode))
        elif not self._expire_attributes(inode, attempt=1) and inode not in self._retrying:
            self._retrying.add(inode)
            self._nursery.start_soon(self._retry_attributes, inode)

    async def _retry_attributes(self, inode: InodeId) -> None:
        try:
            await self.wait_attributes_changed(inode)
        finally:
            self._retrying.discard(inode)

    async def wait_attributes_changed(self, inode: InodeId) -> None:
        delay_s, attempt = _RETRY_FIRST_S, 1
        while not self._expire_attributes(inode, attempt):
            await trio.sleep(delay_s)
            delay_s = min(2 * delay_s, _RETRY_MAX_S)
            attempt += 1

    def _expire_attributes(self, inode: InodeId, attempt: int) -> bool:
        """True when the kernel has dropped them, or certainly has none."""
        _ATTRIBUTES.inc()
        try:
            pyfuse3.invalidate_inode(inode, True)
        except FileNotFoundError:
            if self._counts.count(inode) > 0:
                return False
            return attempt >= _UNKNOWN_ATTEMPTS_MAX or (
                trio.current_time() >= self._unknown_until_s
            )
        except OSError as error:
            _check_connection(error)
        return True

    # -- data and names --------------------------------------------------------------------------

    def listing_changed(self, directory: InodeId) -> None:
        # Unlike a file's, a directory's pages are never locked while a request is on its way:
        # this waits for nobody, and on the loop it is done before the reply that changes names.
        if self._nursery is None:
            self._early.append(lambda: self.listing_changed(directory))
        else:
            _invalidate_data(directory)

    def data_changed(self, inode: InodeId) -> None:
        # Not left to the thread: that one may have to wait for a READ of what is wrong.
        self.attributes_changed(inode)
        self._submit(self._data, inode, b"", self._drop_data)

    async def wait_data_changed(self, inode: InodeId) -> None:
        self.data_changed(inode)
        await self._wait_completed(self._data, inode)
        await self.wait_attributes_changed(inode)

    def name_changed(self, directory: InodeId, name: bytes) -> None:
        self._submit(self._names, directory, name, self._drop_names)

    async def wait_name_changed(self, directory: InodeId, name: bytes) -> None:
        self.name_changed(directory, name)
        await self._wait_completed(self._names, directory)

    def _submit(
        self, queues: dict[InodeId, _Queue], inode: InodeId, name: bytes,
        drop: Callable[[InodeId, list[bytes]], Awaitable[None]],
    ) -> None:
        queue = queues.get(inode)
        is_idle = queue is None
        if queue is None:
            queue = queues[inode] = _Queue()
        queue.names[name] = None
        queue.submitted += 1
        if not is_idle:
            return
        if self._nursery is None:
            self._early.append(lambda: self._work_soon(queues, inode, drop))
        else:
            self._work_soon(queues, inode, drop)

    def _work_soon(
        self, queues: dict[InodeId, _Queue], inode: InodeId,
        drop: Callable[[InodeId, list[bytes]], Awaitable[None]],
    ) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._work, queues, inode, drop)

    async def _work(
        self, queues: dict[InodeId, _Queue], inode: InodeId,
        drop: Callable[[InodeId, list[bytes]], Awaitable[None]],
    ) -> None:
        queue = queues[inode]
        while queue.names:
            # Whatever changes from here on is a new entry, dropped in the next round.
            names, queue.names = list(queue.names), {}
            submitted = queue.submitted
            await drop(inode, names)
            queue.completed = submitted
            queue.progress.set()
            queue.progress = trio.Event()
        del queues[inode]

    async def _wait_completed(self, queues: dict[InodeId, _Queue], inode: InodeId) -> None:
        queue = queues[inode]
        submitted = queue.submitted
        while queue.completed < submitted:
            await queue.progress.wait()

    async def _drop_data(self, inode: InodeId, _: list[bytes]) -> None:
        await trio.to_thread.run_sync(
            _invalidate_data, inode, abandon_on_cancel=True, limiter=self._threads
        )

    async def _drop_names(self, directory: InodeId, names: list[bytes]) -> None:
        await trio.to_thread.run_sync(
            _invalidate_names, directory, names, abandon_on_cancel=True, limiter=self._threads
        )
        await self.wait_attributes_changed(directory)


# In threads from here on, but for listings.


def _invalidate_data(inode: InodeId) -> None:
    _DATA.inc()
    try:
        pyfuse3.invalidate_inode(inode, False)
    except FileNotFoundError:
        pass  # an inode that the kernel does not hold has no pages
    except OSError as error:
        _check_connection(error)


def _invalidate_names(directory: InodeId, names: list[bytes]) -> None:
    for name in names:
        _NAMES.inc()
        try:
            pyfuse3.invalidate_entry(directory, name)
        except FileNotFoundError:
            pass  # not cached; a LOOKUP on its way would have held the directory's lock
        except OSError as error:
            _check_connection(error)


def _check_connection(error: OSError) -> None:
    if error.errno not in _NOT_CONNECTED:
        log.warning("kernel_notification_failed", error=repr(error))
