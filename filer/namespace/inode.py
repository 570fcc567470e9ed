"""Inodes and directories in memory, and how they take in what the core filer tells.  Pure.

Two views of one inode are kept apart:

- ``core``: the version (mtime, ctime, size) as the core filer last told it, to notice changes
  made behind us;
- ``attributes``: what clients were told.  It differs where clients need more than a NAS gives:
  a directory's mtime strictly increases with every change (the kernel's readdir cache and
  NFS-Ganesha's directory cache depend on it), and a file keeps the mtime of its last write while
  the core filer's own clock stamps the flush.
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace

from filer.core_filer.base import Attributes, Handle
from filer.ids import DataVersion, InodeId
from filer.namespace.store import InodeRecord

FIRST_COOKIE = 3
"""NFS-Ganesha's own ``.`` and ``..`` have cookies 1 and 2."""

NEVER = float("-inf")


class Change(enum.Enum):
    """What a fresh look at the core filer showed."""

    NOTHING = "nothing"
    ATTRIBUTES = "attributes"
    DATA = "data"
    """Bytes of a file, or names of a directory."""


class Inode:
    """One inode; exists at most once in memory (see ``InodeTable``)."""

    __slots__ = (
        "__weakref__", "attributes", "change_sequence", "core", "data_version", "directory",
        "generation", "handle", "id", "is_orphan", "name", "parent", "touched", "verified_at",
    )

    def __init__(self, record: InodeRecord, verified_at: float = NEVER) -> None:
        self.id = record.id
        self.generation = record.generation
        self.parent = record.parent
        self.handle: Handle = record.handle
        self.attributes = record.attributes
        self.core = record.core
        self.data_version = record.data_version
        self.verified_at = verified_at
        self.change_sequence = 0
        """Grows at both ends of our own mutations: a reply that began before is not adopted."""
        self.directory: Directory | None = None
        self.is_orphan = False
        self.name = record.name
        """One of its names, as last seen in *parent*; a hint."""
        self.touched = True

    def record(self) -> InodeRecord:
        return InodeRecord(
            self.id, self.generation, self.parent, self.handle, self.attributes, self.core,
            self.data_version, self.name,
        )

    def observe(self, told: Attributes, now: float, new_version: DataVersion) -> Change:
        """Take in attributes that the core filer told now, other than by our own change."""
        self.verified_at = now
        if told.version == self.core and told.nlink == self.attributes.nlink:
            return Change.NOTHING
        same_data = told.version.same_data(self.core)
        self.core = told.version
        if same_data:
            # Keep the mtime that clients know, else they would drop what is still true.
            self.attributes = replace(
                told, mtime_ns=self.attributes.mtime_ns,
                ctime_ns=max(told.ctime_ns, self.attributes.ctime_ns),
            )
            return Change.ATTRIBUTES
        if told.is_directory:
            told = _later(told, self.attributes)
        elif told.mtime_ns == self.attributes.mtime_ns and told.size == self.attributes.size:
            # Ours by accident; the kernel tells versions apart by mtime and size alone.
            told = replace(told, mtime_ns=told.mtime_ns + 1)
        self.attributes = told
        self.data_version = new_version
        return Change.DATA

    def mutated(self, told: Attributes, now: float, *, is_dirty: bool) -> None:
        """Take in attributes that the core filer told as the result of our own change.

        *is_dirty*: its bytes are in the write-behind log, which knows size and mtime better.
        """
        self.verified_at = now
        if is_dirty:
            ours = self.attributes
            self.attributes = replace(
                ours, mode=told.mode, uid=told.uid, gid=told.gid, nlink=told.nlink,
                ctime_ns=max(told.ctime_ns, ours.ctime_ns + 1))
            return
        self.core = told.version
        if told.is_directory:
            told = _later(told, self.attributes)
        self.attributes = replace(told, ctime_ns=max(told.ctime_ns, self.attributes.ctime_ns + 1))

    def touch_names(self, told: Attributes | None, now_ns: int) -> None:
        """A name in this directory changed through us; *told*: its attributes afterwards."""
        if told is not None:
            self.core = told.version
            self.attributes = _later(told, self.attributes)
        else:
            stamp = max(now_ns, self.attributes.mtime_ns + 1)
            self.attributes = replace(
                self.attributes, mtime_ns=stamp, ctime_ns=max(stamp, self.attributes.ctime_ns + 1)
            )


