"""One volume: constructs its components and joins them.  No policy and no protocol lives here.

Start order, each step resting on the one before:

1. core filer        the root handle
2. name store        inodes by id, as of the last run
3. page store        clean bytes on the SSD
4. write-behind log  replayed: dirty bytes, sizes and times that the core filer lacks
5. namespace, data   what clients see
6. flusher, reader   background work
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random, SystemRandom

import msgspec
import structlog
import trio

from filer import metrics
from filer.cache.pages import PageStore
from filer.cache.reader import CleanFile, Reader
from filer.cache.sequence import Sequences
from filer.core_filer.base import Attributes, CoreFiler
from filer.core_filer.factory import PATIENCE_S, LastKnown, open_core_filer
from filer.data import FileData
from filer.disk import LocalDisk
from filer.errors import FilerError, Misconfigured
from filer.expiry import ScratchExpiry
from filer.ids import ROOT_INODE, Epoch, InodeId, NodeId
from filer.leases.table import StandaloneLeases
from filer.namespace.inode import Inode
from filer.namespace.service import Namespace
from filer.namespace.store import NameStore
from filer.namespace.table import InodeTable
from filer.policies import Policy, WriteMode
from filer.settings import NodeSettings, VolumeSettings
from filer.vfs.kernel import KernelCaches
from filer.write_behind.service import WriteBehind

log = structlog.get_logger(__name__)

_LAG_INTERVAL_S = 0.1


class Volume:
    """The joined components; made by ``open_volume``."""

    settings: VolumeSettings
    policy: Policy
    core: CoreFiler
    store: NameStore
    pages: PageStore
    kernel: KernelCaches
    write_behind: WriteBehind
    reader: Reader
    data: FileData
    namespace: Namespace

    def refresh_gauges(self) -> None:
        dirty, pages = self.write_behind.statistics(), self.pages.statistics()
        metrics.DIRTY_BYTES.set(dirty.dirty_bytes)
        metrics.DIRTY_FILES.set(dirty.dirty_files)
        metrics.DIRTY_OLDEST_S.set(dirty.oldest_dirty_s or 0.0)
        metrics.CACHE_BYTES.set(pages.cached_bytes)
        metrics.CACHE_DEGRADED.set(1 if self.pages.degraded else 0)
        metrics.INODES.set(len(self.namespace.table))
        metrics.CORE_REACHABLE.set(1 if self.core.state().reachable else 0)


@asynccontextmanager
async def open_volume(
    node: NodeSettings, settings: VolumeSettings, kernel: KernelCaches, *,
    kernel_is_new: bool,
    random: Random | None = None,
    wall_clock_ns: Callable[[], int] = time.time_ns,
) -> AsyncIterator[Volume]:
    """Open *settings*' volume on *node*; its state is below ``cache_dir/<name>``.

    Raises: Misconfigured, Corrupt (a log that cannot be replayed), Fenced.
    """
    if settings.xattrs:
        raise Misconfigured(
            f"volumes.{settings.name}.xattrs: {settings.core} cannot hold extended attributes",
            "leave xattrs at false: NFSv3 has none")
    random = random or SystemRandom()
    directory = node.cache_dir / settings.name
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    volume = Volume()
    volume.settings, volume.policy, volume.kernel = settings, settings.effective_policy, kernel
    async with AsyncExitStack() as stack:
        volume.core = core = await stack.enter_async_context(open_core_filer(
            settings.core, connections=settings.connections, random=random,
            last_known=_last_known(directory / "core.json", settings.core),
            remember=partial(_remember, directory / "core.json", settings.core)))
        volume.store = store = NameStore(directory / "names")
        stack.callback(store.close)
        volume.pages = pages = await PageStore.open(
            directory / "pages", settings.cache, boot_id=_boot_id())
        stack.push_async_callback(_shielded, pages.close)
        volume.data = data = FileData(
            core, pages, volume.policy, kernel, wall_clock_ns=wall_clock_ns)
        data.write_behind = volume.write_behind = await WriteBehind.open(
            disk=LocalDisk(directory / "log"), core=core, settings=settings.write_behind,
            policy=volume.policy, epoch=_next_epoch(directory / "epoch"),
            node=NodeId(node.node), observer=data, wall_clock_ns=wall_clock_ns)
        stack.push_async_callback(_shielded, data.write_behind.close)
        table = InodeTable(
            store, core.root, await _root_attributes(core, store),
            inodes_in_memory_max=settings.cache.inodes_in_memory_max, random=random,
            changed=data.changed, overlay=data.overlay, is_dirty=data.is_dirty)
        stack.push_async_callback(_shielded, store.commit)
        # Everything that works in the background has ended before anything above is closed.
        background = await stack.enter_async_context(trio.open_nursery())
        stack.callback(background.cancel_scope.cancel)
        data.namespace = volume.namespace = namespace = Namespace(
            core, store, table, StandaloneLeases(),
            verify_s=volume.policy.verify_s,
            directory_entries_in_memory_max=settings.cache.directory_entries_in_memory_max,
            wall_clock_ns=wall_clock_ns, background=background, discard=data.discard)
        data.reader = volume.reader = Reader(
            core, pages, settings.read_ahead, resolve_next=_Successors(data).after)
        await background.start(store.run)
        await background.start(data.reader.run)
        await namespace.start(kernel_is_new=kernel_is_new)
        await background.start(data.write_behind.run)
        background.start_soon(_watch_loop_lag)
        if volume.policy.write_mode is WriteMode.NEVER_FLUSHED:
            expiry = ScratchExpiry(
                namespace, data.write_behind, kernel,
                time_to_live_s=settings.scratch_ttl_s, wall_clock_ns=wall_clock_ns)
            background.start_soon(expiry.run)
        yield volume


async def _shielded(close: Callable[[], Awaitable[None]]) -> None:
    with trio.CancelScope(shield=True):
        await close()


def _remember(path: Path, url: str, known: LastKnown) -> None:
    _replace_file(path, msgspec.json.encode({"url": url, "known": known}))


def _last_known(path: Path, url: str) -> LastKnown | None:
    """What the core filer at *url* told an earlier run, if there was one."""
    try:
        found = msgspec.json.decode(path.read_bytes())
        return msgspec.convert(found["known"], LastKnown) if found["url"] == url else None
    except (FileNotFoundError, ValueError, LookupError):
        return None


async def _root_attributes(core: CoreFiler, store: NameStore) -> Attributes:
    """The core filer's, or those it told last if it does not answer now."""
    record = store.inode(ROOT_INODE)
    patience_s = math.inf
    if record is not None and record.handle == core.root:
        patience_s = PATIENCE_S if core.state().reachable else 0.0
    with trio.move_on_after(patience_s):
        return await core.getattr(core.root)
    assert record is not None
    log.warning("core filer does not answer; starting with what is known")
    version = record.core
    return replace(
        record.attributes, mtime_ns=version.mtime_ns, ctime_ns=version.ctime_ns,
        size=version.size)


