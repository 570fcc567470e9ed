"""NFSv3 calls and replies (RFC 1813) as libnfs structures: the only file that knows both.

Owns encoding and decoding.  No I/O and no policy: each function returns a `Request` whose
decoder gives values of ``base.py`` or raises `NfsError`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from filer.core_filer._libnfs import ffi, lib
from filer.core_filer.base import (
    Attributes,
    CommitResult,
    CoreVersion,
    DirectoryEntry,
    FileSystemStatistics,
    Handle,
    ReadResult,
    SetAttributes,
    WriteResult,
)
from filer.core_filer.repeats import Wanted
from filer.core_filer.rpc_connection import Request
from filer.errors import FilerError

_T = TypeVar("_T")

NFS3ERR_NOENT = 2
NFS3ERR_STALE = 70
NFS3ERR_BAD_COOKIE = 10003
NFS3ERR_NOTSUPP = 10004
NFS3ERR_TOOSMALL = 10005
NFS3ERR_JUKEBOX = 10008

_GUARDED = 1
_UNSTABLE, _FILE_SYNC = 0, 2
_DONT_CHANGE, _SET_TO_CLIENT_TIME = 0, 2

_ERRNOS = {
    63: errno.ENAMETOOLONG, 66: errno.ENOTEMPTY, 69: errno.EDQUOT, NFS3ERR_STALE: errno.ESTALE,
    71: errno.EREMOTE, 10001: errno.ESTALE, 10002: errno.EIO, NFS3ERR_BAD_COOKIE: errno.EIO,
    NFS3ERR_NOTSUPP: errno.EOPNOTSUPP, NFS3ERR_TOOSMALL: errno.EINVAL, 10006: errno.EIO,
    10007: errno.EINVAL, NFS3ERR_JUKEBOX: errno.EAGAIN,
}
"""nfsstat3 where it is not the errno of the same number."""

_TYPES = {
    1: stat.S_IFREG, 2: stat.S_IFDIR, 3: stat.S_IFBLK, 4: stat.S_IFCHR, 5: stat.S_IFLNK,
    6: stat.S_IFSOCK, 7: stat.S_IFIFO,
}
_TYPE_NUMBERS = {mode: number for number, mode in _TYPES.items()}


class NfsError(FilerError):
    """The server answered with this nfsstat3."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"nfsstat3 {status}")

    @property
    def errno(self) -> int:
        return _ERRNOS.get(self.status, self.status)


@dataclass(frozen=True, slots=True)
class Made:
    """Reply of CREATE, MKDIR, SYMLINK and MKNOD; a server may leave out any of it."""

    handle: Handle | None
    attributes: Attributes | None
    directory: Attributes | None


@dataclass(frozen=True, slots=True)
class Looked:
    handle: Handle
    attributes: Attributes | None
    directory: Attributes | None


@dataclass(frozen=True, slots=True)
class DirectoryBatch:
    entries: list[DirectoryEntry]
    cookie: int
    """Where the next batch starts."""
    verifier: bytes
    eof: bool


@dataclass(frozen=True, slots=True)
class FileSystemLimits:
    """FSINFO, as far as it matters here."""

    read_bytes_max: int
    write_bytes_max: int
    time_granularity_ns: int


# --- Calls


def getattr_(handle: Handle) -> Request[Attributes]:
    arguments, keep = _new("GETATTR"), _Buffers()
    keep.set_handle(arguments.object, handle)
    return _request(lib.rpc_nfs3_getattr_async, arguments, keep, _decode_getattr)


def setattr_(handle: Handle, changes: SetAttributes) -> Request[Attributes | None]:
    arguments, keep = _new("SETATTR"), _Buffers()
    keep.set_handle(arguments.object, handle)
    _set_attributes(arguments.new_attributes, changes)
    return _request(lib.rpc_nfs3_setattr_async, arguments, keep, _decode_setattr)


def lookup(directory: Handle, name: bytes) -> Request[Looked]:
    arguments, keep = _new("LOOKUP"), _Buffers()
    keep.set_name(arguments.what, directory, name)
    return _request(lib.rpc_nfs3_lookup_async, arguments, keep, _decode_lookup)


