"""What the admin socket of one volume can do: status, top, flush, evict, explain, warm, metrics.

Owns the answers' contents.  The shapes are ``admin/reports.py``, the socket ``admin/server.py``.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from functools import partial
from typing import Any

import msgspec
import trio
from prometheus_client import generate_latest

from filer import metrics
from filer.admin.protocol import Progress
from filer.admin.reports import (
    EvictReport,
    Explanation,
    FlushError,
    FlushReport,
    TopSample,
    VolumeStatus,
    WarmFailure,
    WarmReport,
)
from filer.admin.server import Handler, Report
from filer.cache.pages import FileKey
from filer.errors import FilerError, Refused
from filer.ids import ROOT_INODE, InodeId
from filer.namespace.inode import NEVER, Inode
from filer.volume import Volume

_WARM_FILES_AT_ONCE = 64
"""Small files are bound by round trips: 64 of 256 KiB fill 1 Gb/s at 100 ms."""
_REPORT_EVERY_S = 0.1
_PAGE_BYTES = 1 << 20


class VolumeAdmin:
    def __init__(self, volume: Volume, mountpoint: str) -> None:
        self._volume = volume
        self._mountpoint = mountpoint

    def handlers(self) -> dict[str, Handler]:
        """The verbs, but ``stop``, which is the volume server's own."""
        return {
            "status": self.status, "top": self.top, "metrics": self.metrics,
            "explain": self.explain, "flush": self.flush, "evict": self.evict, "warm": self.warm,
        }

    # -- readers -----------------------------------------------------------------------------

    async def status(self, arguments: dict[str, Any], report: Report) -> dict[str, Any]:
        v = self._volume
        core, dirty, pages = v.core.state(), v.write_behind.statistics(), v.pages.statistics()
        delay = v.policy.write_back_s
        reasons = [r for r in (v.pages.degraded, v.store.degraded, dirty.degraded) if r]
        return plain(VolumeStatus(
            volume=v.settings.name, pid=os.getpid(), core=v.settings.core, policy=v.policy.name,
            mountpoint=self._mountpoint,
            core_reachable=core.reachable,
            core_unreachable_s=None if core.unreachable_since is None
            else trio.current_time() - core.unreachable_since,
            core_reason=core.reason, core_in_flight=core.in_flight,
            core_reconnects=core.reconnects,
            cache_bytes=pages.cached_bytes, cache_capacity_bytes=v.settings.cache.capacity_bytes,
            cache_degraded=bool(reasons), cache_reason="; ".join(reasons),
            corrupt_pages=pages.corrupt_pages,
            dirty_bytes=dirty.dirty_bytes,
            dirty_bytes_max=v.settings.write_behind.dirty_bytes_max,
            dirty_files=dirty.dirty_files, dirty_oldest_s=dirty.oldest_dirty_s,
            write_back_s=None if delay == float("inf") else delay,
            flush_errors=[
                FlushError(self._path_of(e.inode), errno.errorcode.get(e.errno, str(e.errno)))
                for e in v.write_behind.flush_errors()
            ],
            conflict_copies=dirty.conflicts,
            inodes_in_memory=len(v.namespace.table),
            internal_errors=int(sum(
                s.value for f in metrics.INTERNAL_ERRORS.collect() for s in f.samples
                if s.name.endswith("_total"))),
        ))

    async def top(self, arguments: dict[str, Any], report: Report) -> dict[str, Any]:
        v = self._volume
        core, dirty, pages = v.core.state(), v.write_behind.statistics(), v.pages.statistics()
        samples = _samples()
        client_bytes = _by_label(samples, "filer_client_bytes_total", "direction")
        core_bytes = _by_label(samples, "filer_core_bytes_total", "direction")
        return plain(TopSample(
            volume=v.settings.name, time_s=trio.current_time(),
            operations=_by_label(samples, "filer_upcalls_total", "operation"),
            operation_seconds=_by_label(
                samples, "filer_client_operation_seconds_sum", "operation", float),
            read_bytes=client_bytes.get("read", 0),
            written_bytes=client_bytes.get("write", 0),
            hits=_by_label(samples, "filer_cache_lookups_total", "layer", outcome="hit"),
            misses=_by_label(samples, "filer_cache_lookups_total", "layer", outcome="miss"),
            core_operations=sum(_by_label(
                samples, "filer_core_operation_seconds_count", "operation").values()),
            core_read_bytes=core_bytes.get("read", 0),
            core_written_bytes=core_bytes.get("write", 0),
            core_in_flight=core.in_flight,
            cache_bytes=pages.cached_bytes, cache_capacity_bytes=v.settings.cache.capacity_bytes,
            dirty_bytes=dirty.dirty_bytes, dirty_files=dirty.dirty_files,
            dirty_oldest_s=dirty.oldest_dirty_s,
        ))

    async def metrics(self, arguments: dict[str, Any], report: Report) -> dict[str, Any]:
        self._volume.refresh_gauges()
        return {"text": generate_latest(metrics.REGISTRY).decode()}

    async def explain(self, arguments: dict[str, Any], report: Report) -> dict[str, Any]:
        v = self._volume
        path = str(arguments.get("path", ""))
        explanation = partial(
            Explanation, path=path, policy=v.policy.name, policy_why=v.policy.why,
            write_mode=v.policy.write_mode.value, verify_s=v.policy.verify_s,
            write_back_s=None if v.policy.write_back_s == float("inf")
            else v.policy.write_back_s)
        inode = await self._find(path)
        if inode is None:
            return plain(explanation(kind="missing"))
        told = inode.attributes
        dirty = v.write_behind.dirty(inode.id)
        key = FileKey(inode.id, inode.data_version)
        failed = {e.inode: e for e in v.write_behind.flush_errors()}.get(inode.id)
        total = -(-told.size // _PAGE_BYTES) if told.is_regular else 0
        missing = len(v.pages.missing(key, 0, told.size)) if total else 0
        return plain(explanation(
            kind=_kind(told.mode), inode=inode.id, size=told.size,
            last_verified_s=None if inode.verified_at == NEVER
            else trio.current_time() - inode.verified_at,
            cached_bytes=v.pages.cached_bytes(key) if total else 0,
            cached_pages=total - missing, total_pages=total,
            dirty_bytes=0 if dirty is None else dirty.dirty_bytes,
            dirty_oldest_s=None if dirty is None else trio.current_time() - dirty.oldest_dirty_at,
            flush_error="" if failed is None else errno.errorcode.get(failed.errno, ""),
            why_missed=v.data.why_missed(inode),
        ))

    # -- doers -------------------------------------------------------------------------------

    async def flush(self, arguments: dict[str, Any], report: Report) -> dict[str, Any]:
        path = str(arguments.get("path", ""))
        inode = await self._existing(path)
        inodes = None if inode.id == ROOT_INODE else self._dirty_below(inode)
        result = await self._volume.data.flush(
            inodes, lambda done, total: report(Progress(done, total, "bytes", "flushing")))
        failed = [
            f"{self._path_of(inode_id)}: {os.strerror(number)}"
            for inode_id, number in result.errors.items()
        ]
        if failed:
            first = next(iter(result.errors.values()))
            raise Refused(first, f"still dirty: {'; '.join(failed[:5])}"
                          + (f" and {len(failed) - 5} more" if len(failed) > 5 else ""))
        return plain(FlushReport(
            path=path, files=result.files, bytes=result.bytes,
            statement=f"everything written to {self._client_path(path)} before this command is "
                      f"on stable storage in {self._volume.settings.core}",
        ))

    async def evict(self, arguments: dict[str, Any], report: Report) -> dict[str, Any]:
        path = str(arguments.get("path", ""))
        v = self._volume
        files = freed = dirty_bytes = 0
        async for inode in self._known_below(await self._existing(path)):
            if inode.attributes.is_regular:
                key = FileKey(inode.id, inode.data_version)
                cached = v.pages.cached_bytes(key)
                dirty = v.write_behind.dirty(inode.id)
                dirty_bytes += 0 if dirty is None else dirty.dirty_bytes
                if cached:
                    v.reader.forget(inode.id)
                    v.pages.drop(key)
                    files, freed = files + 1, freed + cached
                    report(Progress(freed, None, "bytes", "evicting"))
            inode.verified_at = NEVER
            v.kernel.data_changed(inode.id)
        return plain(EvictReport(path, files, freed, dirty_bytes))

    async def warm(self, arguments: dict[str, Any], report: Report) -> dict[str, Any]:
        rate = arguments.get("rate_bytes_s")
        job = _Warm(self._volume, report, None if rate is None else float(rate))
        send, receive = trio.open_memory_channel[tuple[str, Inode]](_WARM_FILES_AT_ONCE)
        async with trio.open_nursery() as nursery:
            for _ in range(_WARM_FILES_AT_ONCE):
                nursery.start_soon(job.worker, receive.clone())
            receive.close()
            async with send:
                for path in arguments.get("paths", [""]):
                    try:
                        await job.walk(str(path), await self._existing(str(path)), send)
                    except FilerError as exc:
                        job.failed.append(WarmFailure(str(path), str(exc)))
        return plain(WarmReport(job.files, job.fetched, job.already, job.failed))

    # -- paths -------------------------------------------------------------------------------

    async def _find(self, path: str) -> Inode | None:
        inode: Inode | None = self._volume.namespace.table.root
        for name in os.fsencode(path).split(b"/"):
            if name and inode is not None:
                inode = await self._volume.namespace.lookup(inode, name)
        return inode

    async def _existing(self, path: str) -> Inode:
        inode = await self._find(path)
        if inode is None:
            raise Refused(errno.ENOENT, self._client_path(path))
        return inode

    def _path_of(self, inode_id: InodeId) -> str:
        """A path that led to the inode; by its number if the names are forgotten."""
        names: list[bytes] = []
        at = self._volume.namespace.table.find(inode_id)
        while at is not None and at.id != ROOT_INODE and len(names) < 256:
            names.append(at.name or b"inode-%d" % at.id)
            at = self._volume.namespace.table.find(at.parent)
        return os.fsdecode(b"/".join(reversed(names)))

    def _client_path(self, path: str) -> str:
        return os.path.join(self._volume.settings.junction, path) if path else (
            self._volume.settings.junction)

    def _dirty_below(self, top: Inode) -> list[InodeId]:
        return [i for i in self._volume.write_behind.dirty_inodes() if self._is_below(i, top.id)]

    def _is_below(self, inode_id: InodeId, top: InodeId) -> bool:
        for _ in range(256):
            if inode_id == top:
                return True
            inode = self._volume.namespace.table.find(inode_id)
            if inode is None or inode_id == ROOT_INODE:
                return False
            inode_id = inode.parent
        return False

    async def _known_below(self, top: Inode) -> Any:
        """*top* and what we know below it; the core filer is not asked."""
        stack = [top.id]
        while stack:
            inode = self._volume.namespace.table.find(stack.pop())
            if inode is None:
                continue
            yield inode
            if inode.attributes.is_directory:
                stack.extend(await self._children(inode))
                await trio.lowlevel.checkpoint()

    async def _children(self, inode: Inode) -> Iterable[InodeId]:
        if inode.directory is not None:
            return [child for child, _ in inode.directory.entries.values()]
        record = await self._volume.store.directory(inode.id)
        return [] if record is None else [child for _, _, child in record.entries]


class _Warm:
    """One warm request: walks, fetches with a few workers, keeps to a rate."""

    def __init__(self, volume: Volume, report: Report, rate_bytes_s: float | None) -> None:
        self._volume = volume
        self._report = report
        self._rate = rate_bytes_s
        self._started = self._report_at = trio.current_time()
        self.files = self.fetched = self.already = self.total = 0
        self.failed: list[WarmFailure] = []

    async def walk(
        self, path: str, inode: Inode, files: trio.MemorySendChannel[tuple[str, Inode]]
    ) -> None:
        if inode.attributes.is_regular:
            self.total += inode.attributes.size
            await files.send((path, inode))
        elif inode.attributes.is_directory:
            names = await self._volume.namespace.listed(inode)
            for _, name, child_id in list(names.since(0)):
                child = self._volume.namespace.table.find(child_id)
                if child is not None:
                    child.name = name
                    await self.walk(os.path.join(path, os.fsdecode(name)), child, files)

    async def worker(self, files: trio.MemoryReceiveChannel[tuple[str, Inode]]) -> None:
        async with files:
            async for path, inode in files:
                try:
                    fetched = await self._volume.data.warm(inode)
                except FilerError as exc:
                    self.failed.append(WarmFailure(path, str(exc)))
                    continue
                self.files += 1
                self.fetched += fetched
                self.already += max(0, inode.attributes.size - fetched)
                self._tell(path)
                if self._rate:
                    await trio.sleep_until(self._started + self.fetched / self._rate)


    def _tell(self, path: str) -> None:
        now = trio.current_time()
        if now >= self._report_at:
            self._report_at = now + _REPORT_EVERY_S
            self._report(Progress(self.fetched + self.already, self.total, "bytes", path))


def plain(report: msgspec.Struct) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(report)
    return plain


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "directory"
    if stat.S_ISLNK(mode):
        return "symlink"
    return "file" if stat.S_ISREG(mode) else "special"


def _samples() -> list[Any]:
    return [s for family in metrics.REGISTRY.collect() for s in family.samples]


def _by_label(
    samples: list[Any], name: str, label: str, type_: type = int, **labels: str
) -> dict[str, Any]:
    return {
        s.labels[label]: type_(s.value) for s in samples
        if s.name == name and all(s.labels.get(k) == v for k, v in labels.items())
    }
