"""Whether what a repeated request finds is explained by its first attempt.

Pure.  A request whose answer was lost is sent again; if the first one was applied, the second
meets EEXIST or ENOENT.  These predicates decide when that is success after all.
"""

from __future__ import annotations

import stat

from filer.core_filer.base import Attributes


def is_what_was_made(
    found: Attributes, *, mode: int, uid: int, gid: int, rdev: int = 0
) -> bool:
    """Whether *found* looks exactly as the wanted new inode would: type, owner, mode, untouched.

    *mode* holds type and permission bits.  A directory may have inherited its parent's set-gid
    bit; a symbolic link's mode belongs to the server.
    """
    if stat.S_IFMT(found.mode) != stat.S_IFMT(mode) or (found.uid, found.gid) != (uid, gid):
        return False
    if stat.S_ISLNK(mode):
        return True
    ignored = stat.S_ISGID if stat.S_ISDIR(mode) else 0
    if stat.S_IMODE(found.mode) & ~ignored != stat.S_IMODE(mode) & ~ignored:
        return False
    if stat.S_ISREG(mode):
        return found.size == 0 and found.nlink == 1
    if stat.S_ISBLK(mode) or stat.S_ISCHR(mode):
        return found.rdev == rdev
    return True
