"""The namespace of a volume: names, attributes, and every operation that changes them.

Changes of names go to the core filer synchronously: when a method here returns, the core filer
has acknowledged the change.  What the core filer told is believed for the policy's verify interval;
then the next use asks again.  While the core filer does not answer, what is known is served on.

Owns: when to ask, what to believe, the listing of directories, orphans.
Does not own: file bytes (``filer/data.py``), the kernel protocol (``filer/vfs``).
"""

from __future__ import annotations

import errno
import math
import stat
from collections.abc import Awaitable, Callable
from dataclasses import replace

import structlog
import trio

from filer.core_filer.base import (
    Attributes,
    CoreFiler,
    Found,
    Handle,
    SetAttributes,
)
from filer.errors import FilerError, Refused
from filer.ids import ROOT_INODE, InodeId
from filer.leases.table import Leases
from filer.metrics import CACHE_LOOKUPS
from filer.namespace.inode import NEVER, Change, Directory, Inode
from filer.namespace.store import NameStore
from filer.namespace.table import InodeTable

log = structlog.get_logger(__name__)

ORPHANS = b".filer-orphans"
"""Directory in the core filer's root for files that were unlinked while they may be open."""

NAME_BYTES_MAX = 255
FOREVER_S = 86400.0
"""The kernel's timeout where the policy never verifies."""
_NEGATIVE_NAMES_MAX = 10_000
_DIRECTORIES_MAX = 20_000
"""Directories whose names are in memory; each also holds its inode there."""
_MISSES_MAX = 8
_PATIENCE_S = 4.0
"""A GETATTR unanswered for this long is answered from what is known instead."""
_STALE_TIMEOUT_S = 1.0

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2

_HIT = {layer: CACHE_LOOKUPS.labels(layer, "hit") for layer in ("attributes", "names")}
_MISS = {layer: CACHE_LOOKUPS.labels(layer, "miss") for layer in ("attributes", "names")}