def readlink(handle: Handle) -> Request[bytes]:
    arguments, keep = _new("READLINK"), _Buffers()
    keep.set_handle(arguments.symlink, handle)
    return _request(lib.rpc_nfs3_readlink_async, arguments, keep, _decode_readlink)


def read(handle: Handle, start: int, end: int) -> Request[ReadResult]:
    arguments, keep = _new("READ"), _Buffers()
    keep.set_handle(arguments.file, handle)
    arguments.offset, arguments.count = start, end - start
    return _request(lib.rpc_nfs3_read_async, arguments, keep, _decode_read, end - start)


def write(
    handle: Handle, start: int, data: bytes | memoryview, *, stable: bool
) -> Request[WriteResult]:
    arguments, keep = _new("WRITE"), _Buffers()
    keep.set_handle(arguments.file, handle)
    arguments.offset, arguments.count = start, len(data)
    arguments.stable = _FILE_SYNC if stable else _UNSTABLE
    arguments.data.data_val = keep.pointer(data)
    arguments.data.data_len = len(data)
    return _request(lib.rpc_nfs3_write_async, arguments, keep, _decode_write, len(data))


def commit(handle: Handle) -> Request[CommitResult]:
    """Of the whole file."""
    arguments, keep = _new("COMMIT"), _Buffers()
    keep.set_handle(arguments.file, handle)
    return _request(lib.rpc_nfs3_commit_async, arguments, keep, _decode_commit)


def create(directory: Handle, name: bytes, wanted: Wanted, atime_ns: int) -> Request[Made]:
    arguments, keep = _new("CREATE"), _Buffers()
    keep.set_name(arguments.where, directory, name)
    arguments.how.mode = _GUARDED
    attributes = arguments.how.createhow3_u.g_obj_attributes
    _set_attributes(attributes, _initial(wanted, atime_ns=atime_ns))
    return _request(lib.rpc_nfs3_create_async, arguments, keep, _decode_create)


def mkdir(directory: Handle, name: bytes, wanted: Wanted) -> Request[Made]:
    arguments, keep = _new("MKDIR"), _Buffers()
    keep.set_name(arguments.where, directory, name)
    _set_attributes(arguments.attributes, _initial(wanted))
    return _request(lib.rpc_nfs3_mkdir_async, arguments, keep, _decode_mkdir)


def symlink(directory: Handle, name: bytes, wanted: Wanted) -> Request[Made]:
    arguments, keep = _new("SYMLINK"), _Buffers()
    keep.set_name(arguments.where, directory, name)
    _set_attributes(arguments.symlink.symlink_attributes, _initial(wanted))
    arguments.symlink.symlink_data = keep.string(wanted.target)
    return _request(lib.rpc_nfs3_symlink_async, arguments, keep, _decode_symlink)


def mknod(directory: Handle, name: bytes, wanted: Wanted) -> Request[Made]:
    arguments, keep = _new("MKNOD"), _Buffers()
    keep.set_name(arguments.where, directory, name)
    what = arguments.what
    what.type = _TYPE_NUMBERS[wanted.type]
    if wanted.type in (stat.S_IFCHR, stat.S_IFBLK):
        device = what.mknoddata3_u.chr_device
        _set_attributes(device.dev_attributes, _initial(wanted))
        device.spec.specdata1 = os.major(wanted.rdev)
        device.spec.specdata2 = os.minor(wanted.rdev)
    else:
        _set_attributes(what.mknoddata3_u.pipe_attributes, _initial(wanted))
    return _request(lib.rpc_nfs3_mknod_async, arguments, keep, _decode_mknod)


def remove(directory: Handle, name: bytes) -> Request[Attributes | None]:
    arguments, keep = _new("REMOVE"), _Buffers()
    keep.set_name(arguments.object, directory, name)
    return _request(lib.rpc_nfs3_remove_async, arguments, keep, _decode_remove)


