"""Unix sockets at paths of any length, made visible only when they are ready."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio


@contextmanager
def _short(directory: Path) -> Iterator[str]:
    """*directory* under a name that fits: ``sun_path`` has 108 bytes (unix(7))."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def listen(path: Path) -> trio.SocketListener:
    """A listening socket at *path*, mode 0600 from its first moment; replaces what was there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Bound beside its place and renamed over it: nobody connects before the mode is right,
        # and the socket that a killed process left behind goes away in the same step.
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        fresh.unlink(missing_ok=True)
        with _short(path.parent) as directory:
            sock.bind(f"{directory}/{fresh.name}")
        os.chmod(fresh, 0o600)
        sock.listen(64)
        os.rename(fresh, path)
        sock.setblocking(False)
        return trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    except BaseException:
        sock.close()
        raise


def remove(path: Path, st_ino: int) -> None:
    """Remove the socket at *path* unless a successor has already put its own there."""
    try:
        if path.stat().st_ino == st_ino:
            path.unlink()
    except FileNotFoundError:
        pass


async def connect(path: Path) -> trio.SocketStream:
    """Raises: OSError: nobody listens at *path*."""
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    try:
        with _short(path.parent) as directory:
            await sock.connect(f"{directory}/{path.name}")
        return trio.SocketStream(sock)
    except BaseException:
        sock.close()
        raise


def peer_uid(stream: trio.SocketStream) -> int:
    """The user at the other end, as the kernel saw it when it connected (SO_PEERCRED)."""
    size = struct.calcsize("3i")
    _pid, uid, _gid = struct.unpack(
        "3i", stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    )
    return int(uid)
