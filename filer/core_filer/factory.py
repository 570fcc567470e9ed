"""From a core filer's URL to the running core filer: the one place that knows all kinds."""

from __future__ import annotations

import errno
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from urllib.parse import unquote_to_bytes, urlsplit

import trio

from filer.core_filer._libnfs import lib
from filer.core_filer.backoff import backoff_s
from filer.core_filer.base import CoreFiler, Handle
from filer.core_filer.directory import DirectoryCoreFiler
from filer.core_filer.nfs import NfsCoreFiler
from filer.core_filer.nfs3 import FileSystemLimits
from filer.core_filer.nfs_mount import Mounted, Mounter, NfsUrl
from filer.core_filer.observed import report_reachable
from filer.core_filer.rpc_connection import Limits
from filer.core_filer.rpc_pool import Pool
from filer.errors import Misconfigured, Refused, TryAgain

_LIMITS = Limits()
PATIENCE_S = 5.0
"""For how long a NAS that we know from before is asked for its root."""


@dataclass(frozen=True, slots=True)
class LastKnown:
    """What a mount told that is needed to go on without asking for it again."""

    root: Handle
    nfs_port: int
    limits: FileSystemLimits


def open_core_filer(
    url: str, *,
    random: Random,
    connections: int = 4,
    wall_clock: Callable[[], int] = time.time_ns,
    machine_name: str = "filer",
    limits: Limits = _LIMITS,
    connect_timeout_s: float = float("inf"),
    waiting: Callable[[str], None] = lambda reason: None,
    last_known: LastKnown | None = None,
    remember: Callable[[LastKnown], None] = lambda known: None,
) -> AbstractAsyncContextManager[CoreFiler]:
    """``nfs://host[:port]/export[/subdir][?mountport=N]`` or ``file:///path``.

    A NAS that does not answer is asked again for *connect_timeout_s*, and *waiting* is told why
    after each failure.  *wall_clock* returns nanoseconds since 1970; *machine_name* is what the
    NAS sees in our credentials.  With *last_known*, from *remember* of an earlier run, a NAS that
    does not answer within a few seconds is waited for by its requests, not by the opening.

    Raises: Misconfigured if the URL, the NAS or the file system says no; TryAgain after
    *connect_timeout_s*.
    """
    scheme = urlsplit(url).scheme
    if scheme == "file":
        return _open_directory(url, random)
    if scheme == "nfs":
        opener = _NfsOpener(url, random, connections, wall_clock, machine_name, limits)
        return opener.open(connect_timeout_s, waiting, last_known, remember)
    raise Misconfigured(
        f"core filer {url}: unknown kind",
        "nfs://host[:port]/export[/subdir] or file:///path",
    )


@asynccontextmanager
async def _open_directory(url: str, random: Random) -> AsyncIterator[CoreFiler]:
    parts = urlsplit(url)
    if parts.netloc or not parts.path:
        raise Misconfigured(f"core filer {url}: not a local path", "file:///absolute/path")
    path = unquote_to_bytes(parts.path).decode(errors="surrogateescape")
    core = DirectoryCoreFiler(Path(path), random=random)
    try:
        yield core
    finally:
        core.close()


class _NfsOpener:
    def __init__(
        self, url: str, random: Random, connections: int, wall_clock: Callable[[], int],
        machine_name: str, limits: Limits,
    ) -> None:
        self._url = NfsUrl.parse(url)
        self._shown = url
        self._random = random
        self._connections = connections
        self._wall_clock = wall_clock
        self._machine_name = machine_name
        self._limits = limits
        self._last_failure = "no answer"

    @asynccontextmanager
    async def open(
        self, connect_timeout_s: float, waiting: Callable[[str], None],
        last_known: LastKnown | None, remember: Callable[[LastKnown], None],
    ) -> AsyncIterator[CoreFiler]:
        try:
            async with trio.open_nursery() as nursery:
                core = None
                with trio.move_on_after(connect_timeout_s if last_known is None else PATIENCE_S):
                    mounted = await self._mount(waiting)
                    pool = self._pool(mounted.nfs_port)
                    nursery.start_soon(pool.run)
                    await pool.wait_up()
                    core = await self._walk(pool, mounted)
                    remember(LastKnown(core.root, mounted.nfs_port, mounted.limits))
                if core is None and last_known is not None:
                    pool = self._pool(last_known.nfs_port)
                    nursery.start_soon(pool.run)
                    core = self._core(pool, last_known.limits, last_known.root)
                if core is None:
                    raise TryAgain(f"core filer {self._shown}: {self._last_failure}")
                yield core
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            # An error of the caller's block, or of ours, must arrive as itself.
            if len(group.exceptions) == 1:
                raise group.exceptions[0] from None
            raise

    def _pool(self, nfs_port: int) -> Pool:
        return Pool(
            self._url.host, nfs_port, lib.rpc_nfs3_null_async,
            connections=self._connections, machine_name=self._machine_name,
            random=self._random, limits=self._limits,
        )

    async def _mount(self, waiting: Callable[[str], None]) -> Mounted:
        report_reachable(False)
        mounter = Mounter(self._url, machine_name=self._machine_name, limits=self._limits)
        failures = 0
        while True:
            try:
                return await mounter.mount()
            except TryAgain as error:
                failures += 1
                self._last_failure = str(error)
                waiting(self._last_failure)
            await trio.sleep(backoff_s(failures, self._random))

    async def _walk(self, pool: Pool, mounted: Mounted) -> NfsCoreFiler:
        """From what the NAS mounts down to the directory that the URL names."""
        core = self._core(pool, mounted.limits, mounted.handle)
        for name in mounted.names:
            try:
                found = await core.lookup(core.root, name)
                if not found.attributes.is_directory:
                    raise Refused(errno.ENOTDIR)
            except Refused as error:
                shown = name.decode(errors="backslashreplace")
                raise Misconfigured(
                    f"core filer {self._shown}: {shown}: {error}", "name an existing directory"
                ) from error
            core = self._core(pool, mounted.limits, found.handle)
        return core

    def _core(self, pool: Pool, limits: FileSystemLimits, root: Handle) -> NfsCoreFiler:
        return NfsCoreFiler(
            pool, root, limits, random=self._random, wall_clock=self._wall_clock
        )
