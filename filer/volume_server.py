"""The process that serves one volume: started, and started again, by its keeper.

    python -m filer.volume_server --config NODE.json --volume NAME --fuse-fd N --init-fd M

Owns the order of start and stop and the meaning of its signals:

- SIGTERM, SIGUSR1: stop reading requests, answer those under way, exit 0.  Nothing is flushed:
  that is asked for before, through the admin verb ``stop``; what is dirty stays in the log.
- Exit 64: the configuration cannot work; started again it would fail again.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog
import trio

from filer import logs
from filer.admin.protocol import EXIT_MISCONFIGURED, Progress
from filer.admin.reports import StopReport
from filer.admin.server import Report, serve_admin
from filer.errors import Misconfigured
from filer.settings import NodeSettings, VolumeSettings
from filer.supervisor.layout import Layout
from filer.vfs import shim
from filer.vfs.kernel import FuseKernelCaches
from filer.vfs.lookup_counts import LookupCounts
from filer.vfs.operation_records import OperationRecords
from filer.vfs.operations import Operations
from filer.vfs.session import FuseSession, KeptMount
from filer.volume import Volume, open_volume
from filer.volume_admin import VolumeAdmin, plain

log = structlog.get_logger(__name__)

_ANSWER_WITHIN_S = 5.0
"""At a stop, requests that wait longer than this for the core filer go to the next server."""


async def serve(node: NodeSettings, settings: VolumeSettings, mount: KeptMount) -> None:
    """Serve *settings*' volume on *mount* until told to stop."""
    layout = Layout(node.run_dir, node.cache_dir)
    counts = LookupCounts(is_complete=not mount.is_taken_over)
    kernel = FuseKernelCaches(counts)
    records = OperationRecords(
        layout.volumes_dir / f"{settings.name}.operations", mount.mount_id)
    async with open_volume(
        node, settings, kernel, kernel_is_new=not mount.is_taken_over
    ) as volume, trio.open_nursery() as nursery:
        operations = Operations(
            volume.namespace, volume.data, volume.core, volume.policy, counts, records,
            kernel)
        session = FuseSession(operations, mount)
        nursery.start_soon(_stop_on_signal, session, nursery.cancel_scope)
        admin = VolumeAdmin(volume, str(layout.mountpoint(settings.name)))
        await nursery.start(kernel.run)
        await nursery.start(_run_session, session, nursery.cancel_scope)
        await nursery.start(
            serve_admin, layout.volume_socket(settings.name),
            {**admin.handlers(), "stop": _Stop(volume)})
        gc.collect()
        gc.freeze()  # what start-up made lives as long as we do
        log.info("volume serves", core=settings.core, policy=volume.policy.name,
                 taken_over=mount.is_taken_over)
    session.close()
    records.close()


async def _run_session(
    session: FuseSession, everything: trio.CancelScope, *, task_status: trio.TaskStatus[None]
) -> None:
    await session.run(task_status=task_status)
    everything.cancel()


async def _stop_on_signal(session: FuseSession, everything: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGUSR1) as signals:
        async for number in signals:
            log.info("volume server stops", signal=signal.Signals(number).name,
                     unanswered=session.handler_count)
            session.stop()
            await trio.sleep(_ANSWER_WITHIN_S)
            everything.cancel()


class _Stop:
    """The verb ``stop``: write everything back, or say what stays in the log."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume

    async def __call__(self, arguments: dict[str, Any], report: Report) -> dict[str, Any]:
        data = self._volume.data
        if not arguments.get("keep_dirty"):
            await data.flush(None, lambda done, total: report(Progress(done, total)))
        await data.write_behind.sync(None)
        left = data.write_behind.statistics()
        return plain(StopReport(left.dirty_bytes, left.dirty_files))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="filer.volume_server", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--volume", required=True)
    parser.add_argument("--fuse-fd", type=int, required=True)
    parser.add_argument("--init-fd", type=int, required=True)
    arguments = parser.parse_args(argv)
    logs.configure_child(volume=arguments.volume)
    node = NodeSettings.model_validate_json(arguments.config.read_text())
    [settings] = [v for v in node.volumes if v.name == arguments.volume]
    shim.tune_malloc()
    gc.set_threshold(50_000, 20, 20)
    os.umask(0)
    status = 0
    try:
        trio.run(serve, node, settings, KeptMount(arguments.fuse_fd, arguments.init_fd))
    except* Misconfigured as group:
        error = _first(group)
        print(f"{error}{f'; {error.hint}' if error.hint else ''}", file=sys.stderr)
        status = EXIT_MISCONFIGURED
    return status


def _first(error: BaseException) -> Misconfigured:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Misconfigured)
    return error


if __name__ == "__main__":
    sys.exit(main())