def rmdir(directory: Handle, name: bytes) -> Request[Attributes | None]:
    arguments, keep = _new("RMDIR"), _Buffers()
    keep.set_name(arguments.object, directory, name)
    return _request(lib.rpc_nfs3_rmdir_async, arguments, keep, _decode_rmdir)


def rename(
    directory: Handle, name: bytes, new_directory: Handle, new_name: bytes
) -> Request[tuple[Attributes | None, Attributes | None]]:
    # "from" is a Python keyword, hence getattr.
    arguments, keep = _new("RENAME"), _Buffers()
    keep.set_name(getattr(arguments, "from"), directory, name)
    keep.set_name(arguments.to, new_directory, new_name)
    return _request(lib.rpc_nfs3_rename_async, arguments, keep, _decode_rename)


def link(
    handle: Handle, directory: Handle, name: bytes
) -> Request[tuple[Attributes | None, Attributes | None]]:
    """Reply: attributes of the inode and of the directory."""
    arguments, keep = _new("LINK"), _Buffers()
    keep.set_handle(arguments.file, handle)
    keep.set_name(arguments.link, directory, name)
    return _request(lib.rpc_nfs3_link_async, arguments, keep, _decode_link)


def readdirplus(
    directory: Handle, cookie: int, verifier: bytes, *, names_bytes: int, reply_bytes: int
) -> Request[DirectoryBatch]:
    arguments, keep = _new("READDIRPLUS"), _Buffers()
    keep.set_handle(arguments.dir, directory)
    arguments.cookie = cookie
    ffi.memmove(arguments.cookieverf, verifier, 8)
    arguments.dircount, arguments.maxcount = names_bytes, reply_bytes
    return _request(
        lib.rpc_nfs3_readdirplus_async, arguments, keep, _decode_readdirplus, reply_bytes
    )


def readdir(
    directory: Handle, cookie: int, verifier: bytes, *, reply_bytes: int
) -> Request[DirectoryBatch]:
    arguments, keep = _new("READDIR"), _Buffers()
    keep.set_handle(arguments.dir, directory)
    arguments.cookie = cookie
    ffi.memmove(arguments.cookieverf, verifier, 8)
    arguments.count = reply_bytes
    return _request(lib.rpc_nfs3_readdir_async, arguments, keep, _decode_readdir, reply_bytes)


def fsstat(root: Handle) -> Request[FileSystemStatistics]:
    arguments, keep = _new("FSSTAT"), _Buffers()
    keep.set_handle(arguments.fsroot, root)
    return _request(lib.rpc_nfs3_fsstat_async, arguments, keep, _decode_fsstat)


def fsinfo(root: Handle) -> Request[FileSystemLimits]:
    arguments, keep = _new("FSINFO"), _Buffers()
    keep.set_handle(arguments.fsroot, root)
    return _request(lib.rpc_nfs3_fsinfo_async, arguments, keep, _decode_fsinfo)


# --- Encoding


