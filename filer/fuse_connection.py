"""A FUSE mount and its connection to the kernel, independent of who answers the requests.

Owns mount(2), the connection's first request (FUSE_INIT), what becomes of requests whose
server died, and the removal of mounts.  Knows nothing of what is served: that is
``filer/vfs/session.py``, which gets a :class:`Handover`.

Only the standard library is imported: the keeper, which uses this, must start at once and
must never need to be upgraded for anybody else's sake.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import select
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass

FILE_SYSTEM_TYPE = "fuse.filer"
READ_AHEAD_KIB = 8192
"""Cold sequential reads then reach the server as 1 MiB requests, several at a time."""

# <linux/fuse.h>
_OUT_HEADER = struct.Struct("<IiQ")  # len, error (or minus the notification), unique
_IN_HEADER = struct.Struct("<IIQ")  # len, opcode, unique, …
_INIT, _FORGET, _INTERRUPT, _BATCH_FORGET = 26, 2, 36, 42
_NOTIFY_RESEND = 7

_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_CONNECTIONS = "/sys/fs/fuse/connections"

_SCAN_AT_ONCE = 100_000
"""Uniques answered blindly in one step: about 0.1 s."""

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _unescape(field: str) -> str:
    """mountinfo writes space, tab, newline and backslash in octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _mounted_devices(mountpoint: str) -> list[str]:
    """Device numbers (``"0:47"``) of our file systems mounted there, the topmost last."""
    devices = []
    with open("/proc/self/mountinfo", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.split()
            file_system_type = fields[fields.index("-") + 1]
            if file_system_type == FILE_SYSTEM_TYPE and _unescape(fields[4]) == mountpoint:
                devices.append(fields[2])
    return devices


def _abort_connection(device: str) -> None:
    """Every request on it, also those blocked in the kernel, fails at once."""
    if not os.path.ismount(_CONNECTIONS):
        _check(_libc.mount(b"fusectl", _CONNECTIONS.encode(), b"fusectl", 0, None), "fusectl")
    # Absent when its last descriptor is closed: then it is aborted already.
    minor = device.partition(":")[2]
    with contextlib.suppress(FileNotFoundError), open(f"{_CONNECTIONS}/{minor}/abort", "w") as file:
        file.write("1")


def resolve_mountpoint(path: str) -> str:
    """Absolute, without symbolic links; never looks at what is mounted there, which may hang."""
    parent, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(parent), name)


def remove_mounts(mountpoint: str) -> int:
    """Remove what earlier keepers left at *mountpoint*; return how many mounts that were."""
    mountpoint = resolve_mountpoint(mountpoint)
    removed = 0
    while devices := _mounted_devices(mountpoint):
        _abort_connection(devices[-1])
        _check(_libc.umount2(os.fsencode(mountpoint), _MNT_DETACH | _UMOUNT_NOFOLLOW), mountpoint)
        removed += 1
    return removed


@dataclass(frozen=True, slots=True)
class Handover:
    """What a server must know to go on with a connection; one message from the keeper."""

    mount_id: bytes
    """16 random bytes: names this mount, over all its servers."""
    predecessors: int
    """Servers that this mount had before.  If not 0, the kernel may have cached their answers."""
    init_request: bytes
    """The kernel's FUSE_INIT, to be replayed."""

    READY = b"ready"
    """The server's answer, after FUSE_INIT and before it reads its first request."""

    def pack(self) -> bytes:
        return struct.pack("<16sI", self.mount_id, self.predecessors) + self.init_request

    @classmethod
    def unpack(cls, message: bytes) -> Handover:
        mount_id, predecessors = struct.unpack_from("<16sI", message)
        return cls(mount_id, predecessors, message[20:])


