"""The inodes of a volume: at most one object each, bounded in memory, loaded again from the store.

Owns the mapping from the core filer's file ids to inode ids, and the rule by which answers that
crossed a change of our own are not believed.  Does not own names (``service.py``).
"""

from __future__ import annotations

import errno
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random

import trio
import xxhash

from filer.core_filer.base import Attributes, Found, Handle
from filer.errors import Refused
from filer.ids import ROOT_INODE, DataVersion, InodeId
from filer.namespace.inode import NEVER, Change, Inode
from filer.namespace.store import InodeRecord, NameStore

_FOREIGN = 1 << 63
_MASK_63 = _FOREIGN - 1


class InodeTable:
    """See the module's docstring.

    *changed* is called when the core filer showed a change made behind us; *overlay* when an
    inode was loaded from the store, to put back what the write-behind log knows better.
    """

    def __init__(
        self, store: NameStore, root: Handle, root_attributes: Attributes, *,
        inodes_in_memory_max: int, random: Random,
        changed: Callable[[Inode, Change], None],
        overlay: Callable[[Inode], None],
        is_dirty: Callable[[InodeId], bool],
    ) -> None:
        self._store = store
        self._random = random
        self._memory_max = inodes_in_memory_max
        self._changed = changed
        self._overlay = overlay
        self._is_dirty = is_dirty
        self._alive: weakref.WeakValueDictionary[InodeId, Inode] = weakref.WeakValueDictionary()
        """Every inode object that anything still refers to."""
        self._recent: OrderedDict[InodeId, Inode] = OrderedDict()
        """Keeps the recently used ones alive; insertion order with a second chance."""
        self._busy: dict[InodeId, int] = {}
        self.clock = 0
        """Counts the ends of our own changes; see ``observe``."""
        self._root_fileid = root_attributes.fileid
        self._fsid = root_attributes.fsid
        self.root = self.admit(root, root_attributes, ROOT_INODE, self.clock)

    # -- identity ----------------------------------------------------------------------------

    def inode_id(self, attributes: Attributes) -> InodeId:
        """The core filer's file id, with the root's and 1 exchanged.

        A file of another file system below the export could share a file id with ours: those
        get ids with the top bit set.
        """
        if attributes.fsid != self._fsid:
            mixed = (attributes.fileid ^ (attributes.fsid * 0x9E3779B97F4A7C15)) & _MASK_63
            return InodeId(_FOREIGN | mixed)
        if attributes.fileid == self._root_fileid:
            return ROOT_INODE
        if attributes.fileid == ROOT_INODE:
            return InodeId(self._root_fileid)
        return InodeId(attributes.fileid)

    def new_data_version(self) -> DataVersion:
        """Random, so that no version is ever used twice, whatever a crash forgot."""
        return DataVersion(self._random.getrandbits(63))

    # -- access ------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._recent)

    def in_memory(self, inode: InodeId) -> Inode | None:
        return self._alive.get(inode)

    def find(self, inode: InodeId) -> Inode | None:
        """From memory or the store."""
        known = self._alive.get(inode)
        if known is not None:
            known.touched = True
            if inode not in self._recent:
                self._remember(known)
            return known
        record = self._store.inode(inode)
        if record is None:
            return None
        loaded = Inode(record)
        self._overlay(loaded)
        self._remember(loaded)
        return loaded

    def get(self, inode: InodeId) -> Inode:
        """Raises: Refused(ESTALE) for an id never handed out, or of a removed file."""
        found = self.find(inode)
        if found is None:
            raise _stale(inode)
        return found

    # -- what the core filer tells -----------------------------------------------------------

    def admit(
        self, handle: Handle, told: Attributes, parent: InodeId, asked_at: int, *,
        name: bytes = b"", save: bool = True,
    ) -> Inode:
        """The inode behind an answer of the core filer that was asked for at clock *asked_at*.

        A file id that comes with another handle than before was reused: it is another inode,
        and its generation is another one too.
        """
        inode_id = self.inode_id(told)
        known = self.find(inode_id)
        if known is not None and known.handle == handle:
            if known.parent != parent and inode_id != ROOT_INODE:
                known.parent = parent
            self.observe(known, told, asked_at)
            return known
        if known is not None:
            self._changed(known, Change.DATA)
            del self._alive[inode_id]
        inode = Inode(
            InodeRecord(inode_id, _generation(inode_id, handle), parent, handle, told,
                        told.version, self.new_data_version(), name),
            verified_at=trio.current_time(),
        )
        self._remember(inode)
        if save:
            self._store.put_inodes([inode.record()])
        return inode

    def observe(self, inode: Inode, told: Attributes, asked_at: int) -> Change:
        """Take in attributes asked for at clock *asked_at*.

        They are not believed if a change of our own was under way or ended since: the answer may
        tell the state before it.  Nor while the file is dirty: then ours are newer, and a change
        behind us is the flush's to find.
        """
        if inode.id in self._busy or inode.change_sequence > asked_at:
            return Change.NOTHING
        if self._is_dirty(inode.id):
            inode.verified_at = trio.current_time()
            return Change.NOTHING
        before = inode.data_version
        change = inode.observe(told, trio.current_time(), self.new_data_version())
        if change is not Change.NOTHING:
            if change is Change.DATA:
                inode.data_version, after = before, inode.data_version
                self._changed(inode, change)
                inode.data_version = after
            else:
                self._changed(inode, change)
            self._store.put_inodes([inode.record()])
        return change

    @contextmanager
    def changing(self, *inodes: Inode) -> Iterator[None]:
        """Around a change of our own at the core filer."""
        for inode in inodes:
            self._busy[inode.id] = self._busy.get(inode.id, 0) + 1
        try:
            yield
        finally:
            self.clock += 1
            for inode in inodes:
                inode.change_sequence = self.clock
                if self._busy[inode.id] == 1:
                    del self._busy[inode.id]
                else:
                    self._busy[inode.id] -= 1

    def made(self, found: Found, parent: InodeId, name: bytes) -> Inode:
        """The inode of something we have just made or linked."""
        known = self.find(self.inode_id(found.attributes))
        if known is not None and known.handle == found.handle:
            known.parent, known.name = parent, name
            self.mutated(known, found.attributes)
            return known
        return self.admit(found.handle, found.attributes, parent, self.clock, name=name, save=False)

    def mutated(self, inode: Inode, told: Attributes, *, was_dirty: bool = False) -> None:
        """Take in what the core filer told as the result of our own change.

        *was_dirty*: the file was dirty when the change was sent; a flush may have ended since,
        and *told* may be from before its end.
        """
        inode.mutated(told, trio.current_time(), is_dirty=was_dirty or self._is_dirty(inode.id))

    def is_dirty(self, inode: Inode) -> bool:
        return self._is_dirty(inode.id)

    def save(self, *inodes: Inode) -> None:
        self._store.put_inodes([inode.record() for inode in inodes])

    def gone(self, inode: Inode) -> None:
        """The core filer has no such inode any more."""
        self._changed(inode, Change.DATA)
        inode.verified_at = NEVER
        if self._alive.get(inode.id) is inode:  # else its file id belongs to another file by now
            self._store.forget_inode(inode.id)
            self._recent.pop(inode.id, None)
            self._alive.pop(inode.id, None)

    # -- mechanism ---------------------------------------------------------------------------

    def _remember(self, inode: Inode) -> None:
        self._alive[inode.id] = inode
        self._recent[inode.id] = inode
        if len(self._recent) > self._memory_max:
            self._evict()

    def _evict(self) -> None:
        """Second chance: whoever was touched since the last round goes to the end once more."""
        recent = self._recent
        for _ in range(2 * len(recent)):
            inode_id, inode = next(iter(recent.items()))
            if inode_id == ROOT_INODE or inode.is_orphan or inode.directory is not None:
                recent.move_to_end(inode_id)
            elif inode.touched:
                inode.touched = False
                recent.move_to_end(inode_id)
            else:
                del recent[inode_id]
                return


def _generation(inode: InodeId, handle: Handle) -> int:
    """Tells one user of a file id from the next, in NFS handles too.

    Derived from the core filer's handle, which differs for every inode that ever was: so it
    needs no memory of removed files, and is the same on every node.
    """
    if inode == ROOT_INODE:
        return 0  # as the kernel has it
    return 1 + xxhash.xxh3_64_intdigest(handle) % 0x7FFFFFFF


def _stale(inode: InodeId) -> Refused:
    return Refused(errno.ESTALE, f"inode {inode} is not known (any more)")