class _Successors:
    """Names the next files of a numbered sequence, for the read-ahead."""

    def __init__(self, data: FileData) -> None:
        self._data = data
        self._sequences = Sequences()

    async def after(self, inode_id: InodeId, count: int) -> list[CleanFile]:
        """Up to *count* files that will be read after *inode_id*; empty without confidence."""
        namespace = self._data.namespace
        inode = namespace.table.find(inode_id)
        parent = None if inode is None else namespace.table.find(inode.parent)
        if inode is None or parent is None or not inode.name:
            return []
        found: list[CleanFile] = []
        for name in self._sequences.on_read(parent.id, inode.name, count):
            try:
                successor: Inode | None = await namespace.lookup(parent, name)
            except FilerError:
                return found
            if successor is None:
                break
            if successor.attributes.is_regular and not self._data.is_dirty(successor.id):
                found.append(self._data.clean(successor))
        return found


async def _watch_loop_lag() -> None:
    due = trio.current_time()
    while True:
        due = max(due + _LAG_INTERVAL_S, trio.current_time())
        await trio.sleep_until(due)
        metrics.LOOP_LAG_S.observe(max(0.0, trio.current_time() - due))


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _next_epoch(path: Path) -> Epoch:
    """Every start of a volume server on this node is an epoch of its own."""
    epoch = 1 + (int(path.read_text()) if path.exists() else 0)
    _replace_file(path, str(epoch).encode())
    return Epoch(epoch)


def _replace_file(path: Path, content: bytes) -> None:
    """Atomically, and stable when it returns."""
    temporary = path.with_suffix(".new")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