class Namespace:
    def __init__(
        self, core: CoreFiler, store: NameStore, table: InodeTable, leases: Leases, *,
        verify_s: float | None, directory_entries_in_memory_max: int,
        wall_clock_ns: Callable[[], int], background: trio.Nursery,
        discard: Callable[[Inode], Awaitable[None]],
    ) -> None:
        self.table = table
        self._core = core
        self._store = store
        self._leases = leases
        self._verify_s = verify_s
        self._entries_max = directory_entries_in_memory_max
        self._wall_clock_ns = wall_clock_ns
        self._background = background
        self._discard = discard
        self._verifying: dict[InodeId, trio.Event] = {}
        self._listing: dict[InodeId, trio.Event] = {}
        self._directories: dict[InodeId, Inode] = {}
        """Inodes whose names are in memory, least recently used first."""
        self._orphans_handle: Handle | None = None
        self._orphans: dict[InodeId, bytes] = {}

    # -- belief ------------------------------------------------------------------------------

    def is_fresh(self, inode: Inode) -> bool:
        return self.valid_for_s(inode) > 0

    def valid_for_s(self, inode: Inode) -> float:
        """For how long what is known about *inode* may be believed; ≤ 0: ask first."""
        now = trio.current_time()
        if inode.is_orphan:
            return FOREVER_S
        if self._verify_s is None:
            policy = FOREVER_S if inode.verified_at > NEVER else 0.0
        else:
            policy = inode.verified_at + self._verify_s - now
        if policy <= 0 and inode.verified_at > NEVER and not self._core.state().reachable:
            policy = _STALE_TIMEOUT_S
        return min(policy, self._leases.valid_until(inode.id) - now)

    async def verify(self, inode: Inode) -> None:
        """Ask the core filer for *inode*'s attributes unless what is known is fresh.

        If it does not answer for a while, what is known stays good for the moment.
        """
        if self.is_fresh(inode):
            _HIT["attributes"].inc()
            return
        _MISS["attributes"].inc()
        while not self.is_fresh(inode):
            running = self._verifying.get(inode.id)
            if running is not None:
                await running.wait()
                continue
            self._verifying[inode.id] = done = trio.Event()
            try:
                if not await self._ask(inode):
                    return
            finally:
                del self._verifying[inode.id]
                done.set()
            if self._verify_s == 0:
                return

    @property
    def _patience_s(self) -> float:
        """How long to wait for the core filer where something known can be served instead."""
        return _PATIENCE_S if self._core.state().reachable else 0.0

    async def _ask(self, inode: Inode) -> bool:
        """One GETATTR; False if it was not answered in time and the old attributes serve."""
        asked_at = self.table.clock
        with trio.move_on_after(self._patience_s) as patience:
            try:
                told = await self._core.getattr(inode.handle)
            except Refused as exc:
                if exc.errno == errno.ESTALE:
                    self._vanished(inode)
                raise
        if patience.cancelled_caught:
            log.debug("core filer does not answer; serving what is known", inode=inode.id)
            if inode.verified_at == NEVER:
                # Known from the store only: it was true when we last ran.
                inode.verified_at = trio.current_time() - (self._verify_s or 0.0)
            return False
        names = inode.directory
        change = self.table.observe(inode, told, asked_at)
        if inode.change_sequence > asked_at:
            # Our own change crossed the question; what we know from it is as good.
            inode.verified_at = trio.current_time()
        if names is not None and names.suspect and change is Change.NOTHING:
            names.suspect = False
            _distrust(names)
        return True

    def _vanished(self, inode: Inode) -> None:
        """ESTALE: removed behind us."""
        parent = self.table.in_memory(inode.parent)
        if parent is not None and parent.id != inode.id:
            parent.verified_at = NEVER
            if parent.directory is not None:
                _distrust(parent.directory)
        if inode.id != ROOT_INODE:
            self.table.gone(inode)
            self._directories.pop(inode.id, None)

    def names_changed(self, inode: Inode) -> None:
        """The core filer showed that names of this directory changed behind us."""
        if inode.directory is not None:
            inode.directory.suspect = False
            _distrust(inode.directory)

    # -- names -------------------------------------------------------------------------------

    async def lookup(self, parent: Inode, name: bytes) -> Inode | None:
        """The inode that *name* leads to; ``None``: there is none.

        Raises: Refused: ENAMETOOLONG, ENOTDIR, ESTALE, EACCES…
        """
        if name == b".":
            return parent
        if name == b"..":
            return await self._parent_of(parent)
        self.check_name(name)
        if parent.id == ROOT_INODE and name == ORPHANS:
            return None
        names = await self.names(parent)
        known = names.entries.get(name)
        if known is not None and (names.verified is None or name in names.verified):
            inode = self.table.find(known[0])
            if inode is not None:
                _HIT["names"].inc()
                inode.name = name
                return inode
        elif known is None and (names.complete or name in names.negative):
            _HIT["names"].inc()
            return None
        _MISS["names"].inc()
        asked_at = self.table.clock
        stale = None if known is None else self.table.find(known[0])
        found: Found | None = None
        try:
            with trio.move_on_after(math.inf if stale is None else self._patience_s):
                found = await self._core.lookup(parent.handle, name)
            if found is None:
                return stale
        except Refused as exc:
            if exc.errno != errno.ENOENT:
                raise
            if parent.change_sequence <= asked_at:
                self._drop_name(parent, name)
                if len(names.negative) >= _NEGATIVE_NAMES_MAX:
                    names.negative.clear()
                names.negative.add(name)
                names.misses += 1
                if names.misses == _MISSES_MAX:
                    self._background.start_soon(self._list_ahead, parent)
            return None
        inode = self.table.admit(
            found.handle, found.attributes, parent.id, asked_at, name=name)
        if parent.change_sequence <= asked_at:
            self._add_name(parent, name, inode)
        return inode

    async def lookup_again(self, parent: Inode, name: bytes) -> Inode | None:
        """Look *name* up in the core filer, whatever we believe."""
        self._drop_name(parent, name)
        if parent.directory is not None:
            parent.directory.negative.discard(name)
            parent.directory.complete = False
        return await self.lookup(parent, name)

    async def names(self, parent: Inode) -> Directory:
        """The names of *parent* as far as known, fresh by the policy."""
        if not parent.attributes.is_directory:
            raise Refused(errno.ENOTDIR, f"inode {parent.id}")
        await self.verify(parent)
        if parent.directory is None:
            record = await self._store.directory(parent.id)
            if parent.directory is None:
                names = Directory()
                if record is not None:
                    names.restore(record.entries)
                    names.next_cookie = max(names.next_cookie, record.next_cookie)
                    names.complete = record.core_mtime_ns == parent.core.mtime_ns
                    if not names.complete:
                        names.verified = set()
                parent.directory = names
        self._directories.pop(parent.id, None)
        self._directories[parent.id] = parent
        if len(self._directories) > _DIRECTORIES_MAX:
            self._shed_directories()
        return parent.directory

    async def listed(self, parent: Inode) -> Directory:
        """All names of *parent*."""
        names = await self.names(parent)
        while not names.complete:
            running = self._listing.get(parent.id)
            if running is not None:
                await running.wait()
                names = await self.names(parent)
                continue
            self._listing[parent.id] = done = trio.Event()
            try:
                await self._list(parent, names)
            finally:
                del self._listing[parent.id]
                names.local_changes = None
                done.set()
        self._shed_directories()
        return names

    async def _list_ahead(self, parent: Inode) -> None:
        """So many names in vain: learn them all, and answer the next ones from memory.

        Whoever makes files asks for each new name first, which costs a round trip otherwise.
        """
        try:
            await self.listed(parent)
        except FilerError as exc:
            log.debug("listing ahead failed", inode=parent.id, reason=str(exc))

    async def _list(self, parent: Inode, names: Directory) -> None:
        """Read the whole directory and make *names* equal to it.

        Names that we changed meanwhile keep the state that we gave them.
        """
        for _ in range(3):
            asked_at = self.table.clock
            names.local_changes = {}
            before = await self._core.getattr(parent.handle)
            seen: dict[bytes, InodeId] = {}
            fresh: list[Inode] = []
            async for batch in self._core.readdir(parent.handle):
                for entry in batch:
                    if parent.id == ROOT_INODE and entry.name == ORPHANS:
                        continue
                    if entry.handle is None or entry.attributes is None:
                        try:
                            found = await self._core.lookup(parent.handle, entry.name)
                        except Refused:
                            continue
                        handle, told = found.handle, found.attributes
                    else:
                        handle, told = entry.handle, entry.attributes
                    inode = self.table.admit(
                        handle, told, parent.id, asked_at, name=entry.name, save=False)
                    seen[entry.name] = inode.id
                    fresh.append(inode)
                self.table.save(*fresh)
                fresh.clear()
                await trio.lowlevel.checkpoint()
            after = await self._core.getattr(parent.handle)
            ours = names.local_changes
            names.local_changes = None
            if after.mtime_ns == before.mtime_ns or ours:
                break
        changes: list[tuple[int, bytes, InodeId | None]] = []
        for name in [n for n in names.entries if n not in seen and n not in ours]:
            cookie = names.remove(name)
            if cookie is not None:
                changes.append((cookie, name, None))
        for name, inode_id in seen.items():
            if name in ours:
                continue
            known = names.entries.get(name)
            if known is None or known[0] != inode_id:
                if known is not None:
                    changes.append((known[1], name, None))
                changes.append((names.add(name, inode_id), name, inode_id))
        names.complete = True
        names.verified = None
        names.misses = 0
        names.negative.clear()
        names.suspect = bool(ours) or after.mtime_ns != before.mtime_ns
        self.table.observe(parent, after, asked_at)
        names.complete = True
        names.verified = None
        self._store.put_dentries(parent.id, changes)
        self._store.put_directory(parent.id, names.next_cookie, after.mtime_ns)

    async def _parent_of(self, inode: Inode) -> Inode:
        if inode.id == ROOT_INODE:
            return inode
        known = self.table.find(inode.parent)
        if known is not None:
            return known
        asked_at = self.table.clock
        found = await self._core.lookup(inode.handle, b"..")
        return self.table.admit(found.handle, found.attributes, inode.parent, asked_at)

    def check_name(self, name: bytes) -> None:
        if len(name) > NAME_BYTES_MAX:
            raise Refused(errno.ENAMETOOLONG)

    # -- changes -----------------------------------------------------------------------------

    async def create(
        self, parent: Inode, name: bytes, mode: int, uid: int, gid: int, repeated: bool
    ) -> Inode:
        mode, gid = self._inherit(parent, mode, gid)
        with self.table.changing(parent):
            found = await self._core.create(
                parent.handle, name, mode=stat.S_IMODE(mode), uid=uid, gid=gid, repeated=repeated)
        return self._made(parent, name, found)

    async def mkdir(
        self, parent: Inode, name: bytes, mode: int, uid: int, gid: int, repeated: bool
    ) -> Inode:
        mode, gid = self._inherit(parent, mode, gid, directory=True)
        with self.table.changing(parent):
            found = await self._core.mkdir(
                parent.handle, name, mode=stat.S_IMODE(mode), uid=uid, gid=gid, repeated=repeated)
        inode = self._made(parent, name, found)
        inode.directory = names = Directory()
        names.complete = True
        self._directories[inode.id] = inode
        return inode

    async def mknod(
        self, parent: Inode, name: bytes, mode: int, rdev: int, uid: int, gid: int, repeated: bool
    ) -> Inode:
        if stat.S_ISREG(mode):  # the kernel's NFS server creates files this way
            return await self.create(parent, name, mode, uid, gid, repeated)
        mode, gid = self._inherit(parent, mode, gid)
        with self.table.changing(parent):
            found = await self._core.mknod(
                parent.handle, name, mode=mode, rdev=rdev, uid=uid, gid=gid, repeated=repeated)
        return self._made(parent, name, found)

    async def symlink(
        self, parent: Inode, name: bytes, target: bytes, uid: int, gid: int, repeated: bool
    ) -> Inode:
        _, gid = self._inherit(parent, 0, gid)
        with self.table.changing(parent):
            found = await self._core.symlink(
                parent.handle, name, target, uid=uid, gid=gid, repeated=repeated)
        return self._made(parent, name, found)

    async def link(self, inode: Inode, parent: Inode, name: bytes, repeated: bool) -> Inode:
        self.check_name(name)
        with self.table.changing(parent, inode):
            found = await self._core.link(inode.handle, parent.handle, name, repeated=repeated)
        return self._made(parent, name, found)

    async def unlink(self, parent: Inode, name: bytes, repeated: bool) -> None:
        """Remove a name; a file that may still be open lives on as an orphan until forgotten."""
        inode = await self.lookup(parent, name)
        if inode is None:
            if repeated:
                return
            raise Refused(errno.ENOENT)
        if inode.attributes.is_directory:
            raise Refused(errno.EISDIR)
        told: Attributes | None = None
        with self.table.changing(parent, inode):
            orphans = await self._orphanage(inode)
            if orphans is not None:
                told, _ = await self._core.rename(
                    parent.handle, name, orphans, _orphan_name(inode), repeated=repeated)
            else:
                told = await self._core.remove(parent.handle, name, repeated=repeated)
        self._removed(parent, name, told)
        if orphans is not None:
            self._orphaned(inode)
        else:
            self._lost_a_link(inode)

    async def rmdir(self, parent: Inode, name: bytes, repeated: bool) -> None:
        inode = await self.lookup(parent, name)
        with self.table.changing(parent):
            told = await self._core.rmdir(parent.handle, name, repeated=repeated)
        self._removed(parent, name, told)
        if inode is not None:
            self._removed_directory(inode)

    async def rename(
        self, parent: Inode, name: bytes, new_parent: Inode, new_name: bytes, flags: int,
        repeated: bool,
    ) -> None:
        self.check_name(new_name)
        inode = await self.lookup(parent, name)
        target = await self.lookup(new_parent, new_name)
        if inode is None and not repeated:
            raise Refused(errno.ENOENT)
        if flags & RENAME_NOREPLACE and target is not None and target is not inode:
            raise Refused(errno.EEXIST)
        if inode is target and inode is not None:
            return  # two names of one file: POSIX says do nothing
        exchange = bool(flags & RENAME_EXCHANGE)
        involved = [i for i in (parent, new_parent, inode, target) if i is not None]
        orphans: Handle | None = None
        with self.table.changing(*involved):
            if target is not None and not exchange and inode is not None:
                _check_kinds(inode, target)
                orphans = await self._orphanage(target)
                if orphans is not None:
                    # A second name first, so that there is never a moment without a target.
                    await self._core.link(
                        target.handle, orphans, _orphan_name(target), repeated=True)
            told, new_told = await self._core.rename(
                parent.handle, name, new_parent.handle, new_name, flags=flags, repeated=repeated)
        self._removed(parent, name, told)
        if new_parent is not parent:
            new_parent.touch_names(new_told, self._wall_clock_ns())
        if target is not None:
            self._drop_name(new_parent, new_name)
        if inode is not None:
            self._add_name(new_parent, new_name, inode)
            inode.parent, inode.name = new_parent.id, new_name
            self.table.save(inode)
        if target is not None and exchange:
            self._add_name(parent, name, target)
            target.parent = parent.id
            self.table.save(target)
        elif target is not None:
            if orphans is not None:
                self._orphaned(target)
            elif target.attributes.is_directory:
                self._removed_directory(target)
            else:
                self._lost_a_link(target)
        self._suspect(parent, new_parent)
        self._save_directory(parent)
        if new_parent is not parent:
            self._save_directory(new_parent)

    async def set_attributes(self, inode: Inode, changes: SetAttributes) -> None:
        """Change attributes at the core filer; sizes of files go through the write-behind log."""
        was_dirty = self.table.is_dirty(inode)
        with self.table.changing(inode):
            told = await self._core.setattr(inode.handle, changes)
        self.table.mutated(inode, told, was_dirty=was_dirty)
        self.table.save(inode)

    # -- orphans -----------------------------------------------------------------------------

    async def start(self, *, kernel_is_new: bool) -> None:
        """Find the orphans of earlier runs; with a new kernel mount nobody has them open."""
        self._orphans = self._store.orphans()
        for inode_id in list(self._orphans):
            inode = self.table.find(inode_id)
            if inode is not None:
                inode.is_orphan = True
            if kernel_is_new or inode is None:
                self._background.start_soon(self._remove_orphan, inode_id)

    def forgotten(self, inode_id: InodeId) -> None:
        """The kernel dropped its last reference to *inode_id*."""
        if inode_id in self._orphans:
            self._background.start_soon(self._remove_orphan, inode_id)
            return
        inode = self.table.in_memory(inode_id)
        if inode is not None and inode.is_orphan:
            inode.is_orphan = False
            self._directories.pop(inode_id, None)
            inode.directory = None
            self.table.gone(inode)

    async def _orphanage(self, inode: Inode) -> Handle | None:
        """Where to keep *inode* when its last name goes; ``None``: it need not be kept."""
        if not inode.attributes.is_regular or inode.attributes.nlink > 1:
            return None
        if self._orphans_handle is None:
            root = self.table.root
            try:
                try:
                    found = await self._core.lookup(root.handle, ORPHANS)
                except Refused as exc:
                    if exc.errno != errno.ENOENT:
                        raise
                    with self.table.changing(root):
                        found = await self._core.mkdir(
                            root.handle, ORPHANS, mode=0o700, uid=0, gid=0, repeated=True)
                    root.touch_names(found.directory, self._wall_clock_ns())
            except Refused as exc:
                log.warning("cannot keep unlinked files that are still open", reason=str(exc))
                return None
            if found.attributes.fsid != root.attributes.fsid:
                return None
            self._orphans_handle = found.handle
        return self._orphans_handle

    def _orphaned(self, inode: Inode) -> None:
        name = _orphan_name(inode)
        inode.is_orphan = True
        self._orphans[inode.id] = name
        self._store.put_orphan(inode.id, name)
        self._lost_a_link(inode)

    async def _remove_orphan(self, inode_id: InodeId) -> None:
        name = self._orphans.pop(inode_id, None)
        if name is None:
            return
        inode = self.table.find(inode_id)
        if inode is not None:
            await self._discard(inode)
            # Before the core filer may give its file id to a new file.
            inode.is_orphan = False
            self.table.gone(inode)
        try:
            if self._orphans_handle is None:
                found = await self._core.lookup(self.table.root.handle, ORPHANS)
                self._orphans_handle = found.handle
            await self._core.remove(self._orphans_handle, name, repeated=True)
        except Refused as exc:
            if exc.errno not in (errno.ENOENT, errno.ESTALE):
                log.warning("an unlinked file could not be removed", name=name, reason=str(exc))
        except FilerError as exc:
            log.warning("an unlinked file could not be removed", name=name, reason=str(exc))
            return
        self._store.forget_orphan(inode_id)

    # -- mechanism ---------------------------------------------------------------------------

    def _made(self, parent: Inode, name: bytes, found: Found) -> Inode:
        inode = self.table.made(found, parent.id, name)
        parent.touch_names(found.directory, self._wall_clock_ns())
        self._add_name(parent, name, inode)
        self._suspect(parent)
        self.table.save(parent, inode)
        self._save_directory(parent)
        return inode

    def _removed(self, parent: Inode, name: bytes, told: Attributes | None) -> None:
        parent.touch_names(told, self._wall_clock_ns())
        self._drop_name(parent, name)
        if parent.directory is not None:
            parent.directory.negative.add(name)
        self._suspect(parent)
        self.table.save(parent)
        self._save_directory(parent)

    def _lost_a_link(self, inode: Inode) -> None:
        links = max(0, inode.attributes.nlink - 1)
        inode.attributes = replace(
            inode.attributes, nlink=links, ctime_ns=inode.attributes.ctime_ns + 1)
        if links or inode.is_orphan:
            self.table.save(inode)
        else:
            self._nameless(inode)

    def _removed_directory(self, inode: Inode) -> None:
        inode.attributes = replace(inode.attributes, nlink=0)
        inode.directory = names = Directory()
        names.complete = True
        self._nameless(inode)

    def _nameless(self, inode: Inode) -> None:
        """Gone from the core filer; whoever has it open may still ask for its attributes."""
        inode.is_orphan = True
        self._store.forget_inode(inode.id)

    def _add_name(self, parent: Inode, name: bytes, inode: Inode) -> None:
        inode.name = name
        names = parent.directory
        if names is None:
            return
        known = names.entries.get(name)
        cookie = names.add(name, inode.id)
        if names.verified is not None:
            names.verified.add(name)
        if known is None or known[1] != cookie:
            changes: list[tuple[int, bytes, InodeId | None]] = [(cookie, name, inode.id)]
            if known is not None:
                changes.append((known[1], name, None))
            self._store.put_dentries(parent.id, changes)

    def _drop_name(self, parent: Inode, name: bytes) -> None:
        names = parent.directory
        if names is None:
            return
        cookie = names.remove(name)
        if cookie is not None:
            self._store.put_dentries(parent.id, [(cookie, name, None)])

    def _save_directory(self, parent: Inode) -> None:
        names = parent.directory
        if names is not None and names.complete:
            self._store.put_directory(parent.id, names.next_cookie, parent.core.mtime_ns)

    def _suspect(self, *parents: Inode) -> None:
        for parent in parents:
            if parent.directory is not None:
                parent.directory.suspect = True

    def _inherit(
        self, parent: Inode, mode: int, gid: int, *, directory: bool = False
    ) -> tuple[int, int]:
        """A set-group-id directory hands its group down, and to directories the bit as well."""
        if parent.attributes.mode & stat.S_ISGID:
            return (mode | stat.S_ISGID if directory else mode), parent.attributes.gid
        return mode, gid

    def _shed_directories(self) -> None:
        """Drop the names of least recently used directories beyond the limits."""
        total = sum(len(i.directory.entries) for i in self._directories.values() if i.directory)
        keep = len(self._directories)
        if keep > _DIRECTORIES_MAX:
            keep = _DIRECTORIES_MAX * 9 // 10  # so that the next time is a while away
        for inode_id in list(self._directories)[:-1]:
            if total <= self._entries_max and len(self._directories) <= keep:
                return
            inode = self._directories[inode_id]
            if inode_id in self._listing or inode.is_orphan:
                continue
            del self._directories[inode_id]
            if inode.directory is not None:
                total -= len(inode.directory.entries)
                inode.directory = None


def _distrust(names: Directory) -> None:
    """Names may have changed behind us: keep the cookies, believe no name unasked."""
    names.complete = False
    names.verified = set()
    names.misses = 0
    names.negative.clear()


def _orphan_name(inode: Inode) -> bytes:
    return b"%x-%x" % (inode.id, inode.generation)


def _check_kinds(inode: Inode, target: Inode) -> None:
    if target.attributes.is_directory and not inode.attributes.is_directory:
        raise Refused(errno.EISDIR)
    if inode.attributes.is_directory and not target.attributes.is_directory:
        raise Refused(errno.ENOTDIR)
