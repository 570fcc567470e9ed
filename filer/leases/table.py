"""Leases: until when this node may believe what it cached.

A stand-alone node is the only cache in front of its core filer, so it holds every lease for
ever.  The kernel is given timeouts only under a lease; that rule is in place from the start, so
that a node of a cluster needs another ``Leases``, not another file system.
"""

from __future__ import annotations

from typing import Protocol

from filer.ids import InodeId


class Leases(Protocol):
    def valid_until(self, inode: InodeId) -> float:
        """``trio.current_time()`` up to which attributes and names of *inode* may be cached."""
        ...


class StandaloneLeases:
    """The only node: nobody can recall anything."""

    def valid_until(self, inode: InodeId) -> float:
        return float("inf")
