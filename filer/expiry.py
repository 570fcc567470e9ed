"""The end of scratch files: what was not written to for the time to live is removed.

Only volumes whose policy never flushes have it: their bytes exist in the write-behind log alone,
so removing the file is what gives the log its space back.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog
import trio

from filer.errors import FilerError
from filer.ids import InodeId
from filer.namespace.service import Namespace
from filer.vfs.kernel import KernelCaches
from filer.write_behind.service import WriteBehind

log = structlog.get_logger(__name__)

_LOOK_EVERY_S_MAX = 60.0


class ScratchExpiry:
    def __init__(
        self, namespace: Namespace, write_behind: WriteBehind, kernel: KernelCaches, *,
        time_to_live_s: float, wall_clock_ns: Callable[[], int],
    ) -> None:
        self._namespace = namespace
        self._write_behind = write_behind
        self._kernel = kernel
        self._time_to_live_s = time_to_live_s
        self._wall_clock_ns = wall_clock_ns

    async def run(self) -> None:
        """Look from time to time, for ever."""
        while True:
            await trio.sleep(min(self._time_to_live_s / 4, _LOOK_EVERY_S_MAX))
            await self.remove_expired()

    async def remove_expired(self) -> int:
        """Remove every file last written to longer ago than its time to live; their number."""
        limit_ns = self._wall_clock_ns() - int(self._time_to_live_s * 1e9)
        removed = 0
        for inode_id in self._write_behind.dirty_inodes():
            dirty = self._write_behind.dirty(inode_id)
            if dirty is None or dirty.mtime_ns > limit_ns:
                continue
            try:
                await self._remove(inode_id)
            except FilerError as exc:
                log.warning("a scratch file could not be removed", inode=inode_id,
                            reason=str(exc))
            else:
                removed += 1
        return removed

    async def _remove(self, inode_id: InodeId) -> None:
        table = self._namespace.table
        inode = table.find(inode_id)
        parent = None if inode is None else table.find(inode.parent)
        if inode is None or parent is None or inode.is_orphan:
            if inode is None:
                await self._write_behind.discard(inode_id)
            return  # an orphan goes when the kernel forgets it
        if not inode.name or await self._namespace.lookup(parent, inode.name) is not inode:
            return  # its name is not known at the moment; some lookup will show it again
        await self._namespace.unlink(parent, inode.name, False)
        self._kernel.name_changed(parent.id, inode.name)