def _later(told: Attributes, before: Attributes) -> Attributes:
    """*told* with mtime and ctime strictly after *before*."""
    return replace(
        told,
        mtime_ns=max(told.mtime_ns, before.mtime_ns + 1),
        ctime_ns=max(told.ctime_ns, before.ctime_ns + 1),
    )


class Directory:
    """The names of one directory, each with a cookie that never changes while it exists.

    Cookies are handed out in increasing order and never again, so a reader that goes on from a
    cookie sees every name that existed all the while exactly once, whatever else happens.
    """

    __slots__ = ("_dead", "_order", "complete", "entries", "local_changes", "misses",
                 "negative", "next_cookie", "suspect", "verified")

    def __init__(self, next_cookie: int = FIRST_COOKIE) -> None:
        self.entries: dict[bytes, tuple[InodeId, int]] = {}
        self.negative: set[bytes] = set()
        self.next_cookie = next_cookie
        self.complete = False
        """Every name of the directory is in *entries*."""
        self.verified: set[bytes] | None = None
        """Names checked since a foreign change; ``None``: all of them are."""
        self.suspect = False
        """We changed names since the last look: a foreign change may hide behind our mtime."""
        self.misses = 0
        """Names asked for in vain since the names were last known to be complete."""
        self.local_changes: dict[bytes, InodeId | None] | None = None
        """While a listing is under way: what we did meanwhile."""
        self._order: list[tuple[int, bytes]] = []
        self._dead = 0

    def add(self, name: bytes, inode: InodeId) -> int:
        """Put *name*, with a new cookie unless it already leads to *inode*."""
        self.negative.discard(name)
        if self.local_changes is not None:
            self.local_changes[name] = inode
        known = self.entries.get(name)
        if known is not None:
            if known[0] == inode:
                return known[1]
            self._dead += 1
        cookie = self.next_cookie
        self.next_cookie += 1
        self.entries[name] = (inode, cookie)
        self._order.append((cookie, name))
        return cookie

    def remove(self, name: bytes) -> int | None:
        """Take *name* away; return its cookie if it was known."""
        if self.local_changes is not None:
            self.local_changes[name] = None
        known = self.entries.pop(name, None)
        if known is None:
            return None
        self._dead += 1
        if self._dead > 1000 and self._dead * 2 > len(self._order):
            self._compact()
        return known[1]

    def restore(self, entries: list[tuple[int, bytes, InodeId]]) -> None:
        """Take over a stored listing, in cookie order."""
        for cookie, name, inode in entries:
            self.entries[name] = (inode, cookie)
            self._order.append((cookie, name))
        if entries:
            self.next_cookie = max(self.next_cookie, entries[-1][0] + 1)

    def since(self, cookie: int) -> Iterator[tuple[int, bytes, InodeId]]:
        """``(cookie, name, inode)`` after *cookie*, in cookie order.

        The directory may change while the caller goes on; names added meanwhile come last.
        """
        order = self._order
        at = bisect_right(order, (cookie, b"\xff" * 256))
        while at < len(order):
            position, name = order[at]
            at += 1
            known = self.entries.get(name)
            if known is not None and known[1] == position:
                yield position, name, known[0]

    def _compact(self) -> None:
        # A new list: iterators over the old one go on undisturbed.
        self._order = [
            (cookie, name) for cookie, name in self._order
            if (known := self.entries.get(name)) is not None and known[1] == cookie
        ]
        self._dead = 0