class _Buffers:
    """Memory that a call's arguments point into; libnfs copies it when the call is queued."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def pointer(self, data: bytes | memoryview) -> Any:
        buffer = ffi.from_buffer("char[]", data)
        self._kept.append(buffer)
        return buffer

    def string(self, text: bytes) -> Any:
        """Zero-terminated, as libnfs wants names."""
        buffer = ffi.new("char[]", text)
        self._kept.append(buffer)
        return buffer

    def set_handle(self, target: Any, handle: Handle) -> None:
        target.data.data_len = len(handle)
        target.data.data_val = self.pointer(handle)

    def set_name(self, target: Any, directory: Handle, name: bytes) -> None:
        self.set_handle(target.dir, directory)
        target.name = self.string(name)


def _new(procedure: str) -> Any:
    return ffi.new(_ARGUMENT_TYPES[procedure])


_ARGUMENT_TYPES = {
    name: ffi.typeof(f"struct {name}3args *")
    for name in (
        "GETATTR", "SETATTR", "LOOKUP", "READLINK", "READ", "WRITE", "COMMIT", "CREATE", "MKDIR",
        "SYMLINK", "MKNOD", "REMOVE", "RMDIR", "RENAME", "LINK", "READDIR", "READDIRPLUS",
        "FSSTAT", "FSINFO",
    )
}


def _request(
    procedure: Callable[..., int], arguments: Any, keep: _Buffers,
    decode: Callable[[Any], _T], payload_bytes: int = 0,
) -> Request[_T]:
    return Request(procedure, (arguments,), decode, payload_bytes, keep)


def _initial(wanted: Wanted, *, atime_ns: int | None = None) -> SetAttributes:
    # The mode of a symbolic link means nothing, and some servers refuse to be told one.
    mode = None if wanted.type == stat.S_IFLNK else wanted.permissions
    return SetAttributes(mode=mode, uid=wanted.uid, gid=wanted.gid, atime_ns=atime_ns)


def _set_attributes(target: Any, changes: SetAttributes) -> None:
    """*target* is zeroed, which means "leave alone" throughout."""
    if changes.mode is not None:
        target.mode.set_it, target.mode.set_mode3_u.mode = 1, stat.S_IMODE(changes.mode)
    if changes.uid is not None:
        target.uid.set_it, target.uid.set_uid3_u.uid = 1, changes.uid
    if changes.gid is not None:
        target.gid.set_it, target.gid.set_gid3_u.gid = 1, changes.gid
    if changes.size is not None:
        target.size.set_it, target.size.set_size3_u.size = 1, changes.size
    if changes.atime_ns is not None:
        target.atime.set_it = _SET_TO_CLIENT_TIME
        _set_time(target.atime.set_atime_u.atime, changes.atime_ns)
    if changes.mtime_ns is not None:
        target.mtime.set_it = _SET_TO_CLIENT_TIME
        _set_time(target.mtime.set_mtime_u.mtime, changes.mtime_ns)


def _set_time(target: Any, ns: int) -> None:
    """The protocol has 32 unsigned bits for seconds: 1970 to 2106."""
    seconds, target.nseconds = divmod(ns, 1_000_000_000)
    target.seconds = min(max(seconds, 0), 0xFFFFFFFF)


# --- Decoding


def _reply(kind: Any, union: str) -> Callable[[Any], Any]:
    """From ``void *`` to the successful branch of the reply, or NfsError."""
    pointer = ffi.typeof(f"{kind}3res *")

    def successful(data: Any) -> Any:
        reply = ffi.cast(pointer, data)
        if reply.status != 0:
            raise NfsError(reply.status)
        return getattr(reply, union).resok

    return successful


_ok = {name: _reply(name, f"{name}3res_u") for name in _ARGUMENT_TYPES}


def _decode_getattr(data: Any) -> Attributes:
    return _attributes(_ok["GETATTR"](data).obj_attributes)


def _decode_setattr(data: Any) -> Attributes | None:
    return _post_op(_ok["SETATTR"](data).obj_wcc.after)


def _decode_lookup(data: Any) -> Looked:
    ok = _ok["LOOKUP"](data)
    return Looked(_handle(ok.object), _post_op(ok.obj_attributes), _post_op(ok.dir_attributes))


def _decode_readlink(data: Any) -> bytes:
    return bytes(ffi.string(_ok["READLINK"](data).data))


def _decode_read(data: Any) -> ReadResult:
    ok = _ok["READ"](data)
    # The one copy of the bytes: out of libnfs's receive buffer.
    content = ffi.buffer(ok.data.data_val, ok.data.data_len)[:] if ok.data.data_len else b""
    return ReadResult(content, bool(ok.eof), _post_op(ok.file_attributes))


def _decode_write(data: Any) -> WriteResult:
    ok = _ok["WRITE"](data)
    before = ok.file_wcc.before
    version = None
    if before.attributes_follow:
        w = before.pre_op_attr_u.attributes
        version = CoreVersion(_ns(w.mtime), _ns(w.ctime), w.size)
    return WriteResult(
        ok.count, _opaque8(ok.verf), ok.committed == _FILE_SYNC, version,
        _post_op(ok.file_wcc.after),
    )


def _decode_commit(data: Any) -> CommitResult:
    ok = _ok["COMMIT"](data)
    return CommitResult(_opaque8(ok.verf), _post_op(ok.file_wcc.after))


def _made(ok: Any) -> Made:
    handle = _handle(ok.obj.post_op_fh3_u.handle) if ok.obj.handle_follows else None
    return Made(handle, _post_op(ok.obj_attributes), _post_op(ok.dir_wcc.after))


def _decode_create(data: Any) -> Made:
    return _made(_ok["CREATE"](data))


def _decode_mkdir(data: Any) -> Made:
    return _made(_ok["MKDIR"](data))


def _decode_symlink(data: Any) -> Made:
    return _made(_ok["SYMLINK"](data))


def _decode_mknod(data: Any) -> Made:
    return _made(_ok["MKNOD"](data))


def _decode_remove(data: Any) -> Attributes | None:
    return _post_op(_ok["REMOVE"](data).dir_wcc.after)


def _decode_rmdir(data: Any) -> Attributes | None:
    return _post_op(_ok["RMDIR"](data).dir_wcc.after)


def _decode_rename(data: Any) -> tuple[Attributes | None, Attributes | None]:
    ok = _ok["RENAME"](data)
    return _post_op(ok.fromdir_wcc.after), _post_op(ok.todir_wcc.after)


def _decode_link(data: Any) -> tuple[Attributes | None, Attributes | None]:
    ok = _ok["LINK"](data)
    return _post_op(ok.file_attributes), _post_op(ok.linkdir_wcc.after)


def _chain(entry: Any) -> Iterator[Any]:
    while entry:
        yield entry
        entry = entry.nextentry


def _decode_readdirplus(data: Any) -> DirectoryBatch:
    ok = _ok["READDIRPLUS"](data)
    entries, cookie = [], 0
    for e in _chain(ok.reply.entries):
        cookie = e.cookie
        name = ffi.string(e.name)
        if name in (b".", b".."):
            continue
        handle = e.name_handle
        entries.append(
            DirectoryEntry(
                name, e.fileid,
                _handle(handle.post_op_fh3_u.handle) if handle.handle_follows else None,
                _post_op(e.name_attributes),
            )
        )
    return DirectoryBatch(entries, cookie, _opaque8(ok.cookieverf), bool(ok.reply.eof))


def _decode_readdir(data: Any) -> DirectoryBatch:
    ok = _ok["READDIR"](data)
    entries, cookie = [], 0
    for e in _chain(ok.reply.entries):
        cookie = e.cookie
        name = ffi.string(e.name)
        if name not in (b".", b".."):
            entries.append(DirectoryEntry(name, e.fileid, None, None))
    return DirectoryBatch(entries, cookie, _opaque8(ok.cookieverf), bool(ok.reply.eof))


def _decode_fsstat(data: Any) -> FileSystemStatistics:
    ok = _ok["FSSTAT"](data)
    return FileSystemStatistics(
        ok.tbytes, ok.fbytes, ok.abytes, ok.tfiles, ok.ffiles, ok.afiles
    )


def _decode_fsinfo(data: Any) -> FileSystemLimits:
    ok = _ok["FSINFO"](data)
    return FileSystemLimits(ok.rtmax, ok.wtmax, max(1, _ns(ok.time_delta)))


def _post_op(p: Any) -> Attributes | None:
    return _attributes(p.post_op_attr_u.attributes) if p.attributes_follow else None


def _attributes(a: Any) -> Attributes:
    rdev = a.rdev
    return Attributes(
        a.fileid, _TYPES[a.type] | (a.mode & 0o7777), a.nlink, a.uid, a.gid, a.size, a.used,
        os.makedev(rdev.specdata1, rdev.specdata2) if a.type in (3, 4) else 0,
        _ns(a.atime), _ns(a.mtime), _ns(a.ctime), a.fsid,
    )


def _ns(time: Any) -> int:
    return int(time.seconds * 1_000_000_000 + time.nseconds)


def _handle(fh: Any) -> Handle:
    return Handle(ffi.buffer(fh.data.data_val, fh.data.data_len)[:])


def _opaque8(array: Any) -> bytes:
    return bytes(ffi.buffer(array, 8)[:])
