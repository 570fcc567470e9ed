"""System calls that Python's ``os`` does not offer, through ctypes.

Each raises ``OSError`` like ``os`` would; ctypes lets go of the GIL while they run.
"""

from __future__ import annotations

import ctypes
import os
import struct

_libc = ctypes.CDLL(None, use_errno=True)

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_UTIME_OMIT = (1 << 30) - 2

HANDLE_BYTES_MAX = 124
"""Of the file system's part; with our type in front that is 128."""

_TYPE = struct.Struct("=i")


class _FileHandle(ctypes.Structure):
    _fields_ = (
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_ubyte * HANDLE_BYTES_MAX),
    )


_HEADER_BYTES = _FileHandle.f_handle.offset


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


def name_to_handle(directory_fd: int, name: bytes) -> bytes:
    """The handle of *name* (not followed), or of *directory_fd* itself if *name* is empty."""
    handle = _FileHandle(handle_bytes=HANDLE_BYTES_MAX)
    mount_id = ctypes.c_int()
    _check(
        _libc.name_to_handle_at(
            directory_fd, name, ctypes.byref(handle), ctypes.byref(mount_id),
            0 if name else _AT_EMPTY_PATH,
        )
    )
    whole = memoryview(handle).cast("B")
    return _TYPE.pack(handle.handle_type) + bytes(
        whole[_HEADER_BYTES : _HEADER_BYTES + handle.handle_bytes]
    )


def open_by_handle(mount_fd: int, handle: bytes, flags: int) -> int:
    """A descriptor of the inode; ESTALE if there is none (any more)."""
    opaque = handle[_TYPE.size :]
    structure = _FileHandle(handle_bytes=len(opaque), handle_type=_TYPE.unpack_from(handle)[0])
    ctypes.memmove(ctypes.addressof(structure) + _HEADER_BYTES, opaque, len(opaque))
    return _check(
        _libc.open_by_handle_at(mount_fd, ctypes.byref(structure), flags | os.O_CLOEXEC)
    )


def renameat2(
    directory_fd: int, name: bytes, new_directory_fd: int, new_name: bytes, flags: int
) -> None:
    _check(_libc.renameat2(directory_fd, name, new_directory_fd, new_name, flags))


def link_descriptor(fd: int, directory_fd: int, name: bytes) -> None:
    """A new name for the inode behind *fd*, also if that is a symbolic link."""
    _check(_libc.linkat(fd, b"", directory_fd, name, _AT_EMPTY_PATH))


def chown_descriptor(fd: int, uid: int | None, gid: int | None) -> None:
    """Also for an ``O_PATH`` descriptor, and not following a symbolic link."""
    _check(
        _libc.fchownat(
            fd, b"", ctypes.c_uint(-1 if uid is None else uid),
            ctypes.c_uint(-1 if gid is None else gid), _AT_EMPTY_PATH,
        )
    )


def set_times(path: bytes, atime_ns: int | None, mtime_ns: int | None) -> None:
    """``None`` leaves that time alone."""
    times = (_Timespec * 2)(*(_timespec(ns) for ns in (atime_ns, mtime_ns)))
    _check(_libc.utimensat(_AT_FDCWD, path, times, 0))


def file_system_type(fd: int) -> int:
    """``f_type`` of statfs(2), which ``os.fstatvfs`` leaves out."""
    buffer = ctypes.create_string_buffer(256)
    _check(_libc.fstatfs(fd, buffer))
    return ctypes.c_long.from_buffer(buffer).value


def _timespec(ns: int | None) -> _Timespec:
    if ns is None:
        return _Timespec(0, _UTIME_OMIT)
    return _Timespec(*divmod(ns, 1_000_000_000))


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
