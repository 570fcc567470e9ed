"""From an ``nfs://`` URL to the file handle of the directory it names.

Owns the URL's grammar, the portmapper (RFC 1833) and the MOUNT protocol (RFC 1813, appendix I).
One short-lived connection for each question.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote_to_bytes, urlsplit

import trio

from filer.core_filer._libnfs import ffi, lib
from filer.core_filer.base import Handle
from filer.core_filer.nfs3 import FileSystemLimits, NfsError, fsinfo
from filer.core_filer.rpc_connection import Connection, Limits, Request, RpcRejected
from filer.errors import Misconfigured, TryAgain

_T = TypeVar("_T")

_PORTMAP_PORT = 111
_NFS_PORT = 2049
_MOUNT_PROGRAM, _NFS_PROGRAM, _VERSION_3, _TCP = 100005, 100003, 3, 6

_MNT3_OK = 0
_MNT3_REFUSED = {1: "not permitted", 2: "no such directory", 13: "access denied",
                 20: "not a directory", 22: "invalid path", 63: "name too long"}

_GRAMMAR = "nfs://host[:port]/export[/subdir][?mountport=N]"


@dataclass(frozen=True, slots=True)
class NfsUrl:
    host: str
    port: int | None
    mount_port: int | None
    path: bytes

    @classmethod
    def parse(cls, url: str) -> NfsUrl:
        try:
            parts = urlsplit(url)
            query = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
            mount_port = query.pop("mountport", None)
            if query or parts.fragment or parts.username or not parts.hostname:
                raise ValueError
            port = parts.port
            number = int(mount_port) if mount_port is not None else None
            if port == 0 or (number is not None and not 0 < number < 65536):
                raise ValueError
        except ValueError as error:
            raise Misconfigured(f"core filer {url}: not an NFS URL", _GRAMMAR) from error
        path = unquote_to_bytes(parts.path).rstrip(b"/") or b"/"
        return cls(parts.hostname, port, number, path)


@dataclass(frozen=True, slots=True)
class Mounted:
    handle: Handle
    """Of the longest leading part of the path that the NAS mounts."""
    names: tuple[bytes, ...]
    """The rest of the path, to be looked up from there."""
    nfs_port: int
    limits: FileSystemLimits


class Mounter:
    """Raises TryAgain while the NAS does not answer, Misconfigured if it answers no."""

    def __init__(
        self, url: NfsUrl, *, machine_name: str, limits: Limits,
        portmap_port: int = _PORTMAP_PORT,
    ) -> None:
        self._url, self._machine_name, self._limits = url, machine_name, limits
        self._portmap_port = portmap_port
        self._failures = 0

    async def mount(self) -> Mounted:
        mount_port = self._url.mount_port or await self._registered_port(_MOUNT_PROGRAM)
        if mount_port == 0:
            raise TryAgain(f"{self._url.host} has no MOUNT service registered")
        # Whether the export ends before the path does, only the NAS knows.
        path, first_status = self._url.path, 0
        names: list[bytes] = []
        while True:
            status, handle = await self._mnt(mount_port, path)
            if status == _MNT3_OK:
                # Asked here and not on the volume's connections, to find out now if the NAS
                # mounts but does not serve.
                nfs_port = await self._nfs_port()
                limits = await self._ask(nfs_port, lib.rpc_nfs3_null_async, fsinfo(handle))
                return Mounted(handle, tuple(reversed(names)), nfs_port, limits)
            if status not in _MNT3_REFUSED:
                raise TryAgain(f"{self._url.host}: MOUNT answers with error {status}")
            first_status = first_status or status
            path, _, name = path.rpartition(b"/")
            if not name:
                raise self._refusal(first_status)
            names.append(name)
            path = path or b"/"

    async def _nfs_port(self) -> int:
        if self._url.port is not None:
            return self._url.port
        if self._url.mount_port is not None:
            return _NFS_PORT
        return await self._registered_port(_NFS_PROGRAM) or _NFS_PORT

    async def _registered_port(self, program: int) -> int:
        """0 if it is not registered."""
        request = Request(
            _getport, (program, _VERSION_3, _TCP),
            lambda data: int(ffi.cast("uint32_t *", data)[0]),
        )
        try:
            return await self._ask(self._portmap_port, lib.rpc_pmap2_null_async, request)
        except TryAgain as error:
            raise TryAgain(f"portmapper: {error} (?mountport= does without it)") from error

    async def _mnt(self, port: int, path: bytes) -> tuple[int, Handle]:
        buffer = ffi.new("char[]", path)
        request = Request(lib.rpc_mount3_mnt_async, (buffer,), _decode_mount)
        return await self._ask(port, lib.rpc_mount3_null_async, request)

    async def _ask(
        self, port: int, null: Callable[..., int], request: Request[_T]
    ) -> _T:
        connection = Connection(null, machine_name=self._machine_name, limits=self._limits)
        async with trio.open_nursery() as nursery:
            # Of several addresses of the host the next one after a failure.
            nursery.start_soon(connection.run, self._url.host, port, self._failures)
            try:
                await connection.wait_up()
                result = await connection.call(request)
            except (TryAgain, RpcRejected, NfsError) as error:
                failure = TryAgain(str(error))
            else:
                connection.lose("done")
                return result
            connection.lose("failed")
        self._failures += 1
        raise failure

    def _refusal(self, status: int) -> Misconfigured:
        path = self._url.path.decode(errors="backslashreplace")
        hint = (
            "allow this host in the NAS's export rules, without squashing root"
            if status in (1, 13) else f"name an export of {self._url.host} or a directory in one"
        )
        return Misconfigured(
            f"core filer nfs://{self._url.host}{path}: {_MNT3_REFUSED[status]}", hint
        )


def _getport(
    context: Any, callback: Any, program: int, version: int, protocol: int, private_data: Any
) -> int:
    """`Request` has the callback first, this function of libnfs has it last."""
    result: int = lib.rpc_pmap2_getport_async(
        context, program, version, protocol, callback, private_data
    )
    return result


def _decode_mount(data: Any) -> tuple[int, Handle]:
    reply = ffi.cast("mountres3 *", data)
    if reply.fhs_status != _MNT3_OK:
        return reply.fhs_status, Handle(b"")
    fh = reply.mountres3_u.mountinfo.fhandle
    return _MNT3_OK, Handle(ffi.buffer(fh.fhandle3_val, fh.fhandle3_len)[:])
