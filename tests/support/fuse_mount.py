"""A FUSE session in the process of the test, without a keeper process."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import trio

from filer.fuse_connection import FuseConnection, Handover, remove_mounts
from filer.vfs.session import FuseSession, KeptMount
from filer.vfs.shim import pyfuse3


def handed_over(connection: FuseConnection, predecessors: int = 0) -> KeptMount:
    """What a keeper of *connection* would hand to a server in its own process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.send(Handover(connection.mount_id, predecessors, connection.init_request).pack())
    # The session closes its descriptor; the connection keeps its own.
    duplicate = os.dup(connection.fd)
    mount = KeptMount(duplicate, theirs.detach())
    ours.close()
    return mount


@contextlib.contextmanager
def mounted(path: Path) -> Iterator[FuseConnection]:
    """A mount at *path*.  However the test ends, nobody is left hanging on it."""
    path.mkdir(exist_ok=True)
    connection = FuseConnection(str(path))
    connection.raise_read_ahead()
    try:
        yield connection
    finally:
        remove_mounts(str(path))


_T = TypeVar("_T")


async def in_thread(function: Callable[..., _T], *args: object) -> _T:
    """Use the mount.  A test that fails does not wait for it."""
    return await trio.to_thread.run_sync(function, *args, abandon_on_cancel=True)


@dataclass
class Served:
    path: Path
    connection: FuseConnection
    session: FuseSession


@contextlib.asynccontextmanager
async def served(path: Path, operations: pyfuse3.Operations) -> AsyncIterator[Served]:
    """*operations*, mounted at *path* and answering.

    Use the mount by ``in_thread`` or from other processes, never on the event loop.
    """
    # Not pytest's timeout: that would leave the mount, and everybody who looks at it hanging.
    with mounted(path) as connection, trio.fail_after(25):
        session = FuseSession(operations, handed_over(connection))
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(session.run)
                yield Served(path, connection, session)
                nursery.cancel_scope.cancel()
        finally:
            session.close()
