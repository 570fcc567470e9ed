"""Whether what a repeated request finds is explained by its first attempt.

Pure.  A request whose answer was lost is sent again; if the first one was applied, the second
meets EEXIST.  `Wanted` decides when that is success after all.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, replace

from filer.core_filer.base import Attributes


@dataclass(frozen=True, slots=True)
class Wanted:
    """An inode that somebody asked to make."""

    mode: int
    """Type and permission bits."""
    uid: int
    gid: int
    rdev: int = 0
    target: bytes = b""
    """Of a symbolic link."""

    @property
    def type(self) -> int:
        return stat.S_IFMT(self.mode)

    @property
    def permissions(self) -> int:
        return stat.S_IMODE(self.mode)

    def looks_like(self, found: Attributes) -> bool:
        """Whether *found* is as the wanted one would be: type, owner, mode, untouched.

        Set-uid and set-gid do not count: a directory may inherit one, and a change of owner may
        have cleared either.  A symbolic link's mode is the server's affair, and its target is
        for the caller to compare.
        """
        if stat.S_IFMT(found.mode) != self.type or (found.uid, found.gid) != (self.uid, self.gid):
            return False
        if stat.S_ISLNK(self.mode):
            return True
        if (stat.S_IMODE(found.mode) ^ self.permissions) & ~(stat.S_ISUID | stat.S_ISGID):
            return False
        if stat.S_ISREG(self.mode):
            return found.size == 0 and found.nlink == 1
        if stat.S_ISBLK(self.mode) or stat.S_ISCHR(self.mode):
            return found.rdev == self.rdev
        return True

    def looks_unfinished(self, found: Attributes) -> bool:
        """Whether the server may have died after making it as root and before giving it away."""
        return replace(self, uid=0, gid=0).looks_like(found)
