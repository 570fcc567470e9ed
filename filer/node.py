"""One node: the supervisor that ``filer serve`` runs.

Owns the order in which things start and stop, and the signals:

    start   locks, leftovers of a killed node → keepers → mounts serve → NFS server
    stop    NFS server → dirty data is written back (or kept) → keepers → locks
    SIGTERM, SIGINT     stop; a second one stops waiting for dirty data: it stays in the log
    SIGHUP              replace the volume servers one by one, under load

Everything else is in ``filer/supervisor``; nothing of a volume's logic runs in this process.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from functools import partial

import structlog
import trio

from filer import __version__, logs
from filer.admin.protocol import Progress
from filer.admin.reports import NodeStatus, StopReport
from filer.admin.server import serve_admin
from filer.errors import Misconfigured
from filer.settings import NodeSettings
from filer.supervisor import health
from filer.supervisor.claim import claim
from filer.supervisor.control import Control
from filer.supervisor.host import check_host
from filer.supervisor.layout import CHILD_OF, Layout
from filer.supervisor.metrics_server import Snapshot, serve_metrics
from filer.supervisor.nfs_server import NfsServer, replace_file
from filer.supervisor.volumes import KEEPER, Volume

log = structlog.get_logger()

_NFS_STOP_WITHIN_S = 10.0
_KEEPER_STOP_WITHIN_S = 30.0
_PROGRESS_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """How this run behaves; not part of the configuration."""

    keep_dirty: bool = False
    """At stop, leave dirty data in the write-behind log instead of writing it back."""
    keeper: tuple[str, ...] = KEEPER
    """The command that mounts a volume and runs its server."""
    late_after_s: float = 15.0
    """The NFS server starts without volumes that take longer, and exports them when they come:
    a core filer that is down must not keep the others from being served."""
    hung_after_s: float = 20.0
    """An NFS server that does not answer for about this long is killed and started again."""


class Node:
    def __init__(self, settings: NodeSettings, options: NodeOptions | None = None) -> None:
        # As the kernel's mount table and the NFS server will call them.
        settings = settings.model_copy(update={
            "run_dir": settings.run_dir.resolve(), "cache_dir": settings.cache_dir.resolve()})
        self._settings = settings
        self._options = options or NodeOptions()
        self._layout = Layout(settings.run_dir, settings.cache_dir)
        self._phase = "starting"
        self._stop_asked = trio.Event()
        self._hurry = trio.Event()
        environment = {
            **os.environ, CHILD_OF: str(settings.run_dir),
            **logs.child_environment(settings.log_format, settings.log_level),
        }
        self._volumes = [
            Volume(volume, self._layout, environment, keeper=self._options.keeper,
                   lost=partial(self._mount_lost, volume.name))
            for volume in settings.volumes
        ]
        self._nfs = NfsServer(settings, self._layout, environment, self._volumes,
                              late_after_s=self._options.late_after_s,
                              hung_after_s=self._options.hung_after_s)
        self._upgrading = trio.Lock()

    async def run(self) -> None:
        """Until a signal stops the node.

        Raises: Misconfigured: it could not start; nothing is left running.
        """
        self._started_s = trio.current_time()
        with claim(self._layout):
            check_host(self._settings)
            self._prepare_run_dir()
            async with trio.open_nursery() as nursery:
                await nursery.start(self._receive_signals)
                with serve_metrics(self._settings.metrics_bind, self._settings.metrics_port,
                                   self._snapshot):
                    control = Control(self._volumes, self.status)
                    await nursery.start(
                        serve_admin, self._layout.node_socket, control.handlers())
                    try:
                        await self._serve(nursery)
                    finally:
                        with trio.CancelScope(shield=True):
                            await self._stop()
                nursery.cancel_scope.cancel()
        log.info("node stopped", node=self._settings.node)

    async def _serve(self, nursery: trio.Nursery) -> None:
        """Start everything, then wait until the node is to stop."""
        log.info("node starting", node=self._settings.node, version=__version__,
                 volumes=[v.name for v in self._settings.volumes])
        async with trio.open_nursery() as starting:
            starting.start_soon(self._cancel_when_stopping, starting.cancel_scope)
            for volume in self._volumes:
                nursery.start_soon(volume.child.run)
                nursery.start_soon(volume.watch)
                starting.start_soon(self._refuse_if_it_gives_up, volume)
            await self._nfs.start(nursery)
            starting.cancel_scope.cancel()
        if self._stop_asked.is_set():
            return
        self._phase = "serving"
        for exported in self._settings.volumes:
            log.info("volume exported", volume=exported.name, junction=exported.junction,
                     core=exported.core, policy=exported.policy)
        log.info("node serves", nfs=self._address(), socket=str(self._layout.node_socket))
        await self._stop_asked.wait()

    def _mount_lost(self, volume: str) -> None:
        self._nfs.mount_lost(volume)

    async def _refuse_if_it_gives_up(self, volume: Volume) -> None:
        """A volume that cannot ever start is told at once, while somebody looks."""
        await volume.child.settled.wait()
        status = volume.child.status()
        if status.state == "failed":
            raise Misconfigured(
                f"volume {volume.settings.name} cannot start: {status.last_exit}",
                "the volume server's message above says why")

    async def _cancel_when_stopping(self, scope: trio.CancelScope) -> None:
        await self._stop_asked.wait()
        scope.cancel()

    # -- stopping ------------------------------------------------------------------------------

    async def _stop(self) -> None:
        self._phase = "stopping"
        log.info("node stopping", keep_dirty=self._options.keep_dirty)
        await self._nfs.stop(_NFS_STOP_WITHIN_S)
        async with trio.open_nursery() as nursery:
            for volume in self._volumes:
                nursery.start_soon(self._stop_volume, volume)

    async def _stop_volume(self, volume: Volume) -> None:
        report: StopReport | None = None
        if volume.serving.is_set():
            keep = self._options.keep_dirty or self._hurry.is_set()
            if not keep:
                report = await self._write_back(volume)
            if report is None:
                report = await volume.flush_and_stop(keep_dirty=True)
        if report is not None and report.dirty_bytes:
            log.warning("dirty data stays in the write-behind log until the next start",
                        volume=volume.settings.name, dirty_bytes=report.dirty_bytes,
                        dirty_files=report.dirty_files)
        await volume.release(_KEEPER_STOP_WITHIN_S)

    async def _write_back(self, volume: Volume) -> StopReport | None:
        """``None`` if a second signal came first."""
        report: StopReport | None = None
        latest: list[Progress] = []

        async def tell() -> None:
            while True:
                await trio.sleep(_PROGRESS_EVERY_S)
                done, total = (latest[-1].done, latest[-1].total) if latest else (0, None)
                log.info("writing dirty data back", volume=volume.settings.name, done=done,
                         total=total, hint="signal again to leave the rest in the log")

        async def hurry(scope: trio.CancelScope) -> None:
            await self._hurry.wait()
            scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell)
            nursery.start_soon(hurry, nursery.cancel_scope)
            report = await volume.flush_and_stop(
                keep_dirty=False, on_progress=lambda p: latest.__setitem__(slice(None), [p]))
            nursery.cancel_scope.cancel()
        return report

    # -- signals -------------------------------------------------------------------------------

    async def _receive_signals(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            task_status.started()
            async with trio.open_nursery() as nursery:
                async for number in signals:
                    if number == signal.SIGHUP:
                        nursery.start_soon(self._upgrade)
                    elif not self._stop_asked.is_set():
                        log.info("asked to stop", signal=signal.Signals(number).name)
                        self._stop_asked.set()
                    else:
                        log.warning("asked again: what is still dirty stays in the log",
                                    signal=signal.Signals(number).name)
                        self._hurry.set()

    async def _upgrade(self) -> None:
        """Replace the volume servers, one after the other, without losing a mount."""
        async with self._upgrading:
            for volume in self._volumes:
                if self._stop_asked.is_set():
                    return
                log.info("replacing the volume server", volume=volume.settings.name)
                try:
                    await volume.upgrade()
                except trio.TooSlowError:
                    log.error("the new volume server does not answer; the others are left alone",
                              volume=volume.settings.name)
                    return
                log.info("volume server replaced", volume=volume.settings.name)

    # -- what it says of itself ----------------------------------------------------------------

    def status(self) -> NodeStatus:
        volumes = [volume.report() for volume in self._volumes]
        children = [status for volume in self._volumes
                    for status in (volume.child.status(), volume.server_status())]
        children += [child.status() for child in self._nfs.children]
        reasons = health.assess(volumes, children)
        return NodeStatus(
            node=self._settings.node, version=__version__, pid=os.getpid(), phase=self._phase,
            uptime_s=trio.current_time() - self._started_s,
            health=str(health.level(reasons)), reasons=reasons, nfs=self._address(),
            volumes=volumes, children=children)

    async def _snapshot(self) -> Snapshot:
        texts: dict[str, str] = {}

        async def ask(volume: Volume) -> None:
            found = await volume.metrics_text()
            if found is not None:
                texts[volume.settings.name] = found

        async with trio.open_nursery() as nursery:
            for volume in self._volumes:
                nursery.start_soon(ask, volume)
        return self.status(), texts

    def _address(self) -> str:
        nfs = self._settings.nfs
        return f"[{nfs.bind}]:{nfs.port}" if ":" in nfs.bind else f"{nfs.bind}:{nfs.port}"

    def _prepare_run_dir(self) -> None:
        layout = self._layout
        layout.run_dir.chmod(0o755)
        for directory in (layout.volumes_dir, layout.mounts_dir):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for volume in self._settings.volumes:
            layout.volume_socket(volume.name).unlink(missing_ok=True)
            layout.keeper_state(volume.name).unlink(missing_ok=True)
        replace_file(layout.node_config, self._settings.model_dump_json(indent=2) + "\n")


def run_node(settings: NodeSettings, options: NodeOptions | None = None) -> None:
    """Serve until stopped.  Raises: Misconfigured."""
    logs.configure(settings.log_format, settings.log_level)
    try:
        trio.run(Node(settings, options).run)
    except* Misconfigured as group:
        raise _first(group) from None


def _first(group: BaseExceptionGroup[Misconfigured]) -> Misconfigured:
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    assert isinstance(first, Misconfigured)
    return first
