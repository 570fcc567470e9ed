"""How many references the kernel holds on each inode, as far as this process can know.

The kernel counts a reference for every entry it is given (LOOKUP, CREATE, MKNOD, MKDIR, SYMLINK,
LINK, each entry of READDIRPLUS) and gives them back with FORGET.  Two decisions hang on it: an
inode that the kernel holds must stay known, and "no such inode" from the kernel is believed only
if it holds none (``filer/vfs/kernel.py``).

The count must be raised in the same step in which the reply is returned.

After a takeover the kernel holds references that it got from an earlier server, of which this
process knows nothing; FORGETs then take away more than was counted here, and 0 means unknown.
The kernel gives an inode's references back all at once, so a remainder of 0 still says that it
has let go.

Memory: about 90 bytes an inode (one dict entry and its key).
"""

from __future__ import annotations


class LookupCounts:
    __slots__ = ("_counts", "is_complete")

    def __init__(self, *, is_complete: bool = True) -> None:
        """*is_complete* is false after a takeover (``KeptMount.is_taken_over``)."""
        self._counts: dict[int, int] = {}
        self.is_complete = is_complete

    @property
    def inode_count(self) -> int:
        """Inodes that the kernel holds."""
        return len(self._counts)

    def count(self, inode: int) -> int:
        return self._counts.get(inode, 0)

    def increment(self, inode: int, by: int = 1) -> None:
        self._counts[inode] = self._counts.get(inode, 0) + by

    def decrement(self, inode: int, by: int) -> int:
        """The kernel forgot *by* references; return how many it still holds."""
        left = self._counts.get(inode, 0) - by
        if left > 0:
            self._counts[inode] = left
            return left
        assert left == 0 or not self.is_complete, f"inode {inode} forgotten {-left} times too often"
        self._counts.pop(inode, None)
        return 0
