"""Stands in for a keeper and its volume server: a bind mount and an admin socket that obeys.

Takes the real keeper's arguments.  ``FILER_FAKE`` names a directory:

    data/VOLUME          what is mounted
    events               a line is appended for each thing that happens, by all volumes
    VOLUME.misconfigured exit 64 at start
    VOLUME.late          wait for a line on this FIFO before serving
    VOLUME.stuck         ``stop`` without keep_dirty never returns
    VOLUME.status        JSON that overrides fields of the status
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import msgspec
import trio

from filer.admin.protocol import Progress
from filer.admin.reports import (
    EvictReport,
    Explanation,
    FlushReport,
    StopReport,
    TopSample,
    VolumeStatus,
    WarmReport,
)
from filer.admin.server import serve_admin
from filer.supervisor.layout import Layout

FAKE = Path(os.environ["FILER_FAKE"])


class FakeVolume:
    def __init__(self, name: str) -> None:
        self.name = name

    def event(self, text: str) -> None:
        with open(FAKE / "events", "a") as file:
            file.write(f"{self.name} {text}\n")

    async def status(self, arguments, report):
        overrides = FAKE / f"{self.name}.status"
        given = json.loads(overrides.read_text()) if overrides.exists() else {}
        return {**msgspec.to_builtins(VolumeStatus(self.name, pid=os.getpid())), **given}

    async def top(self, arguments, report):
        return msgspec.to_builtins(TopSample(
            self.name, trio.current_time(), operations={"lookup": 7}, read_bytes=1 << 20,
            hits={"pages": 3}, misses={"pages": 1}))

    async def metrics(self, arguments, report):
        return {"text": "# HELP filer_upcalls_total FUSE requests\n"
                        "# TYPE filer_upcalls_total counter\n"
                        'filer_upcalls_total{operation="lookup"} 7.0\n'}

    async def explain(self, arguments, report):
        return msgspec.to_builtins(Explanation(
            arguments["path"], inode=5, size=3 << 20, policy="read", policy_why="why not",
            write_mode="through", cached_pages=1, total_pages=3, cached_bytes=1 << 20,
            why_missed="never read before"))

    async def flush(self, arguments, report):
        report(Progress(1, 2))
        self.event(f"flush {arguments['path']!r}")
        return msgspec.to_builtins(FlushReport(
            arguments["path"], files=2, bytes=10, statement="It is there."))

    async def evict(self, arguments, report):
        self.event(f"evict {arguments['path']!r}")
        return msgspec.to_builtins(EvictReport(arguments["path"], 1, 5, kept_dirty_bytes=3))

    async def warm(self, arguments, report):
        self.event(f"warm {arguments['paths']!r} rate={arguments['rate_bytes_s']}")
        failed = [{"path": p, "error": "ENOENT"} for p in arguments["paths"] if "missing" in p]
        return {**msgspec.to_builtins(WarmReport(len(arguments["paths"]), 100, 11)),
                "failed": failed}

    async def stop(self, arguments, report):
        keep = arguments["keep_dirty"]
        self.event(f"stop keep_dirty={keep}")
        if not keep and (FAKE / f"{self.name}.stuck").exists():
            await trio.sleep_forever()
        return msgspec.to_builtins(StopReport(9 if keep else 0, 1 if keep else 0))


async def main() -> int:
    parser = argparse.ArgumentParser()
    for option in ("--volume", "--mountpoint", "--state"):
        parser.add_argument(option)
    parser.add_argument("--die-with-parent", action="store_true")
    parser.add_argument("server", nargs="+")
    arguments = parser.parse_args()
    volume = FakeVolume(arguments.volume)
    volume.event("start")
    if (FAKE / f"{volume.name}.misconfigured").exists():
        _write_state(arguments.state, volume.name, "misconfigured", "the disk is upside down")
        return 64
    late = FAKE / f"{volume.name}.late"
    if late.exists():
        await trio.to_thread.run_sync(late.read_bytes)
    source = FAKE / "data" / volume.name
    await trio.run_process(["mount", "--bind", source, arguments.mountpoint])
    _write_state(arguments.state, volume.name, "running", None)
    handlers = {verb: getattr(volume, verb) for verb in (
        "status", "top", "metrics", "explain", "flush", "evict", "warm", "stop")}
    socket = _layout(arguments.server).volume_socket(volume.name)
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(serve_admin, socket, handlers))
            async for _ in signals:
                nursery.cancel_scope.cancel()
    await trio.run_process(["umount", "--lazy", arguments.mountpoint])
    volume.event("end")
    return 0


def _layout(command: list[str]) -> Layout:
    """By the node.json that the volume server's command names."""
    config = json.loads(Path(command[command.index("--config") + 1]).read_text())
    return Layout(Path(config["run_dir"]), Path(config["cache_dir"]))


def _write_state(path: str, volume: str, phase: str, last_line: str | None) -> None:
    Path(path).write_text(json.dumps({
        "volume": volume, "keeper_pid": os.getpid(), "server_pid": os.getpid(), "phase": phase,
        "since": 0.0, "restarts": 0, "last_exit": None, "last_line": last_line}))


if __name__ == "__main__":
    sys.exit(trio.run(main))