class FuseConnection:
    """One mount with its /dev/fuse descriptor."""

    def __init__(self, mountpoint: str) -> None:
        """Mount at *mountpoint*, an existing directory, and take the kernel's FUSE_INIT.

        Raises: OSError if that is not possible; then nothing is mounted.
        """
        self.mountpoint = resolve_mountpoint(mountpoint)
        self.mount_id = os.urandom(16)
        # Non-blocking: a request can be withdrawn between poll(2) and read(2).
        self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            # Neither nosuid nor nodev: render farms' trees have both, and NFS clients decide.
            options = (
                f"fd={self.fd},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other"
            )
            _check(
                _libc.mount(
                    b"filer", os.fsencode(self.mountpoint), FILE_SYSTEM_TYPE.encode(), 0,
                    options.encode(),
                ),
                f"mount {self.mountpoint}",
            )
        except OSError:
            os.close(self.fd)
            raise
        self.device = _mounted_devices(self.mountpoint)[-1]
        self.init_request = self._receive_init()
        self._resend_is_supported = True
        # Blind answers (see retry_in_flight): those in [_scanned_above, _scan_end) are given.
        # FUSE_INIT is the first unique, 2, and answered by the servers.
        self._scan_end = self._scanned_above = self._answered_below = 4

    def _receive_init(self) -> bytes:
        select.select([self.fd], [], [])
        request = os.read(self.fd, 1 << 16)
        opcode = _IN_HEADER.unpack_from(request)[1]
        assert opcode == _INIT, f"the kernel's first request has opcode {opcode}"
        return request

    def raise_read_ahead(self) -> bool:
        """Before FUSE_INIT is answered: the kernel takes the smaller of this and the answer."""
        try:
            with open(f"/sys/class/bdi/{self.device}/read_ahead_kb", "w") as file:
                file.write(str(READ_AHEAD_KIB))
        except OSError:  # a read-only /sys in a container: slower cold reads, nothing worse
            return False
        return True

    # -- requests of a server that died; nobody may be reading the descriptor meanwhile --------

    def retry_in_flight(self, *, resend: bool = True) -> bool:
        """See to it that requests which the dead server had read are answered after all.

        Linux 6.9 and later hand them out again, to the next server, with UNIQUE_RESEND set.
        Before that (or with *resend* false) they are answered EAGAIN, which NFS servers turn
        into "try again later" (JUKEBOX).

        Returns: whether old ones may be left, for ``answer_older`` to answer.
        """
        if resend and self._resend_is_supported:
            try:
                os.write(self.fd, _OUT_HEADER.pack(_OUT_HEADER.size, _NOTIFY_RESEND, 0))
                return False
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._resend_is_supported = False
        # All that the dead server read is older than the oldest request still queued.
        self._scan_end = self._scanned_above = self._first_queued_unique()
        return self.answer_older()

    def answer_older(self) -> bool:
        """Answer the next older requests EAGAIN; return whether there may be more.

        Which uniques wait for an answer is unknown, so all get one, newest first; the kernel
        refuses the wrong ones (ENOENT).  Safe while the next server reads: what it gets is
        newer.  After a complete scan all of these are answered for good.
        """
        start = max(self._scanned_above - 2 * _SCAN_AT_ONCE, self._answered_below)
        for unique in range(start, self._scanned_above, 2):
            self._answer_try_again(unique)
        self._scanned_above = start
        if start > self._answered_below:
            return True
        self._answered_below = self._scan_end
        return False

    def _answer_try_again(self, unique: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.write(self.fd, _OUT_HEADER.pack(_OUT_HEADER.size, -errno.EAGAIN, unique))

    def _first_queued_unique(self) -> int:
        """Take (and answer EAGAIN) the oldest queued request; one is made if there is none."""

        def make_a_request() -> None:
            with contextlib.suppress(OSError):
                os.statvfs(self.mountpoint)

        if not select.select([self.fd], [], [], 0)[0]:
            threading.Thread(target=make_a_request, daemon=True).start()
        while True:
            select.select([self.fd], [], [])
            try:
                request = os.read(self.fd, (1 << 20) + 4096)
            except BlockingIOError:
                continue
            _, opcode, unique = _IN_HEADER.unpack_from(request)
            # Those want no answer.  A FORGET lost here costs the next server nothing: it does
            # not know the counts of its predecessors anyway.
            if opcode not in (_FORGET, _INTERRUPT, _BATCH_FORGET):
                self._answer_try_again(unique)
                return int(unique)

    # -- the end ---------------------------------------------------------------------------------

    def unmount(self, report: Callable[[str], None] = lambda _: None) -> None:
        """Unmount, lazily if something is still using the mount.

        The descriptor is closed first: were it open, umount could wait for a server that will
        never come to take back dirty pages.
        """
        os.close(self.fd)
        path = os.fsencode(self.mountpoint)
        if _libc.umount2(path, _UMOUNT_NOFOLLOW) == 0:
            return
        reason = os.strerror(ctypes.get_errno())
        report(f"{self.mountpoint} is unmounted lazily: {reason}")
        _libc.umount2(path, _MNT_DETACH | _UMOUNT_NOFOLLOW)
